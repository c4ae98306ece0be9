//! A `bulkhead-vmm` process and the shim's end of its control socket.

use std::fs::OpenOptions;
use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bulkhead_vmm_protocol::{
    BlockConfig, CONTROL_FD, Channel, ChannelError, Event, ExitReason, FdIndex, FromVmm, PrepareConfig,
    Refusal, Request, VmConfig,
};

/// How long anything may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A running VMM; killed when dropped.
pub(crate) struct Vmm {
    child: VmmProcess,
    pub control: Channel,
    console: Option<PipeReader>,
}

/// The process alone.
pub(crate) struct VmmProcess(Child);

/// What to boot; descriptors are gathered as they are named.
pub(crate) struct Boot {
    pub prepare: PrepareConfig,
    pub prepare_fds: Vec<OwnedFd>,
    pub config: VmConfig,
    pub fds: Vec<OwnedFd>,
    console: PipeReader,
}

/// Whether this machine has a KVM that we may use. If not, says so where `make test` looks, and on standard error.
pub(crate) fn kvm_or_skip(test: &str) -> bool {
    let error = match open_kvm() {
        Ok(_) => return true,
        Err(error) => error,
    };
    let line = format!("SKIPPED {test}: /dev/kvm can't be opened ({error})\n");
    eprint!("{line}");
    let list = concat!(env!("CARGO_TARGET_TMPDIR"), "/skipped-tests.txt");
    let mut file = OpenOptions::new().create(true).append(true).open(list).unwrap();
    file.write_all(line.as_bytes()).unwrap();
    false
}

fn open_kvm() -> std::io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/kvm")?.into())
}

impl Boot {
    /// One vCPU, 64 MiB, console, entropy device, and the given kernel file's contents.
    pub(crate) fn new(kernel: &[u8]) -> Self {
        let (console, console_end) = std::io::pipe().unwrap();
        let mut boot = Boot {
            prepare: PrepareConfig::anonymous(FdIndex(0), 1, 64),
            prepare_fds: vec![open_kvm().unwrap()],
            config: VmConfig { console: Some(FdIndex(1)), ..VmConfig::new(FdIndex(0), "") },
            fds: Vec::new(),
            console,
        };
        boot.pass(file_with(kernel));
        boot.pass(console_end.into());
        boot
    }

    /// A descriptor that goes with the request to prepare.
    pub(crate) fn pass_first(&mut self, fd: OwnedFd) -> FdIndex {
        self.prepare_fds.push(fd);
        FdIndex(self.prepare_fds.len() as u8 - 1)
    }

    pub(crate) fn pass(&mut self, fd: OwnedFd) -> FdIndex {
        self.fds.push(fd);
        FdIndex(self.fds.len() as u8 - 1)
    }

    /// Adds a disk with the given contents; returns a second handle to it.
    pub(crate) fn disk(&mut self, contents: &[u8], read_only: bool) -> OwnedFd {
        let file = file_with(contents);
        let index = self.pass(file.try_clone().unwrap());
        self.config.disks.push(BlockConfig { file: index, read_only, serial: "test".into() });
        file
    }

    /// Starts a VMM and asks it to boot this.
    pub(crate) fn start(self) -> (Vmm, Result<(), Refusal>) {
        self.start_with(|config| Request::Boot(Box::new(config)))
    }

    /// Starts a VMM and sends it the request made from the configuration.
    pub(crate) fn start_with(self, request: impl FnOnce(VmConfig) -> Request) -> (Vmm, Result<(), Refusal>) {
        let other = std::env::var("BULKHEAD_VMM").ok();
        let mut vmm = Vmm::spawn(other.as_deref().unwrap_or(env!("CARGO_BIN_EXE_bulkhead-vmm")));
        if let Err(refusal) = vmm.prepare(&self.prepare, &self.prepare_fds) {
            return (vmm, Err(refusal));
        }
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        vmm.control.send(&request(self.config), &fds).unwrap();
        vmm.console = Some(self.console);
        let reply = vmm.reply();
        (vmm, reply)
    }

