//! System call filters of containers: the OCI profile becomes a classic BPF program that the kernel runs at every call.
//!
//! [`rules`] reads and checks the profile, the crate `bulkhead_seccomp_compiler` makes the program out of it.

mod rules;

use std::io;

use bulkhead_seccomp_compiler::compile;

use crate::sys::check;

pub(crate) use rules::ProfileError;
pub use rules::{KernelSupport, OciProfile};

/// A program for the kernel, and how it is to be installed.
#[derive(Debug, Clone)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles a profile of the specification.
    pub(crate) fn new(seccomp: &super::spec::Seccomp) -> Result<Self, ProfileError> {
        let OciProfile { profile, flags } = OciProfile::new(seccomp, KernelSupport::detect())?;
        let program = compile(&profile);
        if program.len() > libc::BPF_MAXINSNS as usize {
            return Err(ProfileError::TooLong(program.len()));
        }
        Ok(Self { program, flags })
    }

    /// Length of the program in instructions.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.program.len()
    }

    /// Installs the filter on the calling thread, which has `no_new_privs` set or `CAP_SYS_ADMIN`.
    pub(crate) fn install(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: `program` describes the instructions, which outlive the call; the kernel only reads them.
        check(unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &raw const program)
        })
        .map(drop)
    }
}
