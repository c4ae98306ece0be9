//! Bulkhead's virtual machine monitor.
