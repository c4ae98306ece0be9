//! System calls: the cheapest one, fork and exec, page faults, switching between processes.

use std::ffi::{CStr, CString};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::time::{Duration, Instant};

use super::{Samples, WorkloadError, files, step};

/// Samples of each quantity.
const SAMPLES: usize = 5;
const GETPPID_CALLS: u32 = 2000;
const FAULT_PAGES: usize = 512;
const PAGE: usize = 4096;
const ROUND_TRIPS: u32 = 100;

/// Measures them all.
pub(crate) fn measure(samples: &mut Samples<'_>) -> Result<(), WorkloadError> {
    let own = std::env::current_exe().unwrap_or_else(|_| files::PROGRAM.into());
    let own = CString::new(own.into_os_string().into_encoded_bytes())
        .map_err(|error| step("name this program")(error.into()))?;
    for _ in 0..SAMPLES {
        samples.add("syscall-getppid", "ns", nanoseconds(getppid(), GETPPID_CALLS))?;
    }
    for _ in 0..SAMPLES {
        let elapsed = fork_exec(&own, c"exit").map_err(step("fork and exec"))?;
        samples.add("syscall-fork-exec", "us", elapsed.as_secs_f64() * 1e6)?;
    }
    for _ in 0..SAMPLES {
        let elapsed = page_faults().map_err(step("map memory"))?;
        samples.add("syscall-page-fault", "ns", nanoseconds(elapsed, FAULT_PAGES as u32))?;
    }
    for elapsed in context_switches().map_err(step("pass a byte around"))? {
        samples.add("syscall-context-switch", "ns", nanoseconds(elapsed, 2 * ROUND_TRIPS))?;
    }
    Ok(())
}

fn nanoseconds(elapsed: Duration, times: u32) -> f64 {
    elapsed.as_secs_f64() * 1e9 / f64::from(times)
}

fn getppid() -> Duration {
    let started = Instant::now();
    for _ in 0..GETPPID_CALLS {
        std::hint::black_box(nix::unistd::getppid());
    }
    started.elapsed()
}

/// A whole process: fork, exec of `program` with one argument, exit, wait.
fn fork_exec(program: &CStr, argument: &CStr) -> io::Result<Duration> {
    let arguments = [program.as_ptr(), argument.as_ptr(), std::ptr::null()];
    let started = Instant::now();
    // SAFETY: this process has one thread, so the child may go on as if it had been started on its own; it only calls execv, with
    // a terminated string and a terminated array of such, and _exit.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::execv(program.as_ptr(), arguments.as_ptr());
            libc::_exit(127);
        }
        child
    };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    match wait(child)? {
        0 => Ok(started.elapsed()),
        status => Err(io::Error::other(format!("the child ended with wait status {status}"))),
    }
}

fn wait(child: libc::pid_t) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the pointer is to a local integer.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
        Ok(status)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The first write to each page of fresh anonymous memory.
fn page_faults() -> io::Result<Duration> {
    let length = FAULT_PAGES * PAGE;
    // SAFETY: a new private mapping, at an address of the kernel's choice.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // A huge page would make one fault of all.
    // SAFETY: the range is the mapping just made. A kernel without huge pages refuses, which is as good.
    unsafe { libc::madvise(memory, length, libc::MADV_NOHUGEPAGE) };
    let started = Instant::now();
    for page in 0..FAULT_PAGES {
        // SAFETY: within the writable mapping, which nobody else knows.
        unsafe { memory.cast::<u8>().add(page * PAGE).write_volatile(1) };
    }
    let elapsed = started.elapsed();
    // SAFETY: the whole mapping, to which no reference is left.
    unsafe { libc::munmap(memory, length) };
    Ok(elapsed)
}

/// A byte back and forth between two processes on one CPU; the time of all round trips, once for each sample.
fn context_switches() -> io::Result<Vec<Duration>> {
    pin_to_one_cpu()?;
    let (mut from_child, mut to_parent) = io::pipe()?;
    let (mut from_parent, mut to_child) = io::pipe()?;
    // SAFETY: this process has one thread, so the child may go on as if it had been started on its own.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // The write end that the child holds itself would keep its own input open for ever.
        drop(to_child);
        echo(&mut from_parent, &mut to_parent);
        // SAFETY: ends the child without running anything else of its parent's.
        unsafe { libc::_exit(0) };
    }
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let times = (0..SAMPLES).map(|_| round_trips(&mut from_child, &mut to_child)).collect();
    drop(to_child);
    wait(child)?;
    times
}

fn echo(input: &mut PipeReader, output: &mut PipeWriter) {
    let mut byte = [0];
    while input.read_exact(&mut byte).and_then(|()| output.write_all(&byte)).is_ok() {}
}

fn round_trips(input: &mut PipeReader, output: &mut PipeWriter) -> io::Result<Duration> {
    let mut byte = [0];
    let started = Instant::now();
    for _ in 0..ROUND_TRIPS {
        output.write_all(&byte)?;
        input.read_exact(&mut byte)?;
    }
    Ok(started.elapsed())
}

/// Keeps this process and its children on the first CPU that it may use.
fn pin_to_one_cpu() -> io::Result<()> {
    let this = nix::unistd::Pid::from_raw(0);
    let allowed = nix::sched::sched_getaffinity(this)?;
    let first = (0..nix::sched::CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = nix::sched::CpuSet::new();
    one.set(first.unwrap_or(0))?;
    Ok(nix::sched::sched_setaffinity(this, &one)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_faults_take_time() {
        assert!(getppid() > Duration::ZERO);
        assert!(page_faults().unwrap() > Duration::ZERO);
    }

    #[test]
    fn a_failing_child_is_no_sample() {
        assert!(fork_exec(c"/bin/true", c"").unwrap() > Duration::ZERO);
        assert!(fork_exec(c"/bin/false", c"").is_err());
        assert!(fork_exec(c"/nonexistent/program", c"").is_err());
    }

    #[test]
    fn bytes_go_around() {
        let (mut input, mut output) = io::pipe().unwrap();
        let (mut back, mut answer) = io::pipe().unwrap();
        let thread = std::thread::spawn(move || echo(&mut input, &mut answer));
        assert!(round_trips(&mut back, &mut output).unwrap() > Duration::ZERO);
        drop(output);
        thread.join().unwrap();
    }
}
