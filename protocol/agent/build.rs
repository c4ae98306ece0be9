//! Generates the messages and the asynchronous ttrpc service from `proto/agent.proto`.

use std::path::PathBuf;
use std::{env, fs};

use ttrpc_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;

    // Generated files open with inner attributes, which an `include!` inside a module can't have.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(name);
        let lines: Vec<String> = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .map(str::to_owned)
            .collect();
        fs::write(&path, lines.join("\n"))?;
    }
    Ok(())
}
