//! Headers of vsock packets (virtio 1.2, section 5.10.6).

/// Bytes of a header.
pub(crate) const HEADER_SIZE: usize = 44;

/// The host's context id.
pub(crate) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
const TYPE_STREAM: u16 = 1;

/// Flags of a `SHUTDOWN`: who sends it will not receive any more, or not send any more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// See [`SHUTDOWN_RECEIVE`].
pub(crate) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (`enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Op {
    /// Open a connection.
    Request = 1,
    /// The connection is open.
    Response = 2,
    /// The connection is over, or never was.
    Reset = 3,
    /// The sender won't send or receive any more, by the flags.
    Shutdown = 4,
    /// Data.
    ReadWrite = 5,
    /// How much room the sender has.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    pub(super) const ALL: [Op; 7] = [
        Op::Request,
        Op::Response,
        Op::Reset,
        Op::Shutdown,
        Op::ReadWrite,
        Op::CreditUpdate,
        Op::CreditRequest,
    ];

    fn from_raw(raw: u16) -> Option<Self> {
        Op::ALL.into_iter().find(|&op| op as u16 == raw)
    }
}

/// A header, as read from or written to a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Sender's context id.
    pub source_cid: u64,
    /// Receiver's context id.
    pub destination_cid: u64,
    /// Sender's port.
    pub source_port: u32,
    /// Receiver's port.
    pub destination_port: u32,
    /// Bytes of data that follow.
    pub length: u32,
    /// What for; `None` for an operation or socket type that doesn't exist here.
    pub op: Option<Op>,
    /// See [`SHUTDOWN_RECEIVE`].
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buffer_size: u32,
    /// How many bytes the sender has taken out of its receive buffer since the connection began, modulo 2³².
    pub consumed: u32,
}

impl Header {
    /// Reads one.
    pub(crate) fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        let op = Op::from_raw(u16_at(bytes, 30)).filter(|_| u16_at(bytes, 28) == TYPE_STREAM);
        Header {
            source_cid: u64_at(bytes, 0),
            destination_cid: u64_at(bytes, 8),
            source_port: u32_at(bytes, 16),
            destination_port: u32_at(bytes, 20),
            length: u32_at(bytes, 24),
            op,
            flags: u32_at(bytes, 32),
            buffer_size: u32_at(bytes, 36),
            consumed: u32_at(bytes, 40),
        }
    }

    /// Writes one.
    pub(crate) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&TYPE_STREAM.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer_size.to_le_bytes());
        bytes[40..].copy_from_slice(&self.consumed.to_le_bytes());
        bytes
    }
}

fn u16_at(bytes: &[u8; HEADER_SIZE], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8; HEADER_SIZE], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8; HEADER_SIZE], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_both_ways() {
        let header = Header {
            source_cid: 0x0102_0304_0506_0708,
            destination_cid: HOST_CID,
            source_port: 0x1112_1314,
            destination_port: 1024,
            length: 65536,
            op: Some(Op::ReadWrite),
            flags: 3,
            buffer_size: 0xffff_0000,
            consumed: 0x8000_0001,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::parse(&bytes), header);
        // Offsets by the specification's struct.
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!((bytes[28], bytes[30]), (1, 5));
    }

    #[test]
    fn other_operations_and_types_are_none() {
        let mut bytes = Header::parse(&[0; HEADER_SIZE]).to_bytes();
        for raw in [0u16, 8, 9, 256, u16::MAX] {
            bytes[30..32].copy_from_slice(&raw.to_le_bytes());
            assert_eq!(Header::parse(&bytes).op, None);
        }
        bytes[30..32].copy_from_slice(&5u16.to_le_bytes());
        assert_eq!(Header::parse(&bytes).op, Some(Op::ReadWrite));
        // SOCK_SEQPACKET isn't offered.
        bytes[28] = 2;
        assert_eq!(Header::parse(&bytes).op, None);
    }
}
