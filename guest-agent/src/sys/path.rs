//! Looking up paths inside a container's root, whose symbolic links must not lead out of it.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::{c_path, check};

/// Symbolic links followed in one look-up before it fails with `ELOOP`, as in the kernel.
const MAX_LINKS: usize = 40;

/// Look-ups that the kernel gives up because of what happens elsewhere are tried this often.
const MAX_ATTEMPTS: usize = 256;

#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

fn openat2(dir: BorrowedFd<'_>, path: &Path, flags: i32, mode: u32, resolve: u64) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { c".".to_owned() } else { c_path(path)? };
    let how = OpenHow { flags: (flags | libc::O_CLOEXEC) as u64, mode: mode.into(), resolve };
    let mut attempts = 0;
    loop {
        attempts += 1;
        // SAFETY: `path` is NUL-terminated and `how` has the kernel's layout; both outlive the call.
        let result = check(unsafe {
            libc::syscall(
                libc::SYS_openat2,
                dir.as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size_of::<OpenHow>(),
            )
        });
        match result {
            // SAFETY: the call returned a new descriptor that nothing else owns.
            Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The kernel does not follow `..` while anything anywhere is being renamed or mounted.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && attempts < MAX_ATTEMPTS => {}
            Err(error) => return Err(error),
        }
    }
}

/// Opens `path` as if `root` were the root directory: absolute links and `..` stay inside.
pub(crate) fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    openat2(root, path, flags, 0, libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS)
}

/// Opens `path` below `dir`, refusing symbolic links and other mounts on the way.
pub(crate) fn open_beneath(dir: BorrowedFd<'_>, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    openat2(dir, path, flags, 0, libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_XDEV)
}

/// Opens a directory as a handle for look-ups.
pub(crate) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    open_at(libc::AT_FDCWD, &path, libc::O_PATH | libc::O_DIRECTORY, 0)
}

fn open_at(dir: RawFd, name: &CString, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    super::retry(|| {
        // SAFETY: `name` is NUL-terminated and outlives the call.
        let fd = check(unsafe { libc::openat(dir, name.as_ptr(), flags | libc::O_CLOEXEC, mode) }.into())?;
        // SAFETY: the call returned a new descriptor that nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    })
}

/// What [`create_in_root`] makes when the last component is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// Looks `path` up inside `root` and creates what is missing of it: directories with mode 0755 on the way, `missing` at
/// its end. Links are followed inside the root, also dangling ones. Returns a handle (`O_PATH`).
pub(crate) fn create_in_root(root: BorrowedFd<'_>, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
    match open_in_root(root, path, libc::O_PATH) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EAGAIN)) => {}
        result => return result,
    }
    Walk::new(root)?.create(path, missing)
}

/// A component-wise look-up. Each step opens one name without following links, and `..` goes back to the descriptor it
/// came from, so nothing that changes meanwhile can lead out of the root.
struct Walk {
    root: OwnedFd,
    stack: Vec<OwnedFd>,
    links: usize,
}

impl Walk {
    fn new(root: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self { root: root.try_clone_to_owned()?, stack: Vec::new(), links: 0 })
    }

    fn current(&self) -> BorrowedFd<'_> {
        self.stack.last().unwrap_or(&self.root).as_fd()
    }

    fn create(mut self, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
        let mut pending = components(path);
        while let Some(name) = pending.pop() {
            if name == OsStr::new("/") {
                self.stack.clear();
                continue;
            }
            if name == OsStr::new("..") {
                self.stack.pop();
                continue;
            }
            let kind = if pending.is_empty() { missing } else { Missing::Directory };
            let fd = open_or_create(self.current(), &name, kind)?;
            match link_target(fd.as_fd())? {
                Some(target) => {
                    self.links += 1;
                    if self.links > MAX_LINKS {
                        return Err(io::Error::from_raw_os_error(libc::ELOOP));
                    }
                    pending.extend(components(&target));
                }
                None => self.stack.push(fd),
            }
        }
        match self.stack.pop() {
            Some(fd) => Ok(fd),
            None => Ok(self.root),
        }
    }
}

/// The components of a path, last first; a leading `/` is one of its own.
fn components(path: &Path) -> Vec<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::RootDir => Some(OsString::from("/")),
            Component::ParentDir => Some(OsString::from("..")),
            Component::Normal(name) => Some(name.to_owned()),
            Component::CurDir | Component::Prefix(_) => None,
        })
        .rev()
        .collect()
}

fn open_or_create(dir: BorrowedFd<'_>, name: &OsStr, missing: Missing) -> io::Result<OwnedFd> {
    let name = c_path(Path::new(name))?;
    let open = || open_at(dir.as_raw_fd(), &name, libc::O_PATH | libc::O_NOFOLLOW, 0);
    match open() {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        result => return result,
    }
    let made = match missing {
        Missing::Directory => {
            // SAFETY: `name` is NUL-terminated and outlives the call.
            check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), 0o755) }.into()).map(drop)
        }
        Missing::File => {
            let flags = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY;
            open_at(dir.as_raw_fd(), &name, flags, 0o755).map(drop)
        }
    };
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => open(),
    }
}

