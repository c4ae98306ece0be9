//! Generates the messages of containerd's API from `proto/containerd.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/containerd.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/containerd.proto")
        .cargo_out_dir("proto")
        .run()?;
    Ok(())
}
