//! The control queue (section 5.1.6.5): a driver sets how many queue pairs it uses, and nothing else.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::devices::{Chain, DeviceFault};

/// Carries a command out: `set_pairs` says whether the number of queue pairs is possible. Returns how many bytes were written.
pub(crate) fn serve(chain: &Chain, set_pairs: impl FnOnce(u16) -> bool) -> Result<u32, DeviceFault> {
    let mut command = [0; 2];
    let mut reader = chain.reader();
    let mut writer = chain.writer();
    if reader.remaining() < command.len() || writer.remaining() == 0 {
        return Err(DeviceFault::Protocol("a control command without a header or room for its result"));
    }
    reader.read_exact(&mut command)?;
    let set = [VIRTIO_NET_CTRL_MQ as u8, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8];
    let done = command == set && reader.remaining() >= 2 && set_pairs(u16::from_le(reader.read_obj()?));
    writer.write_obj(if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8)?;
    Ok(1)
}
