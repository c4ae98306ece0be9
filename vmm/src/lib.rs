//! Bulkhead's virtual machine monitor.

pub mod devices;
pub mod memory;
