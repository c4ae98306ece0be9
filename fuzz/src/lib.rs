//! Fuzz targets.
//!
//! A target is a function that takes bytes and drives the real code with them: whatever they are, it neither panics nor hangs
//! nor breaks what it checks afterwards. [`TARGETS`] lists them. libFuzzer runs each as a program of its own (`fuzz/run.sh`), and
//! an ordinary test of this crate replays what is kept in `fuzz/corpus`.
//!
//! Nothing here sleeps or leaves something behind: an input means the same each time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed check is a finding")]

pub mod devices;
pub mod fuse;
pub mod guest;
pub mod host;
pub mod input;
pub mod machine;
pub mod protocols;
pub mod seccomp;
pub mod specs;

/// A target by its name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target, by the names of their programs and of their folders in the corpus.
pub const TARGETS: &[Target] = &[
    ("blk", devices::blk::run),
    ("console", devices::console::run),
    ("fs-device", devices::fs::run),
    ("net", devices::net::run),
    ("vsock", devices::vsock::run),
    ("fuse", fuse::run),
    ("bus", machine::bus),
    ("kernel", machine::kernel),
    ("state", machine::state),
    ("working-set", machine::working_set),
    ("seccomp", seccomp::run),
    ("filter", specs::filter),
    ("oci", specs::oci),
    ("options", specs::options),
    ("plan", specs::plan),
    ("answers", protocols::answers),
    ("control", protocols::control),
];

/// Makes the program of a target.
#[macro_export]
macro_rules! program {
    ($run:path) => {
        libfuzzer_sys::fuzz_target!(init: $crate::host::prepare(), |data: &[u8]| $run(data));
    };
}
