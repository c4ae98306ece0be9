//! Makes a template of a kernel and an image whose agent serves the agent protocol, starts machines from it, and tells
//! how long each took.
//!
//! `template --vmm PROGRAM --kernel FILE --disk FILE [--vcpus N] [--memory MIB] [--times N] --directory DIR`

mod support;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use bulkhead_vmm_protocol::{
    BlockConfig, Channel, FdIndex, FromVmm, FsConfig, GuestStream, MemorySource, Request, RestoreConfig,
    VmConfig, VsockConfig,
};
use support::{MemoryFile, millis, prepare, spawn};

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);
/// The port that the agent dials.
const AGENT_PORT: u32 = 1024;
const CMDLINE: &str = "root=/dev/vda rootfstype=erofs ro init=/bulkhead-agent quiet";

struct Options {
    vmm: String,
    kernel: String,
    disk: String,
    vcpus: u8,
    memory: u32,
    times: u32,
    directory: String,
}

/// A machine and what belongs to it on this side.
struct Vm {
    process: Child,
    control: Channel,
    agent: UnixStream,
    _file_server: OwnedFd,
    console: std::io::PipeReader,
}

enum Start {
    Template,
    Restore,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = parse()?;
    let begin = Instant::now();
    let mut vm = start(&options, &Start::Template, begin)?;
    ready(&mut vm.agent)?;
    eprintln!("template: booted to the agent's answer in {:.2} ms", millis(begin));
    let begin = Instant::now();
    let state = File::create(format!("{}/state", options.directory))?;
    vm.control.send(&Request::Save, &[state.as_fd()])?;
    expect_reply(&vm)?;
    eprintln!("template: saved in {:.2} ms, state of {} bytes", millis(begin), state.metadata()?.len());
    end(vm)?;

    for _ in 0..options.times {
        let begin = Instant::now();
        let mut vm = start(&options, &Start::Restore, begin)?;
        let first = ready(&mut vm.agent);
        eprintln!("template: restored to the agent's answer in {:.2} ms: {first:?}", millis(begin));
        let begin = Instant::now();
        let again = ready(&mut vm.agent);
        eprintln!("template: the next answer took {:.2} ms: {again:?}", millis(begin));
        let pid = vm.process.id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        for name in ["Rss:", "Pss:", "Anonymous:"] {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap_or("-");
            eprintln!("template:   {line}");
        }
        let failed = first.is_err() || again.is_err();
        end(vm)?;
        if failed {
            return Err("a restored machine does not answer".into());
        }
    }
    Ok(())
}

fn start(options: &Options, start: &Start, begin: Instant) -> Result<Vm, Box<dyn Error>> {
    let (control, theirs) = Channel::pair()?;
    let process = spawn(&options.vmm, theirs)?;
    let path = format!("{}/memory", options.directory);
    let memory: MemoryFile = match start {
        Start::Template => {
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
            file.set_len(u64::from(options.memory) << 20)?;
            (MemorySource::Shared, file)
        }
        Start::Restore => (MemorySource::Private, File::open(path)?),
    };
    prepare(&control, (options.vcpus, options.memory), Some(memory))?;
    eprintln!("template:   prepared after {:.2} ms", millis(begin));
    let (console, console_end) = std::io::pipe()?;
    let (agent, agent_end) = UnixStream::pair()?;
    agent.set_read_timeout(Some(LIMIT))?;
    let (file_server, file_server_end) = Channel::pair()?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut pass = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(fds.len() as u8 - 1)
    };
    let config = VmConfig {
        kernel: pass(File::open(&options.kernel)?.into()),
        cmdline: CMDLINE.to_owned(),
        console: Some(pass(console_end.into())),
        disks: vec![BlockConfig {
            file: pass(File::open(&options.disk)?.into()),
            read_only: true,
            serial: "guest-image".into(),
        }],
        fs: vec![FsConfig { server: pass(file_server_end.into()), tag: "shared".into() }],
        vsock: VsockConfig {
            guest_cid: 3,
            guest_streams: vec![GuestStream { port: AGENT_PORT, stream: pass(agent_end.into()) }],
        },
    };
    let request = match start {
        Start::Template => Request::Boot(Box::new(config)),
        Start::Restore => {
            let state = pass(File::open(format!("{}/state", options.directory))?.into());
            Request::Restore(Box::new(RestoreConfig { config, state }))
        }
    };
    control.set_timeout(Some(LIMIT))?;
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    control.send(&request, &borrowed)?;
    let vm = Vm { process, control, agent, _file_server: file_server.into(), console };
    eprintln!("template:   request sent after {:.2} ms", millis(begin));
    expect_reply(&vm)?;
    eprintln!("template:   reply after {:.2} ms", millis(begin));
    Ok(vm)
}

fn expect_reply(vm: &Vm) -> Result<(), Box<dyn Error>> {
    match vm.control.receive::<FromVmm>()?.message {
        FromVmm::Reply(result) => Ok(result?),
        FromVmm::Event(event) => Err(format!("{event:?} instead of a reply").into()),
    }
}

/// Closes a machine's control socket, which ends it.
fn end(vm: Vm) -> Result<(), Box<dyn Error>> {
    let Vm { mut process, control, mut console, .. } = vm;
    drop(control);
    let status = process.wait()?;
    let mut output = String::new();
    console.read_to_string(&mut output)?;
    if !status.success() || !output.is_empty() {
        eprintln!("template: the VMM ended ({status}); the guest had printed: {output}");
    }
    Ok(())
}

/// Asks the agent `Ready` (a ttrpc request frame) and waits for the answer; returns its length in bytes.
fn ready(agent: &mut UnixStream) -> Result<usize, std::io::Error> {
    let mut request = Vec::new();
    for (field, text) in [(1, "bulkhead.agent.v1.Agent"), (2, "Ready")] {
        request.extend([field << 3 | 2, text.len() as u8]);
        request.extend(text.bytes());
    }
    let mut frame = (request.len() as u32).to_be_bytes().to_vec();
    static STREAM: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    let stream = STREAM.fetch_add(2, std::sync::atomic::Ordering::Relaxed);
    frame.extend(stream.to_be_bytes());
    frame.extend([1, 0]);
    frame.extend(request);
    agent.write_all(&frame)?;
    let mut header = [0; 10];
    agent.read_exact(&mut header)?;
    let [a, b, c, d, ..] = header;
    let mut answer = vec![0; u32::from_be_bytes([a, b, c, d]).min(1 << 20) as usize];
    agent.read_exact(&mut answer)?;
    Ok(answer.len())
}

fn parse() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        vmm: String::new(),
        kernel: String::new(),
        disk: String::new(),
        vcpus: 1,
        memory: 256,
        times: 3,
        directory: String::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--vmm" => options.vmm = value,
            "--kernel" => options.kernel = value,
            "--disk" => options.disk = value,
            "--vcpus" => options.vcpus = value.parse()?,
            "--memory" => options.memory = value.parse()?,
            "--times" => options.times = value.parse()?,
            "--directory" => options.directory = value,
            _ => return Err(format!("{name} is not an option").into()),
        }
    }
    Ok(options)
}
