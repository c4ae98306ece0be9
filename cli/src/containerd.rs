//! containerd's configuration, as far as it says which runtimes there are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_base::parts;
use toml::{Table, Value};

/// Where containerd looks unless it is told otherwise.
pub(crate) const DEFAULT_FILE: &str = "/etc/containerd/config.toml";

/// The runtime's name in RuntimeClasses.
pub(crate) const HANDLER: &str = "bulkhead";

/// The runtime's type; containerd makes the shim's name of it.
pub(crate) const RUNTIME_TYPE: &str = "io.containerd.bulkhead.v1";

/// Directories in which containerd, as distributions start it, finds the shim by its name.
const SEARCHED: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// A file is never near this size, bytes.
const MAX_FILE: u64 = 1 << 20;

/// Files that import each other without end are given up at this many.
const MAX_FILES: usize = 64;

/// A configuration that can't be made sense of.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerdError {
    /// It can't be read.
    #[error("can't read containerd's configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not TOML.
    #[error("containerd's configuration {path} is wrong: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A version without named plugins, or one that does not exist yet.
    #[error(
        "containerd's configuration {path} has version {version}: 2, 3 and 4 are known; containerd config migrate \
         prints an older one in a newer form"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: i64,
    },
}

/// The versions of the configuration that have what a runtime needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// containerd 1.x.
    Two,
    /// containerd 2.x.
    Three,
    /// containerd 2.3 and later.
    Four,
}

impl Version {
    /// The version with a number.
    pub(crate) fn from_number(number: i64) -> Option<Self> {
        match number {
            2 => Some(Self::Two),
            3 => Some(Self::Three),
            4 => Some(Self::Four),
            _ => None,
        }
    }

    /// Its number.
    pub(crate) fn number(self) -> i64 {
        match self {
            Self::Two => 2,
            Self::Three => 3,
            Self::Four => 4,
        }
    }

    /// The plugin in whose section runtimes are.
    pub(crate) fn plugin(self) -> &'static str {
        match self {
            Self::Two => "io.containerd.grpc.v1.cri",
            Self::Three | Self::Four => "io.containerd.cri.v1.runtime",
        }
    }
}

/// The main file, parsed.
#[derive(Debug)]
pub(crate) struct Configuration {
    /// Where it is, as containerd sees it.
    pub path: PathBuf,
    /// Which version it has.
    pub version: Version,
    root: PathBuf,
    table: Table,
}

impl Configuration {
    /// Reads the main file of the system in `root`; `None` if there is none.
    ///
    /// # Errors
    /// A file that can't be read, or can't be made sense of.
    pub(crate) fn load(root: &Path, path: &Path) -> Result<Option<Self>, ContainerdError> {
        let Some(table) = read(root, path)? else { return Ok(None) };
        let number = table.get("version").and_then(Value::as_integer).unwrap_or(1);
        let version = Version::from_number(number)
            .ok_or_else(|| ContainerdError::Version { path: path.to_owned(), version: number })?;
        Ok(Some(Self { path: path.to_owned(), version, root: root.to_owned(), table }))
    }

    /// Whether the main file imports a file.
    pub(crate) fn imports(&self, file: &Path) -> bool {
        imports(&self.table, &self.path).iter().any(|pattern| fits(pattern, file))
    }

    /// The section of the plugin with the runtimes in the main file.
    pub(crate) fn section(&self) -> Option<&Table> {
        section(&self.table, self.version.plugin())
    }

    /// Whether the CRI plugin is switched off, as Docker's packages have it.
    pub(crate) fn is_cri_disabled(&self) -> bool {
        let disabled = self.table.get("disabled_plugins").and_then(Value::as_array);
        let names = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
        disabled.is_some_and(|all| all.iter().filter_map(Value::as_str).any(|name| names.contains(&name)))
    }

    /// Our runtime, from the main file or one that it imports: the file, and what it says.
    ///
    /// # Errors
    /// An imported file that can't be read or made sense of.
    pub(crate) fn handler(&self) -> Result<Option<(PathBuf, Table)>, ContainerdError> {
        let mut found = handler(&self.table, self.version).map(|table| (self.path.clone(), table));
        let mut pending = imports(&self.table, &self.path);
        let mut seen = vec![self.path.clone()];
        while let Some(pattern) = pending.pop() {
            for path in matching(&self.root, &pattern) {
                if seen.contains(&path) || seen.len() > MAX_FILES {
                    continue;
                }
                seen.push(path.clone());
                let Some(table) = read(&self.root, &path)? else { continue };
                if let Some(table) = handler(&table, self.version) {
                    found = Some((path.clone(), table));
                }
                pending.extend(imports(&table, &path));
            }
        }
        Ok(found)
    }
}

