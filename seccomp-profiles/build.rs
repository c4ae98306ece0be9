//! Compiles each profile into a BPF program, as raw bytes in `OUT_DIR`.

#[path = "build/format.rs"]
mod format;

use std::error::Error;
use std::path::Path;
use std::{env, fs};

use bulkhead_base::chain;
use bulkhead_seccomp_compiler::compile;

/// File name without `.json`; the one key inside each file is the same name.
const PROFILES: [&str; 6] =
    ["vmm-control", "vmm-template", "vmm-device", "vmm-storage", "vmm-vcpu", "fs-server"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    let out = env::var("OUT_DIR")?;
    for name in PROFILES {
        let file = format!("{name}.json");
        println!("cargo::rerun-if-changed={file}");
        let bytes = program(&file, name).map_err(|error| format!("{file}: {}", chain(&*error)))?;
        fs::write(Path::new(&out).join(format!("{name}.bpf")), bytes)?;
    }
    Ok(())
}

fn program(file: &str, name: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    let program = compile(&format::parse(&fs::read_to_string(file)?, name)?);
    if program.len() > libc::BPF_MAXINSNS as usize {
        return Err(format!("{} instructions; the kernel takes {}", program.len(), libc::BPF_MAXINSNS).into());
    }
    // struct sock_filter { __u16 code; __u8 jt; __u8 jf; __u32 k; }
    let bytes = program.iter().flat_map(|insn| {
        let [code0, code1] = insn.code.to_le_bytes();
        let [k0, k1, k2, k3] = insn.k.to_le_bytes();
        [code0, code1, insn.jt, insn.jf, k0, k1, k2, k3]
    });
    Ok(bytes.collect())
}
