//! Guest memory: how it is made, and the names the rest of the crate uses for it.

use std::sync::Arc;

/// Guest-physical memory: anonymous mappings, one per range of the memory map.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Guest memory as everybody shares it. It lives until the last holder drops it.
pub type SharedRam = Arc<GuestRam>;
