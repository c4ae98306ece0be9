//! Boots a kernel and an image under `bulkhead-vmm` over the control protocol, and tells what it cost.
//!
//! `boot --vmm PROGRAM --kernel FILE [--disk FILE]... [--writable FILE]... [--vcpus N] [--memory MIB] [--cmdline TEXT]
//! [--limit SECONDS]`. The guest's console goes to standard output. The exit code is 0 when the guest powered itself
//! off.

mod support;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bulkhead_vmm_protocol::{BlockConfig, Channel, Event, ExitReason, FdIndex, FromVmm, Request, VmConfig};

use support::{millis, prepare, spawn};

struct Options {
    vmm: String,
    kernel: String,
    disks: Vec<(String, bool)>,
    vcpus: u8,
    memory: u32,
    cmdline: String,
    limit: u64,
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let options = parse()?;
    let begin = Instant::now();
    let (ours, theirs) = Channel::pair()?;
    let mut vmm = spawn(&options.vmm, theirs)?;

    prepare(&ours, (options.vcpus, options.memory), None)?;

    let (mut console, console_end) = std::io::pipe()?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut pass = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(fds.len() as u8 - 1)
    };
    let kernel = pass(File::open(&options.kernel)?.into());
    let config = VmConfig {
        console: Some(pass(console_end.into())),
        disks: options
            .disks
            .iter()
            .map(|(path, read_only)| {
                let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
                Ok(BlockConfig { file: pass(file.into()), read_only: *read_only, serial: "disk".into() })
            })
            .collect::<Result<_, std::io::Error>>()?,
        ..VmConfig::new(kernel, options.cmdline)
    };
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    ours.set_timeout(Some(Duration::from_secs(options.limit)))?;
    ours.send(&Request::Boot(Box::new(config)), &borrowed)?;
    drop(fds);
    match ours.receive::<FromVmm>()?.message {
        FromVmm::Reply(Ok(())) => eprintln!("boot: started after {:.1} ms", millis(begin)),
        other => return Err(format!("boot refused: {other:?}").into()),
    }

    let printer = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut last = 0.0;
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            last = millis(begin);
            let _ = std::io::stdout().write_all(&buffer[..count]);
        }
        last
    });
    let pid = vmm.id();
    let watcher = std::thread::spawn(move || {
        let mut most = 0;
        while let Some(own) = own_rss(pid) {
            most = most.max(own);
            std::thread::sleep(Duration::from_millis(50));
        }
        most
    });
    let event = ours.receive::<FromVmm>()?.message;
    eprintln!("boot: {event:?} after {:.1} ms", millis(begin));
    let status = vmm.wait()?;
    eprintln!("boot: the VMM ended ({status}) after {:.1} ms", millis(begin));
    if let Ok(last) = printer.join() {
        eprintln!("boot: the last output came after {last:.1} ms");
    }
    if let Ok(rss) = watcher.join() {
        eprintln!("boot: the VMM's own memory was {rss} KiB at most");
    }
    let good = event == FromVmm::Event(Event::Exited(ExitReason::PowerOff)) && status.success();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Resident memory of a VMM in KiB, without the guest's: mappings of more than 32 MiB are guest memory.
fn own_rss(pid: u32) -> Option<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    if smaps.is_empty() {
        return None;
    }
    let (mut size, mut own) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next().and_then(|word| word.parse::<u64>().ok()));
        match (name, value) {
            (Some("Size:"), Some(value)) => size = value,
            (Some("Rss:"), Some(value)) if size < 32 << 10 => own += value,
            _ => {}
        }
    }
    Some(own)
}

fn parse() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        vmm: String::new(),
        kernel: String::new(),
        disks: Vec::new(),
        vcpus: 1,
        memory: 128,
        cmdline: String::new(),
        limit: 600,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--vmm" => options.vmm = value,
            "--kernel" => options.kernel = value,
            "--disk" => options.disks.push((value, true)),
            "--writable" => options.disks.push((value, false)),
            "--vcpus" => options.vcpus = value.parse()?,
            "--memory" => options.memory = value.parse()?,
            "--cmdline" => options.cmdline = value,
            "--limit" => options.limit = value.parse()?,
            _ => return Err(format!("{name} is not an option").into()),
        }
    }
    Ok(options)
}
