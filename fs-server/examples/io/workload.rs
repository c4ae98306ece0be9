//! What is done to a directory, inside the guest and on the host alike, and how long it takes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Instant;

/// Bytes of the large file.
const LARGE: usize = 8 << 20;
/// Bytes per read or write of it.
const CHUNK: usize = 128 << 10;
/// Small files.
const FILES: usize = 200;

/// A measurement: name, what it counts, and per second how many.
pub(crate) struct Figure {
    pub name: &'static str,
    pub value: f64,
    pub unit: &'static str,
}

fn rate(name: &'static str, unit: &'static str, count: f64, since: Instant) -> Figure {
    Figure { name, value: count / since.elapsed().as_secs_f64(), unit }
}

/// Measures in a fresh directory. `forget` drops what the guest's kernel has cached.
pub(crate) fn measure(directory: &Path, forget: impl Fn()) -> io::Result<Vec<Figure>> {
    fs::create_dir(directory)?;
    let mebibytes = LARGE as f64 / f64::from(1 << 20);
    let mut figures = Vec::new();
    let path = directory.join("large");

    let begin = Instant::now();
    let mut file = File::create(&path)?;
    let chunk = vec![0x5a; CHUNK];
    for _ in 0..LARGE / CHUNK {
        file.write_all(&chunk)?;
    }
    drop(file);
    figures.push(rate("sequential write", "MiB/s", mebibytes, begin));

    forget();
    let begin = Instant::now();
    let mut file = File::open(&path)?;
    let mut chunk = vec![0; CHUNK];
    for _ in 0..LARGE / CHUNK {
        file.read_exact(&mut chunk)?;
    }
    figures.push(rate("sequential read", "MiB/s", mebibytes, begin));

    let begin = Instant::now();
    file.seek(SeekFrom::Start(0))?;
    for _ in 0..LARGE / CHUNK {
        file.read_exact(&mut chunk)?;
    }
    figures.push(rate("sequential read again", "MiB/s", mebibytes, begin));

    forget();
    let begin = Instant::now();
    let mut position = 1u64;
    for _ in 0..FILES {
        position = position.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        file.read_exact_at(&mut chunk[..4096], (position >> 33) % (LARGE as u64 / 4096) * 4096)?;
    }
    figures.push(rate("random read of 4 KiB", "/s", FILES as f64, begin));

    let begin = Instant::now();
    for number in 0..FILES {
        fs::write(directory.join(format!("small-{number}")), b"some content")?;
    }
    figures.push(rate("create small file", "/s", FILES as f64, begin));

    forget();
    let begin = Instant::now();
    for number in 0..FILES {
        fs::metadata(directory.join(format!("small-{number}")))?;
    }
    figures.push(rate("stat, first time", "/s", FILES as f64, begin));

    let begin = Instant::now();
    for number in 0..FILES {
        fs::metadata(directory.join(format!("small-{number}")))?;
    }
    figures.push(rate("stat, again", "/s", FILES as f64, begin));

    forget();
    let begin = Instant::now();
    let listed =
        fs::read_dir(directory)?.map(|entry| entry?.metadata()).collect::<io::Result<Vec<_>>>()?.len();
    assert_eq!(listed, FILES + 1);
    figures.push(rate("list with attributes", "/s", listed as f64, begin));

    forget();
    let begin = Instant::now();
    for number in 0..FILES {
        assert_eq!(fs::read(directory.join(format!("small-{number}")))?, b"some content");
    }
    figures.push(rate("open, read, close small file", "/s", FILES as f64, begin));

    let begin = Instant::now();
    for number in 0..FILES {
        fs::remove_file(directory.join(format!("small-{number}")))?;
    }
    figures.push(rate("remove small file", "/s", FILES as f64, begin));
    fs::remove_file(&path)?;
    fs::remove_dir(directory)?;
    Ok(figures)
}

/// Does what programs do to files, and fails at the first thing that isn't as on any other file system.
pub(crate) fn check(directory: &Path) -> io::Result<()> {
    fs::create_dir(directory)?;
    let path = |name: &str| directory.join(name);

    let mut file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o640).open(path("f"))?;
    file.write_all(b"one")?;
    OpenOptions::new().append(true).open(path("f"))?.write_all(b"two")?;
    file.write_all(b"three")?;
    expect("append", fs::read(path("f"))? == b"onetwothree");
    expect("mode", file.metadata()?.mode() & 0o7777 == 0o640);
    fs::hard_link(path("f"), path("g"))?;
    expect("hard link", fs::metadata(path("g"))?.ino() == file.metadata()?.ino());
    expect("link count", file.metadata()?.nlink() == 2);
    fs::rename(path("g"), path("h"))?;
    fs::remove_file(path("f"))?;
    fs::remove_file(path("h"))?;
    file.seek(SeekFrom::Start(0))?;
    let mut all = String::new();
    file.read_to_string(&mut all)?;
    expect("unlinked but open", all == "onetwothree" && file.metadata()?.nlink() == 0);

    std::os::unix::fs::chown(directory, Some(1000), Some(2000))?;
    let metadata = fs::metadata(directory)?;
    expect("chown", (metadata.uid(), metadata.gid()) == (1000, 2000));
    fs::write(path("suid"), "x")?;
    std::os::unix::fs::chown(path("suid"), Some(5), Some(6))?;
    fs::set_permissions(path("suid"), fs::Permissions::from_mode(0o6755))?;
    expect("set-id bits", fs::metadata(path("suid"))?.mode() & 0o7777 == 0o6755);

    symlink("suid", path("link"))?;
    expect(
        "symbolic link",
        fs::read(path("link"))? == b"x" && fs::read_link(path("link"))?.as_os_str() == "suid",
    );
    fs::write(path("suid"), "longer")?;
    expect("truncate at open", fs::read(path("link"))? == b"longer");
    OpenOptions::new().write(true).open(path("suid"))?.set_len(2)?;
    expect("truncate", fs::read(path("suid"))? == b"lo");

    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).map_err(io::Error::from)?;
    let (reader_path, mut got) = (path("fifo"), String::new());
    let writer = std::thread::spawn({
        let path = reader_path.clone();
        move || fs::write(path, "through")
    });
    File::open(&reader_path)?.read_to_string(&mut got)?;
    expect("fifo", got == "through" && writer.join().is_ok());

    // struct vfs_cap_data, version 2: CAP_NET_BIND_SERVICE.
    let capability: Vec<u8> =
        [0x0200_0001u32, 1 << 10, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    let name = "security.capability";
    rustix::fs::setxattr(path("suid"), name, &capability, rustix::fs::XattrFlags::empty())?;
    let mut value = [0; 64];
    expect(
        "file capabilities",
        rustix::fs::getxattr(path("suid"), name, &mut value[..])? == capability.len(),
    );

    let many = path("many");
    fs::create_dir(&many)?;
    for number in 0..1000 {
        File::create(many.join(format!("file-with-a-long-name-{number}")))?;
    }
    expect("large directory", fs::read_dir(&many)?.count() == 1000);
    fs::remove_dir_all(&many)?;

    let data: Vec<u8> = (0..1_000_000u32).map(|number| (number % 251) as u8).collect();
    fs::write(path("data"), &data)?;
    File::open(path("data"))?.sync_all()?;
    fs::copy(path("data"), path("copy"))?;
    expect("copy", fs::read(path("copy"))? == data);
    fs::remove_dir_all(directory)
}

fn expect(what: &str, good: bool) {
    assert!(good, "{what} does not work");
}
