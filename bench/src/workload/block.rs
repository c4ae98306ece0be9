//! A block volume: random reads and writes of 4 KiB, one at a time and 32 at a time, past the page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::zeroed;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Samples, WorkloadError, step};

/// Bytes of one transfer, and its alignment.
const BLOCK: usize = 4096;
const DEPTHS: [usize; 2] = [1, 32];
/// Transfers in one sample.
const TRANSFERS: usize = 512;
const SAMPLES: usize = 3;

/// `IOCB_CMD_PREAD` and `IOCB_CMD_PWRITE` of the kernel's aio interface.
#[derive(Clone, Copy)]
enum Direction {
    Read = 0,
    Write = 1,
}

/// Measures the volume at `path`, overwriting it.
pub(crate) fn measure(samples: &mut Samples<'_>, path: &Path) -> Result<(), WorkloadError> {
    let volume = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(step(format!("open {}", path.display())))?;
    let blocks = blocks_of(&volume).map_err(step("find the volume's size"))?;
    for (name, direction) in [("read", Direction::Read), ("write", Direction::Write)] {
        for depth in DEPTHS {
            for _ in 0..SAMPLES {
                let elapsed = transfer(&volume, blocks, direction, depth)
                    .map_err(step(format!("{name} at depth {depth}")))?;
                let rate = TRANSFERS as f64 / elapsed.as_secs_f64();
                samples.add(&format!("block-{name}-depth-{depth}"), "op/s", rate)?;
            }
        }
    }
    Ok(())
}

fn blocks_of(volume: &File) -> io::Result<u64> {
    use std::io::Seek;
    let mut volume = volume;
    let blocks = volume.seek(io::SeekFrom::End(0))? / BLOCK as u64;
    if blocks == 0 { Err(io::Error::other("it is smaller than a block")) } else { Ok(blocks) }
}

/// The kernel's aio control block (`struct iocb`), little-endian.
#[repr(C)]
struct ControlBlock {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_descriptor: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// An aio context, destroyed when dropped.
struct Context(libc::c_ulong);

impl Context {
    fn new(depth: usize) -> io::Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup writes the context's handle to the local integer.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, depth as libc::c_uint, &raw mut context) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(context)) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context came from io_setup and is destroyed once. It waits for transfers that are under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

#[repr(C, align(4096))]
struct Buffer([u8; BLOCK]);

/// Makes [`TRANSFERS`] transfers, `depth` of them at any time.
fn transfer(volume: &File, blocks: u64, direction: Direction, depth: usize) -> io::Result<Duration> {
    let mut places = Places(0x9e37_79b9_7f4a_7c15);
    // Buffers and control blocks have to stay where they are until the context is gone: it is dropped first.
    let mut buffers: Vec<Buffer> = (0..depth).map(|_| Buffer([0x5a; BLOCK])).collect();
    let mut requests: Vec<ControlBlock> = Vec::with_capacity(depth);
    for (slot, buffer) in buffers.iter_mut().enumerate() {
        // SAFETY: plain integers, for which zero is a value.
        let mut request: ControlBlock = unsafe { zeroed() };
        request.data = slot as u64;
        request.opcode = direction as u16;
        request.descriptor = volume.as_raw_fd() as u32;
        request.buffer = buffer.0.as_mut_ptr() as u64;
        request.bytes = BLOCK as u64;
        requests.push(request);
    }
    let context = Context::new(depth)?;
    let started = Instant::now();
    let mut submitted = 0;
    for request in &mut requests {
        request.offset = places.next(blocks);
        submit(&context, request)?;
        submitted += 1;
    }
    let mut completed = 0;
    while completed < submitted {
        // SAFETY: plain integers, for which zero is a value.
        let mut events: [Event; 32] = unsafe { zeroed() };
        for event in wait(&context, &mut events[..depth.min(32)])? {
            match event.result {
                transferred if transferred == BLOCK as i64 => {}
                error if error < 0 => return Err(io::Error::from_raw_os_error(-error as i32)),
                short => return Err(io::Error::other(format!("only {short} bytes were transferred"))),
            }
            completed += 1;
            if submitted < TRANSFERS
                && let Some(request) = requests.get_mut(event.data as usize)
            {
                request.offset = places.next(blocks);
                submit(&context, request)?;
                submitted += 1;
            }
        }
    }
    Ok(started.elapsed())
}

fn submit(context: &Context, request: &mut ControlBlock) -> io::Result<()> {
    let mut list = [std::ptr::from_mut(request)];
    // SAFETY: one pointer to a valid control block, whose buffer is large enough and outlives the context.
    let result = unsafe { libc::syscall(libc::SYS_io_submit, context.0, 1_i64, list.as_mut_ptr()) };
    match result {
        1 => Ok(()),
        error if error < 0 => Err(io::Error::last_os_error()),
        other => Err(io::Error::other(format!("{other} of 1 transfer accepted"))),
    }
}

fn wait<'a>(context: &Context, events: &'a mut [Event]) -> io::Result<&'a [Event]> {
    // SAFETY: the kernel writes at most as many events as the slice has.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context.0,
            1_i64,
            events.len() as i64,
            events.as_mut_ptr(),
            std::ptr::null_mut::<libc::timespec>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(&events[..result as usize]) }
}

/// The same pseudo-random blocks in each run (xorshift).
struct Places(u64);

impl Places {
    /// The next block's offset in bytes.
    fn next(&mut self, blocks: u64) -> i64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % blocks * BLOCK as u64) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_serves_as_a_volume() {
        // Not in the temporary directory: tmpfs refuses O_DIRECT on older kernels.
        let path = std::env::current_dir().unwrap().join(format!("block-test-{}", std::process::id()));
        std::fs::write(&path, vec![0; 64 * BLOCK]).unwrap();
        let mut printed = Vec::new();
        let result = measure(&mut Samples { out: &mut printed }, &path);
        let content = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        result.unwrap();
        let printed = String::from_utf8(printed).unwrap();
        assert_eq!(printed.lines().count(), 2 * DEPTHS.len() * SAMPLES, "{printed}");
        assert!(content.contains(&0x5a), "nothing was written");
        assert_eq!(content.len(), 64 * BLOCK);
    }

    #[test]
    fn an_empty_volume_is_refused() {
        let path = std::env::current_dir().unwrap().join(format!("block-empty-{}", std::process::id()));
        std::fs::write(&path, b"").unwrap();
        let result = measure(&mut Samples { out: &mut Vec::new() }, &path);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(result, Err(WorkloadError::Step { .. })));
    }

    #[test]
    fn places_stay_on_the_volume() {
        let mut places = Places(1);
        for _ in 0..1000 {
            let place = places.next(7);
            assert!((0..7 * BLOCK as i64).contains(&place) && place % BLOCK as i64 == 0);
        }
    }
}
