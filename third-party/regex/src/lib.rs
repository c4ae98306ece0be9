//! What dependencies of ours find when they ask for `regex`.
//!
//! `oci-spec` checks one field with it, which is a list of numbers. The tables of Unicode that come along are data with addresses in
//! it: the loader writes to all of them, which was a fifth of a mebibyte of every shim's own memory.

pub use regex_lite::*;
