//! Virtio console (virtio 1.2, section 5.3), output only: what the guest prints goes to a descriptor of the host.
//!
//! A slow, full or closed descriptor never holds anything up: what can't be written at once is dropped and counted. The
//! rate is limited too, since whoever reads the other end pays for every byte.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use serde::{Deserialize, Serialize};

use super::chain::IoFault;
use super::{
    Activated, BackendState, Chain, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo, DeviceKind, Progress,
    StateFault, VirtioDevice,
};

/// Queue of buffers for input, which never comes.
const RECEIVE: usize = 0;
/// Queue of output.
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 64;

/// Bytes that may be printed at once.
const BURST: u64 = 256 * 1024;
/// Bytes a second in the long run.
const RATE: u64 = 64 * 1024;
/// The most bytes in all when the output is a regular file.
const FILE_LIMIT: u64 = 4 << 20;

/// What has become of the guest's output: plain data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Bytes written to the host.
    pub written: u64,
    /// Bytes dropped.
    pub dropped: u64,
}

/// The console device.
#[derive(Debug)]
pub struct Console {
    output: Option<OwnedFd>,
    /// Bytes that may still be written, ever.
    file_room: u64,
    /// Bytes that may be written now, and when that was last worked out.
    tokens: u64,
    refilled: Instant,
    state: ConsoleState,
    warned: bool,
}

impl Console {
    /// A console that prints to `output`, or nowhere. The descriptor becomes non-blocking.
    pub fn new(output: Option<OwnedFd>) -> io::Result<Self> {
        let mut file_room = u64::MAX;
        if let Some(output) = &output {
            set_nonblocking(output)?;
            if is_regular_file(output)? {
                file_room = FILE_LIMIT;
            }
        }
        Ok(Console {
            output,
            file_room,
            tokens: BURST,
            refilled: Instant::now(),
            state: ConsoleState::default(),
            warned: false,
        })
    }

    fn refill(&mut self) {
        let elapsed = self.refilled.elapsed();
        if elapsed > Duration::from_millis(10) {
            let new = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).saturating_mul(RATE) / 1000;
            self.tokens = self.tokens.saturating_add(new).min(BURST);
            self.refilled = Instant::now();
        }
    }

    /// Prints a chain as far as the host takes it at once.
    fn print(&mut self, chain: &Chain) -> Result<u32, DeviceFault> {
        self.refill();
        let mut reader = chain.reader();
        let mut room = self.tokens.min(self.file_room);
        while let Some(output) = &self.output
            && room > 0
            && reader.remaining() > 0
        {
            let limit = usize::try_from(room).unwrap_or(usize::MAX);
            match reader.write_to(output.as_fd(), limit, None) {
                Ok(0) => break,
                Ok(done) => {
                    room -= done as u64;
                    self.tokens -= done as u64;
                    self.file_room -= done as u64;
                    self.state.written = self.state.written.saturating_add(done as u64);
                }
                Err(IoFault::Host(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(IoFault::Host(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(IoFault::Host(error)) => {
                    warn!("console output ends here: {error}");
                    self.output = None;
                }
                Err(IoFault::Memory(fault)) => return Err(fault.into()),
            }
        }
        if self.output.is_some() && reader.remaining() > 0 {
            self.state.dropped = self.state.dropped.saturating_add(reader.remaining() as u64);
            if !std::mem::replace(&mut self.warned, true) {
                warn!("console output is dropped: the guest prints faster than it is read or allowed to");
            }
        }
        Ok(0)
    }
}

impl VirtioDevice for Console {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::Console,
            features: 0,
            required: 0,
            queue_sizes: vec![QUEUE_SIZE, QUEUE_SIZE],
            config: Arc::new(ConfigSpace::default()),
        }
    }

    fn save(&self) -> Result<BackendState, &'static str> {
        Ok(BackendState::Console(self.state))
    }

    fn restore(&mut self, state: BackendState) -> Result<(), StateFault> {
        let BackendState::Console(state) = state else {
            return Err(StateFault::Impossible("it is not a console's"));
        };
        self.state = state;
        Ok(())
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        _events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        match queue {
            TRANSMIT => active.queues[TRANSMIT].serve(|chain| self.print(chain)),
            // Input buffers stay where they are.
            RECEIVE.. => Ok(Progress::Done),
        }
    }
}

/// Makes reads and writes of a descriptor return instead of waiting.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: fcntl with F_GETFL has no memory arguments.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above, with an integer argument.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_regular_file(fd: &OwnedFd) -> io::Result<bool> {
    let file = std::fs::File::from(fd.try_clone()?);
    Ok(file.metadata()?.is_file())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use vmm_sys_util::tempfile::TempFile;

    use super::super::testing::{BUFFERS, TestDriver, readable, writable};
    use super::*;

    fn piped() -> (TestDriver, std::io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let console = Console::new(Some(writer.into())).unwrap();
        (TestDriver::activated(Box::new(console), 0), reader)
    }

    #[test]
    fn output_arrives_in_order() {
        let (mut driver, mut reader) = piped();
        driver.write_bytes(BUFFERS, b"hello, world");
        assert_eq!(driver.request(1, &[readable(BUFFERS, 7), readable(BUFFERS + 7, 5)]), Some(0));
        let mut text = [0; 12];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello, world");
        assert!(driver.interrupts() > 0);
    }

    #[test]
    fn a_reader_that_does_not_read_holds_nothing_up() {
        let (mut driver, _reader) = piped();
        for _ in 0..64 {
            assert_eq!(driver.request(1, &[readable(BUFFERS, 65536)]), Some(0));
        }
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_reader_that_is_gone_ends_the_output_only() {
        let (mut driver, reader) = piped();
        drop(reader);
        for _ in 0..3 {
            assert_eq!(driver.request(1, &[readable(BUFFERS, 100)]), Some(0));
        }
    }

    #[test]
    fn input_buffers_are_kept() {
        let (mut driver, _reader) = piped();
        assert_eq!(driver.request(0, &[writable(BUFFERS, 100)]), None);
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_flood_is_cut_and_a_file_does_not_grow_without_bound() {
        let file = TempFile::new().unwrap();
        let mut console = Console::new(Some(file.as_file().try_clone().unwrap().into())).unwrap();
        console.file_room = BURST + 10;
        let mut driver = TestDriver::activated(Box::new(console), 0);
        for _ in 0..10 {
            assert_eq!(driver.request(1, &[readable(BUFFERS, 65536)]), Some(0));
        }
        let length = file.as_file().metadata().unwrap().len();
        assert!((BURST..BURST + 65536).contains(&length), "{length} bytes");
    }
}
