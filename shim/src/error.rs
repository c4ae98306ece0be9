//! How the shim's errors reach containerd: as a ttrpc status with a code it acts upon and a message for the operator.

use std::error::Error;

pub(crate) use bulkhead_base::chain;
pub(crate) use ttrpc::Code;

/// An error as containerd sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// What containerd's callers tell errors apart by.
    pub code: Code,
    /// What was tried on what, why it failed, and what to do about it.
    pub message: String,
}

/// An error type of this crate that knows its code.
pub(crate) trait Classify: Error {
    /// The code for containerd.
    fn code(&self) -> Code;
}

impl ApiError {
    /// An error without a source.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> ApiError {
        ApiError { code, message: message.into() }
    }

    /// The object that a request names does not exist, or no longer.
    pub(crate) fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(Code::NOT_FOUND, message)
    }

    /// The object is in a state in which the request can't be carried out.
    pub(crate) fn precondition(message: impl Into<String>) -> ApiError {
        ApiError::new(Code::FAILED_PRECONDITION, message)
    }

    /// The request itself is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(Code::INVALID_ARGUMENT, message)
    }
}

impl<E: Classify> From<E> for ApiError {
    fn from(error: E) -> ApiError {
        ApiError { code: error.code(), message: chain(&error) }
    }
}

impl From<ApiError> for ttrpc::Error {
    fn from(error: ApiError) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code, error.message))
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// Makes text from the guest fit for a message or a log line: one line, no control characters, at most `limit` bytes.
pub(crate) fn untrusted(text: &str, limit: usize) -> String {
    let mut clean = String::new();
    for character in text.trim_matches(|c: char| c.is_whitespace() || c.is_control()).chars() {
        if clean.len() + character.len_utf8() > limit {
            clean.push('…');
            break;
        }
        clean.push(if character.is_control() { ' ' } else { character });
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("can't open the kernel")]
    struct Outer(#[source] std::io::Error);

    impl Classify for Outer {
        fn code(&self) -> Code {
            Code::NOT_FOUND
        }
    }

    #[test]
    fn the_whole_chain_reaches_containerd() {
        let error = ApiError::from(Outer(std::io::Error::other("gone")));
        assert_eq!(error, ApiError { code: Code::NOT_FOUND, message: "can't open the kernel: gone".into() });
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else { panic!("not a status") };
        assert_eq!(status.code(), Code::NOT_FOUND);
    }

    #[test]
    fn text_of_the_guest_is_cut_and_cleaned() {
        assert_eq!(untrusted("  a\nb\x1b[2J ", 100), "a b [2J");
        assert_eq!(untrusted("äää", 4), "ää…");
    }
}
