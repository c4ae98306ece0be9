//! A client's end of a stream, and what crosses it.
//!
//! Bytes go as `containerd.types.transfer.Data`, no more than the reader has allowed by `WindowUpdate`. The messages have one field
//! each, the first, so they are written as the wrappers that protobuf has for their fields' types are. A stream of ours ends with the
//! call that it is, whose answer is one message more to the client: one that says nothing.

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::wrappers::{BytesValue, Int32Value, StringValue};
use tokio::sync::oneshot;
use ttrpc::asynchronous::{SSReceiver, SSSender, ServerStream};

const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// Bytes of an id.
const MAX_ID: usize = 512;

/// The client has gone, or has said something that can't be.
#[derive(Debug)]
pub(super) struct Gone;

/// What comes from a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    Data(Vec<u8>),
    Window(usize),
    /// It says no more.
    End,
}

/// Ends the stream when it is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SSSender<Any>,
    receiver: SSReceiver<Any>,
    /// Bytes that the client takes.
    window: usize,
    /// Whether the client is the one that writes.
    is_input: bool,
    end: Option<oneshot::Sender<Any>>,
}

impl Connection {
    /// With what the call's answer is to say, once it ends.
    pub(super) fn new(stream: ServerStream<Any, Any>) -> (Connection, oneshot::Receiver<Any>) {
        let (sender, receiver) = stream.split();
        let (end, ended) = oneshot::channel();
        (Connection { sender, receiver, window: 0, is_input: false, end: Some(end) }, ended)
    }

    /// Sends as many bytes as the client takes, and says how many; waits until it takes any.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<usize, Gone> {
        while self.window == 0 {
            match self.receive().await? {
                Received::Window(more) => self.window = self.window.saturating_add(more),
                Received::Data(_) => {}
                Received::End => return Err(Gone),
            }
        }
        let length = bytes.len().min(self.window);
        self.sender.send(&data(bytes.get(..length).unwrap_or(bytes))).await.map_err(|_| Gone)?;
        self.window -= length;
        Ok(length)
    }

    /// Lets the client write so many bytes more.
    pub(super) async fn allow(&mut self, bytes: usize) -> Result<(), Gone> {
        self.is_input = true;
        self.sender.send(&window_update(bytes)).await.map_err(|_| Gone)
    }

    pub(super) async fn receive(&mut self) -> Result<Received, Gone> {
        match self.receiver.recv().await {
            Ok(Some(message)) => read(&message).ok_or(Gone),
            Ok(None) => Ok(Received::End),
            Err(_) => Err(Gone),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let last = if self.is_input { window_update(0) } else { data(&[]) };
        // Nobody waits for it where the server ends.
        let _ = self.end.take().map(|end| end.send(last));
    }
}

/// The id of the stream that a first message opens.
pub(super) fn init(message: &Any) -> Option<String> {
    let id = value::<StringValue>(message, INIT)?.value;
    (1..=MAX_ID).contains(&id.len()).then_some(id)
}

fn read(message: &Any) -> Option<Received> {
    if let Some(data) = value::<BytesValue>(message, DATA) {
        return Some(Received::Data(data.value));
    }
    let update = value::<Int32Value>(message, WINDOW_UPDATE)?.value;
    usize::try_from(update).ok().map(Received::Window)
}

fn value<M: Message>(message: &Any, name: &str) -> Option<M> {
    // A type's URL may have a host before the name.
    let is_it = message.type_url.rsplit('/').next() == Some(name);
    is_it.then(|| M::parse_from_bytes(&message.value).ok()).flatten()
}

fn any(name: &str, message: &impl Message) -> Any {
    // A message of one field can be written.
    let value = message.write_to_bytes().unwrap_or_default();
    Any { type_url: name.to_owned(), value, ..Default::default() }
}

pub(super) fn data(bytes: &[u8]) -> Any {
    any(DATA, &BytesValue { value: bytes.to_vec(), ..Default::default() })
}

pub(super) fn window_update(bytes: usize) -> Any {
    let value = i32::try_from(bytes).unwrap_or(i32::MAX);
    any(WINDOW_UPDATE, &Int32Value { value, ..Default::default() })
}

#[cfg(test)]
pub(super) fn init_message(id: &str) -> Any {
    any(INIT, &StringValue { value: id.to_owned(), ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_containerds_description() {
        assert_eq!(data(b"ab").value, [0x0a, 2, b'a', b'b']);
        assert_eq!(window_update(300).value, [0x08, 0xac, 0x02]);
        assert_eq!(init_message("c-stdout").value[..2], [0x0a, 8]);
        assert_eq!(init(&init_message("c-stdout")).as_deref(), Some("c-stdout"));
        assert_eq!(read(&data(b"ab")), Some(Received::Data(b"ab".to_vec())));
        assert_eq!(read(&window_update(300)), Some(Received::Window(300)));
        let hosted = Any { type_url: format!("types.containerd.io/{DATA}"), ..data(b"ab") };
        assert_eq!(read(&hosted), Some(Received::Data(b"ab".to_vec())));
    }

    #[test]
    fn other_messages_are_none() {
        for id in ["", &"x".repeat(MAX_ID + 1)] {
            assert_eq!(init(&init_message(id)), None);
        }
        assert_eq!(init(&data(b"c-stdout")), None);
        assert_eq!(read(&init_message("c-stdout")), None);
        assert_eq!(read(&Any { value: vec![0xff], ..data(b"") }), None);
        let taken_back = any(WINDOW_UPDATE, &Int32Value { value: -1, ..Default::default() });
        assert_eq!(read(&taken_back), None);
    }
}
