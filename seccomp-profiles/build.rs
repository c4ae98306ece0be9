//! Compiles each profile into a BPF program, as raw bytes in `OUT_DIR`.

use std::collections::HashMap;
use std::path::Path;
use std::{env, fs};

use seccompiler::{BpfProgram, TargetArch, compile_from_json};

/// File name without `.json`; the one key inside each file is the same name.
const PROFILES: [&str; 5] = ["vmm-control", "vmm-template", "vmm-device", "vmm-vcpu", "fs-server"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = env::var("OUT_DIR")?;
    for name in PROFILES {
        let file = format!("{name}.json");
        println!("cargo::rerun-if-changed={file}");
        let json = fs::read(&file).map_err(|error| format!("can't read {file}: {error}"))?;
        let mut programs: HashMap<String, BpfProgram> =
            compile_from_json(json.as_slice(), TargetArch::x86_64)
                .map_err(|error| format!("{file}: {error}"))?;
        let program = programs.remove(name).ok_or_else(|| format!("{file} has no filter named {name}"))?;
        // struct sock_filter { __u16 code; __u8 jt; __u8 jf; __u32 k; }
        let bytes: Vec<u8> = program
            .iter()
            .flat_map(|insn| {
                let [code0, code1] = insn.code.to_le_bytes();
                let [k0, k1, k2, k3] = insn.k.to_le_bytes();
                [code0, code1, insn.jt, insn.jf, k0, k1, k2, k3]
            })
            .collect();
        fs::write(Path::new(&out).join(format!("{name}.bpf")), bytes)?;
    }
    Ok(())
}
