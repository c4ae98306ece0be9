//! What of the file server can be tried without a shared directory: its judgement of requests.

pub mod message;
