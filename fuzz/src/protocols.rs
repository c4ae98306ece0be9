//! The protocols between the parts: the VMM's and the agent's.

use bulkhead_agent_protocol::forward::LoopbackPort;
use bulkhead_agent_protocol::names::{self, frame};
use bulkhead_agent_protocol::{self as agent, cgroup};
use bulkhead_vmm_protocol::{Channel, ChannelError, FromVmm, MAX_FDS, Request, view_name, view_number};
use protobuf::Message;

use crate::host;
use crate::input::Input;

/// A packet at either end of the control socket, as the other one may send it.
pub fn control(data: &[u8]) {
    if data.is_empty() {
        return;
    }
    let (socket, peer) = host::packets();
    let channel = Channel::from(socket);
    peer.send(data);
    if let Ok(packet) = channel.receive::<Request>() {
        let count = data.len() % (MAX_FDS + 1);
        match &packet.message {
            Request::Prepare(config) => drop(config.validate(count)),
            Request::Boot(config) => drop(config.validate(count)),
            Request::Restore(config) => drop(config.config.validate(count)),
            Request::AttachDisk(disk) => drop(disk.validate(disk.parts.len().max(1))),
            Request::AttachNet(net) => drop(net.validate(count)),
            _ => {}
        }
        again(&packet.message);
    }
    peer.send(data);
    match channel.receive::<FromVmm>() {
        Ok(packet) => again(&packet.message),
        Err(ChannelError::Malformed(_) | ChannelError::TimedOut) => {}
        Err(error) => panic!("{error}"),
    }
}

/// What was understood can be said again.
fn again<M: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(message: &M) {
    let json = serde_json::to_vec(message).unwrap();
    assert_eq!(&serde_json::from_slice::<M>(&json).unwrap(), message);
}

/// What a hostile agent may answer, and what the guest's files say that it passes on.
pub fn answers(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let bytes = input.rest();
    match kind % 10 {
        0 => message::<agent::ReadyResponse>(bytes),
        1 => message::<agent::WaitResponse>(bytes),
        2 => message::<agent::PidsResponse>(bytes),
        3 => message::<agent::StatsResponse>(bytes),
        4 => message::<agent::AgentEvent>(bytes),
        5 => message::<agent::CreateContainerRequest>(bytes),
        6 => message::<agent::AddInterfaceRequest>(bytes),
        7 => {
            let text = String::from_utf8_lossy(bytes).into_owned();
            message_again(&cgroup::read(&|_| text.clone()));
        }
        8 => {
            let Some((header, rest)) = bytes.split_first_chunk() else { return };
            if let Some(header) = names::Header::from_bytes(*header) {
                assert_eq!(names::Header::from_bytes(header.to_bytes()), Some(header));
                assert!(frame(header.tag, header.tcp, rest).len() <= names::Header::SIZE + rest.len());
            }
        }
        _ => {
            let number = Input::new(bytes).u64();
            if let Some(port) = LoopbackPort::from_number(number) {
                assert_eq!(LoopbackPort::from_number(port.to_number()), Some(port));
            }
            if let Some(view) = view_number(bytes) {
                assert_eq!(view_name(view >> 20, view & 0xf_ffff).as_bytes(), bytes);
            }
        }
    }
}

fn message<M: Message>(bytes: &[u8]) {
    if let Ok(message) = M::parse_from_bytes(bytes) {
        message_again(&message);
    }
}

fn message_again<M: Message>(message: &M) {
    let bytes = message.write_to_bytes().expect("what was read can be written");
    M::parse_from_bytes(&bytes).expect("what was written can be read");
}