/// The target of the symbolic link that an `O_PATH | O_NOFOLLOW` handle refers to; `None` when it is no link.
fn link_target(fd: BorrowedFd<'_>) -> io::Result<Option<PathBuf>> {
    if file_type(fd)? != libc::S_IFLNK {
        return Ok(None);
    }
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is writable for the length that is passed.
    let length = check(unsafe {
        libc::readlinkat(fd.as_raw_fd(), c"".as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
    } as _)?;
    buffer.truncate(usize::try_from(length).unwrap_or_default());
    Ok(Some(PathBuf::from(OsString::from_vec(buffer))))
}

/// The file type bits (`S_IFMT`) of what `fd` refers to.
pub(crate) fn file_type(fd: BorrowedFd<'_>) -> io::Result<libc::mode_t> {
    Ok(stat(fd)?.st_mode & libc::S_IFMT)
}

/// What the kernel knows of the file that `fd` refers to.
pub(crate) fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    // SAFETY: a stat structure of zeros is valid, and the kernel fills it in.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        check(libc::fstatat(fd.as_raw_fd(), c"".as_ptr(), &raw mut stat, libc::AT_EMPTY_PATH).into())?;
        Ok(stat)
    }
}

/// The magic number of the file system that `fd` is on.
pub(crate) fn file_system_magic(fd: BorrowedFd<'_>) -> io::Result<i64> {
    // SAFETY: a statfs structure of zeros is valid, and the kernel fills it in.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        check(libc::fstatfs(fd.as_raw_fd(), &raw mut stat).into())?;
        Ok(stat.f_type)
    }
}

/// The path through which a descriptor can be opened or named again; needs `/proc`.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Whether a path is absolute and has no `.` or `..` in it.
pub(crate) fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        && !path.as_os_str().as_bytes().contains(&0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    struct TestRoot(TempDir);

    impl TestRoot {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("root")).unwrap();
            Self(directory)
        }
        fn root(&self) -> PathBuf {
            self.0.path().join("root")
        }
        fn handle(&self) -> OwnedFd {
            open_directory(&self.root()).unwrap()
        }
    }

    #[test]
    fn missing_directories_and_files_are_created() {
        let test = TestRoot::new();
        create_in_root(test.handle().as_fd(), Path::new("/a/b/../c"), Missing::Directory).unwrap();
        create_in_root(test.handle().as_fd(), Path::new("/a/d/file"), Missing::File).unwrap();
        assert!(test.root().join("a/b").is_dir() && test.root().join("a/c").is_dir());
        assert!(test.root().join("a/d/file").is_file());
    }

    #[test]
    fn links_out_of_the_root_stay_inside() {
        let test = TestRoot::new();
        fs::create_dir(test.0.path().join("outside")).unwrap();
        symlink("../outside", test.root().join("relative")).unwrap();
        symlink(test.0.path().join("outside"), test.root().join("absolute")).unwrap();
        create_in_root(test.handle().as_fd(), Path::new("/relative/x"), Missing::Directory).unwrap();
        create_in_root(test.handle().as_fd(), Path::new("/absolute/y"), Missing::File).unwrap();
        assert!(test.root().join("outside/x").is_dir(), "`..` of the root is the root");
        assert_eq!(
            fs::read_dir(test.0.path().join("outside")).unwrap().count(),
            0,
            "nothing was made outside"
        );
        let inside = test.root().join(test.0.path().strip_prefix("/").unwrap()).join("outside/y");
        assert!(inside.is_file(), "an absolute link starts at the root");
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let test = TestRoot::new();
        symlink("b", test.root().join("a")).unwrap();
        symlink("a", test.root().join("b")).unwrap();
        let error = create_in_root(test.handle().as_fd(), Path::new("/a/x"), Missing::File).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
        symlink("dangling/../d2", test.root().join("d1")).unwrap();
        symlink("d1", test.root().join("d2")).unwrap();
        let error = create_in_root(test.handle().as_fd(), Path::new("/d1"), Missing::File).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    /// The kernel refuses to follow `..` while others rename; the look-up has to go on all the same.
    #[test]
    fn renames_elsewhere_do_not_disturb() {
        let test = TestRoot::new();
        fs::create_dir_all(test.root().join("a/b")).unwrap();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let renaming = stop.clone();
        let (from, to) = (test.0.path().join("from"), test.0.path().join("to"));
        fs::create_dir(&from).unwrap();
        let renamer = std::thread::spawn(move || {
            while !renaming.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(&from, &to).unwrap();
                fs::rename(&to, &from).unwrap();
            }
        });
        for _ in 0..2000 {
            open_in_root(test.handle().as_fd(), Path::new("a/../a/b/../b"), libc::O_PATH).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        renamer.join().unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let test = TestRoot::new();
        fs::write(test.root().join("file"), "").unwrap();
        let error = create_in_root(test.handle().as_fd(), Path::new("/file/x"), Missing::File).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn plain_absolute_paths_are_told_apart() {
        assert!(is_plain_absolute(Path::new("/a/b")));
        for path in ["a", "/a/../b", "../a", ""] {
            assert!(!is_plain_absolute(Path::new(path)), "{path}");
        }
    }
}