    /// Starts a VMM, boots this, and waits for the end.
    pub(crate) fn run(self) -> (ExitReason, String) {
        let (vmm, reply) = self.start();
        reply.unwrap();
        vmm.wait_for_end()
    }
}

/// An unlinked file.
pub(crate) fn file_with(contents: &[u8]) -> OwnedFd {
    let mut file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
    file.write_all(contents).unwrap();
    file.into()
}

impl Vmm {
    pub(crate) fn spawn(program: &str) -> Self {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.set_timeout(Some(LIMIT)).unwrap();
        let mut command = Command::new(program);
        if is_root() {
            command.args(["--uid", "65534", "--gid", "65534"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).env_clear();
        let fd = theirs.as_raw_fd();
        // SAFETY: dup2 and fcntl are async-signal-safe and have no memory arguments; `theirs` outlives the spawn.
        unsafe {
            command.pre_exec(move || {
                let result = if fd == CONTROL_FD {
                    libc::fcntl(fd, libc::F_SETFD, 0)
                } else {
                    libc::dup2(fd, CONTROL_FD)
                };
                if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        let child = command.spawn().unwrap();
        Vmm { child: VmmProcess(child), control: ours, console: None }
    }

    /// Has it get ready.
    pub(crate) fn prepare(&mut self, config: &PrepareConfig, fds: &[OwnedFd]) -> Result<(), Refusal> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.control.send(&Request::Prepare(config.clone()), &fds).unwrap();
        self.reply()
    }

    /// The answer to the last request.
    pub(crate) fn reply(&mut self) -> Result<(), Refusal> {
        match self.control.receive::<FromVmm>() {
            Ok(packet) => match packet.message {
                FromVmm::Reply(result) => result,
                FromVmm::Event(event) => panic!("{event:?} instead of a reply"),
            },
            Err(error) => panic!("no reply: {error}; the VMM says: {}", self.last_words()),
        }
    }

    /// Waits for the end of the machine and of the process; returns the reason and the console's output.
    pub(crate) fn wait_for_end(mut self) -> (ExitReason, String) {
        let reason = self.event();
        let status = self.wait();
        assert!(status.success(), "{status}");
        let mut output = String::new();
        if let Some(mut console) = self.console.take() {
            console.read_to_string(&mut output).unwrap();
        }
        (reason, output)
    }

    /// The same with the console's output counted only, whether or not an answer to a request comes before.
    pub(crate) fn end_of_machine(mut self) -> (ExitReason, u64) {
        let console = self.console.take();
        // Nobody may have to wait for a reader.
        let drain = std::thread::spawn(move || {
            console.map_or(0, |mut console| std::io::copy(&mut console, &mut std::io::sink()).unwrap_or(0))
        });
        let reason = self.event();
        let status = self.wait();
        assert!(status.success(), "{status}");
        (reason, drain.join().unwrap())
    }

    fn event(&mut self) -> ExitReason {
        loop {
            match self.control.receive::<FromVmm>() {
                Ok(packet) => match packet.message {
                    FromVmm::Event(Event::Exited(reason)) => return reason,
                    FromVmm::Reply(_) => {}
                },
                Err(ChannelError::TimedOut) => panic!("the guest didn't end in time"),
                Err(error) => panic!("no event: {error}; the VMM says: {}", self.last_words()),
            }
        }
    }

    /// Waits for the process to end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Process and control socket apart.
    pub(crate) fn into_parts(self) -> (VmmProcess, Channel) {
        (self.child, self.control)
    }

    fn last_words(&mut self) -> String {
        self.child.last_words()
    }
}

impl VmmProcess {
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "the VMM didn't end in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How the process ended, and its standard error.
    fn last_words(&mut self) -> String {
        // Time to end by itself, so that the status is its own.
        std::thread::sleep(Duration::from_millis(200));
        let _ = self.0.kill();
        let status = self.0.wait().unwrap();
        let mut text = String::new();
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_string(&mut text).unwrap();
        }
        format!("{status}: {text}")
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid can't fail and has no arguments.
    unsafe { libc::geteuid() == 0 }
}
