//! Compiles seccomp profiles into classic BPF programs.
//!
//! At the installation of a filter the kernel runs it once for each call number, to remember which calls it always
//! allows, and it runs it at each call that it does not always allow. So a program is made to be short to run: it finds
//! the call's number by bisection. Both users, the filters of our own threads and the agent's for containers, read a
//! format of their own into a [`Profile`]; [`compile`] makes the program out of it.

mod assembler;
mod compiler;
pub mod interpreter;
mod profile;

pub use compiler::compile;
pub use profile::{Action, Architecture, CallRules, Comparison, Condition, Profile, Width, X32_BIT};
