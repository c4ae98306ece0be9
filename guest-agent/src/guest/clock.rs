//! The guest's clock, which the host knows the time for.

use std::io;

use crate::sys::check;

const SECOND: i64 = 1_000_000_000;

/// How far off the clock may be and still be led back by running faster or slower, so that it never goes back: with the kernel's
/// 500 ppm that takes three minutes at most.
const SLEWED: i64 = SECOND / 10;

/// Sets the clock.
pub(crate) fn set(realtime_ns: i64) -> io::Result<()> {
    let time = libc::timespec { tv_sec: realtime_ns / SECOND, tv_nsec: realtime_ns % SECOND };
    // SAFETY: the time is valid and outlives the call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) }.into()).map(drop)
}

/// Makes a clock that runs go by what the host's says now.
pub(crate) fn follow(realtime_ns: i64) -> io::Result<()> {
    let behind = realtime_ns.saturating_sub(now()?);
    if behind.saturating_abs() >= SLEWED {
        log::info!("the clock is set: it is {} ms off the node's", behind / 1_000_000);
        // What is left of an older correction would come on top.
        return slew(0).and_then(|()| set(realtime_ns));
    }
    slew(behind / 1000)
}

fn now() -> io::Result<i64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is a valid place for a time.
    check(unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut time) }.into())?;
    Ok(time.tv_sec.saturating_mul(SECOND).saturating_add(time.tv_nsec))
}

/// Lets the clock run faster or slower until so many microseconds are made up for; replaces what was asked for before.
fn slew(microseconds: i64) -> io::Result<()> {
    // SAFETY: `timex` is plain data, for which zeros are valid.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = microseconds;
    // SAFETY: the structure outlives the call.
    check(unsafe { libc::adjtimex(&raw mut change) }.into()).map(drop)
}