/// A path of the system in `root`.
pub(crate) fn in_root(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Whether containerd finds the shim in `prefix` by its name alone.
pub(crate) fn is_searched(prefix: &Path) -> bool {
    SEARCHED.iter().any(|directory| Path::new(directory) == prefix.join("bin"))
}

/// The shim as containerd finds it: where a runtime's table says, or by its name.
pub(crate) fn find_shim(root: &Path, handler: &Table) -> Result<PathBuf, String> {
    let kind = handler.get("runtime_type").and_then(Value::as_str).unwrap_or_default();
    if kind != RUNTIME_TYPE {
        return Err(format!("runtime_type is {kind:?} and not {RUNTIME_TYPE:?}"));
    }
    if let Some(path) = handler.get("runtime_path").and_then(Value::as_str).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        let there = in_root(root, &path).is_file();
        return if there { Ok(path) } else { Err(format!("runtime_path {} is not there", path.display())) };
    }
    SEARCHED
        .iter()
        .map(|directory| Path::new(directory).join("containerd-shim-bulkhead-v1"))
        .find(|path| in_root(root, path).is_file())
        .ok_or_else(|| format!("containerd-shim-bulkhead-v1 is in none of {}", SEARCHED.join(", ")))
}

/// What is written into the drop-in.
///
/// With version 2 a containerd before 2.0 takes an imported file's section of a plugin in the place of the main file's, so the
/// main file's is repeated there.
pub(crate) fn drop_in(version: Version, prefix: &Path, main: Option<&Table>) -> String {
    let mut runtime = Table::new();
    runtime.insert("runtime_type".into(), RUNTIME_TYPE.into());
    if !is_searched(prefix) {
        let path = prefix.join(parts::SHIM).display().to_string();
        runtime.insert("runtime_path".into(), path.into());
    }
    // What a privileged pod gets is its guest's devices.
    runtime.insert("privileged_without_host_devices".into(), true.into());
    let mut section = match version {
        Version::Two => main.cloned().unwrap_or_default(),
        Version::Three | Version::Four => Table::new(),
    };
    let mut containerd = take(&mut section, "containerd");
    let mut runtimes = take(&mut containerd, "runtimes");
    runtimes.insert(HANDLER.into(), runtime.into());
    containerd.insert("runtimes".into(), runtimes.into());
    section.insert("containerd".into(), containerd.into());
    let mut plugins = Table::new();
    plugins.insert(version.plugin().into(), section.into());
    let mut file = Table::new();
    file.insert("version".into(), version.number().into());
    file.insert("plugins".into(), plugins.into());
    let note = match version {
        Version::Two => {
            "# The section of the plugin repeats the main file's: containerd 1.x takes it in that one's place.\n"
        }
        Version::Three | Version::Four => "",
    };
    format!("# Written by bulkhead install; bulkhead uninstall removes it.\n{note}{file}")
}

fn take(table: &mut Table, key: &str) -> Table {
    match table.remove(key) {
        Some(Value::Table(inner)) => inner,
        _ => Table::new(),
    }
}

fn read(root: &Path, path: &Path) -> Result<Option<Table>, ContainerdError> {
    let failed = |source| ContainerdError::Read { path: path.to_owned(), source };
    let place = in_root(root, path);
    match fs::metadata(&place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.len() > MAX_FILE || !metadata.is_file() => {
            return Err(failed(io::Error::other("it is not a file of a sensible size")));
        }
        Ok(_) => {}
    }
    let text = fs::read_to_string(&place).map_err(failed)?;
    let table = text
        .parse()
        .map_err(|source| ContainerdError::Parse { path: path.to_owned(), source: Box::new(source) })?;
    Ok(Some(table))
}

fn section<'a>(table: &'a Table, plugin: &str) -> Option<&'a Table> {
    table.get("plugins")?.get(plugin)?.as_table()
}

fn handler(table: &Table, version: Version) -> Option<Table> {
    section(table, version.plugin())?.get("containerd")?.get("runtimes")?.get(HANDLER)?.as_table().cloned()
}

/// The patterns that a file imports, absolute.
fn imports(table: &Table, file: &Path) -> Vec<PathBuf> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    let imports = table.get("imports").and_then(Value::as_array);
    imports.into_iter().flatten().filter_map(Value::as_str).map(|pattern| directory.join(pattern)).collect()
}

