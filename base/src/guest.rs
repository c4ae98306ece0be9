//! What the VMM tells the agent on the kernel's command line, and how the agent ends the machine.

/// Names the port that a guest writes [`POWER_OFF`] to.
pub const POWER_PORT_PARAMETER: &str = "bulkhead.power_port=";

/// Names the first slot's window, counted from 0.
pub const DEVICE_SLOTS_PARAMETER: &str = "bulkhead.device_slots=";

/// The byte that ends the machine.
pub const POWER_OFF: u8 = 0x34;
