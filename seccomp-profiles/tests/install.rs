//! The kernel takes the programs and acts by them. Each test locks up a forked child.
#![allow(clippy::expect_used, reason = "a test that can't be set up has failed")]

use std::sync::Barrier;
use std::thread;

use bulkhead_seccomp::Filter;

/// How a child ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    Signal(i32),
}

fn in_child(inside: impl FnOnce() -> i32) -> End {
    let mut status = 0;
    // SAFETY: the child touches nothing that another thread of this test process may hold locked but the allocator,
    // which the C library keeps usable across fork; it ends without running the test harness's handlers. `status` is
    // written before it is read.
    unsafe {
        match libc::fork() {
            0 => libc::_exit(inside()),
            child => assert!(child > 0 && libc::waitpid(child, &raw mut status, 0) == child),
        }
    }
    if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status))
    }
}

fn forbidden_call() {
    // SAFETY: the call takes nothing and changes nothing.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

/// `None` if it does what it is told.
fn mmap(protection: i32) -> Option<i32> {
    // SAFETY: a new mapping, which nobody uses.
    let mapped = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    (mapped == libc::MAP_FAILED).then_some(1)
}

/// `None` if a descriptor can be mapped.
fn mmap_of(descriptor: i32, sharing: i32) -> Option<i32> {
    // SAFETY: a new mapping, which nobody uses.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, sharing, descriptor, 0) };
    (mapped == libc::MAP_FAILED).then_some(1)
}

const FILTERS: [Filter; 6] = [
    Filter::VmmControl,
    Filter::VmmTemplate,
    Filter::VmmDevice,
    Filter::VmmStorage,
    Filter::VmmVcpu,
    Filter::FsServer,
];

#[test]
fn what_is_not_allowed_kills() {
    for filter in FILTERS {
        let end = in_child(|| {
            filter.install().expect("install");
            mmap(libc::PROT_READ).unwrap_or(42)
        });
        assert_eq!(end, End::Exit(42), "{filter:?}");
        let end = in_child(|| {
            filter.install().expect("install");
            forbidden_call();
            0
        });
        assert_eq!(end, End::Signal(libc::SIGSYS), "{filter:?}");
        let end = in_child(|| {
            filter.install().expect("install");
            mmap(libc::PROT_READ | libc::PROT_EXEC).unwrap_or(0)
        });
        assert_eq!(end, End::Signal(libc::SIGSYS), "{filter:?}");
        for sharing in [libc::MAP_SHARED, libc::MAP_PRIVATE, libc::MAP_SHARED | libc::MAP_ANONYMOUS] {
            let end = in_child(|| {
                // SAFETY: the name is a valid C string.
                let descriptor = unsafe { libc::memfd_create(c"mapped".as_ptr(), 0) };
                filter.install().expect("install");
                mmap_of(descriptor, sharing).unwrap_or(0)
            });
            assert_eq!(end, End::Signal(libc::SIGSYS), "{filter:?} {sharing:#x}");
        }
    }
}

#[test]
fn all_threads_are_locked_up_at_once() {
    let end = in_child(|| {
        let barrier = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                barrier.wait();
                forbidden_call();
            });
            barrier.wait();
            Filter::FsServer.install_on_all_threads().expect("install");
            barrier.wait();
        });
        0
    });
    assert_eq!(end, End::Signal(libc::SIGSYS));
}

#[test]
fn a_thread_that_can_not_be_locked_up_is_an_error() {
    let end = in_child(|| {
        let barrier = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                Filter::FsServer.install().expect("install");
                barrier.wait();
                barrier.wait();
            });
            barrier.wait();
            let refused = Filter::FsServer.install_on_all_threads().is_err();
            // Nothing was installed here either.
            forbidden_call();
            // SAFETY: ends the child, whose other thread waits.
            unsafe { libc::_exit(if refused { 42 } else { 1 }) }
        })
    });
    assert_eq!(end, End::Exit(42));
}