/// Whether a path fits a pattern with `*` in its last part.
fn fits(pattern: &Path, path: &Path) -> bool {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    match (name(pattern), name(path)) {
        (Some(pattern_name), Some(name)) => {
            pattern.parent() == path.parent() && name_fits(&pattern_name, &name)
        }
        _ => false,
    }
}

fn name_fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            (0..=rest.len()).filter(|at| rest.is_char_boundary(*at)).any(|at| name_fits(after, &rest[at..]))
        }),
    }
}

fn matching(root: &Path, pattern: &Path) -> Vec<PathBuf> {
    let Some(directory) = pattern.parent() else { return Vec::new() };
    if !pattern.to_string_lossy().contains('*') {
        return vec![pattern.to_owned()];
    }
    let entries = fs::read_dir(in_root(root, directory)).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| directory.join(entry.file_name())).filter(|path| fits(pattern, path)).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    const DROP_IN: &str = "/etc/containerd/conf.d/bulkhead.toml";

    fn configuration(root: &Directory, text: &str) -> Configuration {
        root.write("etc/containerd/config.toml", text);
        Configuration::load(root.path(), Path::new(DEFAULT_FILE)).unwrap().unwrap()
    }

    #[test]
    fn what_is_written_is_found_again_in_every_version() {
        for number in [2, 3, 4] {
            let root = Directory::new();
            let text = format!("version = {number}\nimports = [\"conf.d/*.toml\"]\n");
            let configuration = configuration(&root, &text);
            assert!(configuration.imports(Path::new(DROP_IN)));
            assert_eq!(configuration.handler().unwrap(), None);

            let written = drop_in(configuration.version, Path::new("/opt/b"), configuration.section());
            root.write(&DROP_IN[1..], &written);
            let (file, handler) = configuration.handler().unwrap().unwrap();
            assert_eq!(file, Path::new(DROP_IN));
            assert!(find_shim(root.path(), &handler).unwrap_err().contains("/opt/b/bin"));
            root.write("opt/b/bin/containerd-shim-bulkhead-v1", "");
            assert!(find_shim(root.path(), &handler).is_ok());
        }
    }

    #[test]
    fn version_2_keeps_what_the_main_file_says() {
        let root = Directory::new();
        let text = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause:9\"\n\
                    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n  SystemdCgroup = true\n";
        let configuration = configuration(&root, text);
        let written: Table =
            drop_in(configuration.version, Path::new("/usr"), configuration.section()).parse().unwrap();
        let section = section(&written, "io.containerd.grpc.v1.cri").unwrap();
        assert_eq!(section["sandbox_image"].as_str(), Some("pause:9"));
        let runtimes = &section["containerd"]["runtimes"];
        assert_eq!(runtimes["runc"]["options"]["SystemdCgroup"].as_bool(), Some(true));
        assert_eq!(runtimes["bulkhead"].get("runtime_path"), None, "it is found by its name");
        // Later versions are merged deeply; what is repeated would only become stale.
        let written = drop_in(Version::Three, Path::new("/usr"), configuration.section());
        assert!(!written.contains("pause:9"), "{written}");
    }

    #[test]
    fn imports_are_judged_as_containerd_does() {
        for (pattern, expected) in [
            ("/etc/containerd/conf.d/*.toml", true),
            ("conf.d/*", true),
            ("/etc/containerd/conf.d/bulkhead.toml", true),
            ("/etc/containerd/conf.d/*.conf", false),
            ("/etc/containerd/*.toml", false),
            ("/etc/containerd/conf.d/b*k*d.toml", true),
        ] {
            assert_eq!(
                fits(&Path::new("/etc/containerd").join(pattern), Path::new(DROP_IN)),
                expected,
                "{pattern}"
            );
        }
    }

    #[test]
    fn what_can_not_work_is_told() {
        let root = Directory::new();
        let load = || Configuration::load(root.path(), Path::new(DEFAULT_FILE));
        assert!(load().unwrap().is_none());
        for (text, said) in [("", "version 1"), ("version = 9", "version 9"), ("version =", "wrong")] {
            root.write("etc/containerd/config.toml", text);
            let error = load().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        let docker = configuration(&root, "version = 2\ndisabled_plugins = [\"cri\"]\n");
        assert!(docker.is_cri_disabled());
        // Files that import each other.
        let circular = configuration(&root, "version = 3\nimports = [\"a.toml\"]\n");
        root.write("etc/containerd/a.toml", "imports = [\"config.toml\", \"a.toml\"]");
        assert_eq!(circular.handler().unwrap(), None);
    }
}
