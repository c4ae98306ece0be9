//! What makes a queue or one of its chains unusable.

/// Why a queue can't be used.
#[derive(Debug, thiserror::Error)]
pub enum QueueFault {
    /// Not a power of two, zero, or greater than the device's limit.
    #[error("a queue of {size} descriptors was set up: a power of two up to {max} is possible")]
    Size {
        /// What the driver asked for.
        size: u16,
        /// The device's limit.
        max: u16,
    },
    /// A ring's address is not aligned as section 2.7 asks, or zero.
    #[error("a ring at {address:#x} is not aligned to {alignment} bytes")]
    Alignment {
        /// Guest-physical address.
        address: u64,
        /// What it must be a multiple of.
        alignment: u64,
    },
    /// A ring isn't wholly inside guest memory.
    #[error("a ring of {length} bytes at {address:#x} is outside guest memory")]
    RingRange {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        length: usize,
    },
    /// More entries are available than the queue has, or a ring can't be accessed.
    #[error("the rings can't be followed")]
    Ring(#[source] virtio_queue::Error),
    /// A head past the end of the descriptor table.
    #[error("descriptor {0} was made available, which is past the end of the table")]
    Head(u16),
    /// A head that the device hasn't returned yet.
    #[error("descriptor chain {0} was made available while the device still has it")]
    InFlight(u16),
    /// A chain with a broken link, an indirect table that makes no sense, or no descriptor at all.
    #[error("descriptor chain {0} is broken")]
    BrokenChain(u16),
    /// A chain with more descriptors than the queue has.
    #[error("descriptor chain {0} is longer than the queue or loops")]
    LongChain(u16),
    /// A writable descriptor before a readable one.
    #[error("descriptor chain {0} has a readable buffer after a writable one")]
    Order(u16),
    /// A buffer that isn't wholly inside guest memory.
    #[error("descriptor chain {head} has a buffer of {length} bytes at {address:#x}, outside guest memory")]
    BufferRange {
        /// Head of the chain.
        head: u16,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
}
