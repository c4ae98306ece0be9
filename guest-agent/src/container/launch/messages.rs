//! What a process that is being set up and the agent tell each other, one socket message each: a letter, then a value.

/// Longest message in bytes. Longer texts are cut.
pub(crate) const MAX_MESSAGE: usize = 4096;

/// The agent's only message: execute the program.
pub(crate) const START: &[u8] = b"S";

/// Who has to act on a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The specification asks for what can't be had, such as a program that does not exist.
    Specification,
    /// Anything else.
    Internal,
}

/// A child's message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// The id of the process, from the child that made it.
    Pid(libc::pid_t),
    /// Something for the log.
    Remark(String),
    /// The master of the terminal comes with this.
    Terminal,
    /// Only the program has to be executed.
    Ready,
    /// It did not work.
    Failed {
        /// Who has to act.
        kind: FailureKind,
        /// What happened.
        message: String,
    },
}

impl Message {
    /// The message as bytes, at most [`MAX_MESSAGE`].
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (letter, value): (u8, &[u8]) = match self {
            Self::Pid(pid) => return [b"P", pid.to_ne_bytes().as_slice()].concat(),
            Self::Remark(text) => (b'W', text.as_bytes()),
            Self::Terminal => (b'T', b""),
            Self::Ready => (b'R', b""),
            Self::Failed { kind: FailureKind::Specification, message } => (b'F', message.as_bytes()),
            Self::Failed { kind: FailureKind::Internal, message } => (b'E', message.as_bytes()),
        };
        let length = value.len().min(MAX_MESSAGE - 1);
        [&[letter], &value[..length]].concat()
    }

    /// Reads a message; `None` if it is none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (letter, value) = bytes.split_first()?;
        let text = || String::from_utf8_lossy(value).into_owned();
        Some(match letter {
            b'P' => Self::Pid(libc::pid_t::from_ne_bytes(value.try_into().ok()?)),
            b'W' => Self::Remark(text()),
            b'T' => Self::Terminal,
            b'R' => Self::Ready,
            b'F' => Self::Failed { kind: FailureKind::Specification, message: text() },
            b'E' => Self::Failed { kind: FailureKind::Internal, message: text() },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_way() {
        let failed = |kind| Message::Failed { kind, message: "no".to_owned() };
        for message in [
            Message::Pid(1234),
            Message::Remark("hm".to_owned()),
            Message::Terminal,
            Message::Ready,
            failed(FailureKind::Specification),
            failed(FailureKind::Internal),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode(b""), None);
        assert_eq!(Message::decode(b"P12"), None);
        assert_eq!(Message::decode(b"?"), None);
    }

    #[test]
    fn long_texts_are_cut() {
        let message = Message::Remark("ä".repeat(MAX_MESSAGE));
        assert_eq!(message.encode().len(), MAX_MESSAGE);
        assert!(Message::decode(&message.encode()).is_some());
    }
}
