//! What the tests of the real program share: starting it, and guests of a few instructions.

#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub(crate) mod guest;
pub(crate) mod process;
pub(crate) mod program;
