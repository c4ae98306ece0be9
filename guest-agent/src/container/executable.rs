//! Finding the program of a process, and executing it.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::sys::{c_path, check};

/// The program can't be executed. The wording is that of other OCI runtimes: tools look for it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum ExecutableError {
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    #[error("exec: {0:?}: stat {0}: no such file or directory")]
    NoSuchFile(String),
    #[error("exec: {0:?}: stat {0}: not a directory")]
    NotADirectory(String),
    #[error("exec: {0:?}: is a directory")]
    Directory(String),
    #[error("exec: {0:?}: permission denied")]
    PermissionDenied(String),
    #[error("exec: {name:?}: {cause}")]
    Other { name: String, cause: io::Error },
}

/// Finds the program `name` for the calling process: in its own `PATH`-like `search_path`, or as the path that it is.
pub(crate) fn find(name: &OsStr, search_path: Option<&OsStr>) -> Result<PathBuf, ExecutableError> {
    let text = || name.to_string_lossy().into_owned();
    if name.as_bytes().contains(&b'/') {
        return check_executable(Path::new(name)).map(|()| name.into()).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::ENOENT) => ExecutableError::NoSuchFile(text()),
                Some(libc::ENOTDIR) => ExecutableError::NotADirectory(text()),
                Some(libc::EISDIR) => ExecutableError::Directory(text()),
                Some(libc::EACCES) => ExecutableError::PermissionDenied(text()),
                _ => ExecutableError::Other { name: text(), cause: error },
            }
        });
    }
    let mut denied = false;
    for directory in search_path.unwrap_or_default().as_bytes().split(|&byte| byte == b':') {
        // An empty element means the working directory.
        let directory = if directory.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(directory) };
        let path = Path::new(directory).join(name);
        match check_executable(&path) {
            Ok(()) => return Ok(path),
            Err(error) => denied |= error.raw_os_error() == Some(libc::EACCES),
        }
    }
    Err(if denied && !name.is_empty() {
        ExecutableError::PermissionDenied(text())
    } else {
        ExecutableError::NotInPath(text())
    })
}

fn check_executable(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    let path = c_path(path)?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) }.into())
        .map(drop)
}

/// Executes a program in the place of the calling process; returns only when that failed, with what other OCI runtimes have the
/// process say then.
pub(crate) fn execute(path: &Path, arguments: &[CString], environment: &[CString]) -> String {
    let failed = |error: io::Error| {
        let reason = match error.raw_os_error() {
            Some(number) => Errno::from_raw(number).desc().to_owned(),
            None => error.to_string(),
        };
        format!("exec {}: {}", path.display(), reason.to_ascii_lowercase())
    };
    let pointers = |list: &[CString]| {
        list.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
    };
    let program = match c_path(path) {
        Ok(program) => program,
        Err(error) => return failed(error),
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: program, arguments and environment are NUL-terminated strings in lists that end with a null pointer.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    failed(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(name: &str, path: &str) -> String {
        find(OsStr::new(name), Some(OsStr::new(path))).unwrap_err().to_string()
    }

    #[test]
    fn programs_are_found() {
        assert_eq!(find(OsStr::new("sh"), Some(OsStr::new("/none:/bin"))).unwrap(), Path::new("/bin/sh"));
        assert_eq!(find(OsStr::new("/bin/sh"), None).unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn failures_read_like_those_of_other_runtimes() {
        assert_eq!(
            error("no-such-thing", "/bin"),
            "exec: \"no-such-thing\": executable file not found in $PATH"
        );
        assert_eq!(error("/no/such", ""), "exec: \"/no/such\": stat /no/such: no such file or directory");
        assert_eq!(
            error("/etc/passwd/x", ""),
            "exec: \"/etc/passwd/x\": stat /etc/passwd/x: not a directory"
        );
        assert_eq!(execute(Path::new("/etc"), &[], &[]), "exec /etc: permission denied");
        assert_eq!(execute(Path::new("/no/such"), &[], &[]), "exec /no/such: no such file or directory");
        assert_eq!(error("/etc/passwd", ""), "exec: \"/etc/passwd\": permission denied");
        assert_eq!(error("passwd", "/etc"), "exec: \"passwd\": permission denied");
        assert_eq!(error("/bin", ""), "exec: \"/bin\": is a directory");
        assert_eq!(error("", "/bin"), "exec: \"\": executable file not found in $PATH");
    }
}
