//! Bulkhead's virtual machine monitor.
//!
//! One process is one virtual machine. It opens nothing: everything it works with comes as a descriptor in the boot
//! message ([`control`], [`resources`]). [`machine`] builds the virtual machine from it: guest memory ([`memory`],
//! [`layout`]), a kernel ([`boot`]), vCPUs ([`cpu`]), an IOAPIC ([`ioapic`]) and virtio devices ([`devices`]).
//!
//! Each of its threads runs under a seccomp filter of its own: the control thread, a few for the devices, by what they may have to wait
//! for (`device_threads`), and one for each vCPU ([`vcpu`]), whose trapped accesses go to the [`bus`].

pub mod boot;
pub mod bus;
pub mod calibrate;
pub mod control;
mod cpu;
mod device_loop;
mod device_threads;
pub mod devices;
mod growth;
pub mod ioapic;
pub mod layout;
pub mod logger;
mod machine;
pub mod memory;
mod patience;
mod resources;
pub mod template;
mod vcpu;
pub mod vm;
pub mod working_set;
