//! Bulkhead's containerd shim.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_shim::cli::main()
}
