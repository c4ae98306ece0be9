//! Bulkhead's virtual machine monitor.

pub mod calibrate;
pub mod devices;
pub mod memory;
