//! Tests of the store: with files that stand for a machine's memory and state.

use std::os::unix::fs::FileExt;

use tempfile::TempDir;

use super::*;
use crate::config::Size;

struct Fixture {
    directory: TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        for file in ["vmm", "kernel", "image"] {
            fs::write(directory.path().join(file), file).unwrap();
        }
        let store = Store::new(directory.path().join("state/templates"));
        Fixture { directory, store }
    }

    fn recipe(&self, memory_mib: u32) -> Recipe {
        Recipe {
            vmm: self.directory.path().join("vmm"),
            kernel: self.directory.path().join("kernel"),
            image: self.directory.path().join("image"),
            kvm: "/dev/kvm".into(),
            size: Size { vcpus: 1, memory_mib },
            kernel_params: String::new(),
        }
    }

    fn make(&self, memory_mib: u32, limit: u64) -> Result<Key, StoreError> {
        let recipe = self.recipe(memory_mib);
        let lock = self.store.lock(Duration::ZERO)?;
        let inputs = self.store.inputs(&recipe, &lock)?;
        let draft = self.store.draft(memory_mib, &lock)?;
        draft.memory.write_all_at(&[7; 64 * 1024], 1 << 20).unwrap();
        draft.state.write_all_at(b"state", 0).unwrap();
        self.store.publish(draft, inputs, ("kernel".into(), "agent".into()), limit, &lock)
    }

    fn find(&self, memory_mib: u32) -> Found {
        self.store.find(&self.recipe(memory_mib)).unwrap()
    }

    fn file(&self, key: &Key, name: &str) -> PathBuf {
        self.store.path(key).join(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = names(&self.store.directory)
            .unwrap()
            .into_iter()
            .map(|name| name.into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

const LIMIT: u64 = 1 << 30;

#[test]
fn what_was_made_is_found_again_and_nothing_else() {
    let fixture = Fixture::new();
    assert!(matches!(fixture.find(64), Found::Missing), "there is not even a directory");
    let key = fixture.make(64, LIMIT).unwrap();
    let Found::Usable(template) = fixture.find(64) else { panic!("not found") };
    assert_eq!(template.key, key);
    assert_eq!(template.memory.metadata().unwrap().len(), 64 << 20);
    assert!(matches!(fixture.find(128), Found::Missing));
    fixture.store.verify(&key).unwrap();
    // A key may stand before or after the other names: it begins with any hexadecimal digit.
    let mut expected = [key.to_string(), "digests.json".into(), "lock".into()];
    expected.sort();
    assert_eq!(fixture.names(), expected);
    let listed = fixture.store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].size >= 64 * 1024 && listed[0].size < 4 << 20, "{}", listed[0].size);

    fs::write(fixture.directory.path().join("kernel"), "another").unwrap();
    assert!(matches!(fixture.find(64), Found::Missing), "the kernel has changed");
    assert_ne!(fixture.make(64, LIMIT).unwrap(), key);
    assert_eq!(fixture.store.list().unwrap().len(), 2);
}

#[test]
fn a_damaged_template_is_told_and_removed() {
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 6] = [
        ("memory has", |path| {
            File::options().write(true).open(path.join(MEMORY)).unwrap().set_len(1 << 20).unwrap()
        }),
        ("memory was changed", |path| {
            File::options().write(true).open(path.join(MEMORY)).unwrap().write_all_at(b"x", 0).unwrap();
        }),
        ("state does not have its digest", |path| fs::write(path.join(STATE), "stAte").unwrap()),
        ("state has 0 bytes", |path| fs::write(path.join(STATE), "").unwrap()),
        ("meta.json is missing", |path| fs::remove_file(path.join(META)).unwrap()),
        ("meta.json:", |path| fs::write(path.join(META), "{\"inputs\": 1").unwrap()),
    ];
    let fixture = Fixture::new();
    for (expected, damage) in damages {
        let key = fixture.make(64, LIMIT).unwrap();
        // More than the resolution of a file's times.
        std::thread::sleep(Duration::from_millis(20));
        damage(&fixture.store.path(&key));
        assert!(matches!(fixture.store.verify(&key), Err(StoreError::Damaged { .. })), "{expected}");
        let Found::Damaged(reason) = fixture.find(64) else { panic!("{expected}: not seen") };
        assert!(reason.contains(expected), "{reason}");
        assert!(matches!(fixture.find(64), Found::Missing), "{expected}: it should be gone");
    }
}

#[test]
fn verify_reads_memory() {
    let fixture = Fixture::new();
    let key = fixture.make(64, LIMIT).unwrap();
    let memory = File::options().write(true).open(fixture.file(&key, MEMORY)).unwrap();
    let modified = memory.metadata().unwrap().modified().unwrap();
    memory.write_all_at(b"x", 5 << 20).unwrap();
    memory.set_modified(modified).unwrap();
    let error = fixture.store.verify(&key).unwrap_err();
    assert!(error.to_string().contains("memory does not have its digest"), "{error}");
}

#[test]
fn half_made_templates_are_never_seen_and_go_with_the_next_lock() {
    let fixture = Fixture::new();
    let lock = fixture.store.lock(Duration::ZERO).unwrap();
    let inputs = fixture.store.inputs(&fixture.recipe(64), &lock).unwrap();
    // A maker that is killed runs no destructor.
    let draft = std::mem::ManuallyDrop::new(fixture.store.draft(64, &lock).unwrap());
    draft.memory.write_all_at(b"half", 0).unwrap();
    assert!(draft.path.exists());
    assert!(matches!(fixture.find(64), Found::Missing));
    assert!(fixture.store.list().unwrap().is_empty());
    assert!(matches!(fixture.store.lock(Duration::ZERO), Err(StoreError::Busy(_))));
    drop(lock);

    let lock = fixture.store.lock(Duration::ZERO).unwrap();
    assert!(!draft.path.exists());
    drop(fixture.store.draft(64, &lock).unwrap());
    drop(lock);
    assert_eq!(fixture.names(), ["digests.json", "lock"]);

    // Nor is a directory of the right name without its files a template.
    fs::create_dir(fixture.store.path(&inputs.key())).unwrap();
    assert!(matches!(fixture.find(64), Found::Damaged(_)));
}

#[test]
fn the_least_recently_used_goes_first() {
    let fixture = Fixture::new();
    let first = fixture.make(64, LIMIT).unwrap();
    let second = fixture.make(65, LIMIT).unwrap();
    let size = fixture.store.list().unwrap()[0].size;
    std::thread::sleep(Duration::from_millis(20));
    assert!(matches!(fixture.find(64), Found::Usable(_)), "used after the second was made");
    let third = fixture.make(66, 2 * size + size / 2).unwrap();
    let mut left: Vec<Key> = fixture.store.list().unwrap().into_iter().map(|listed| listed.key).collect();
    left.sort();
    let mut expected = vec![first, third];
    expected.sort();
    assert_eq!(left, expected, "{second:?} should be gone");

    assert!(matches!(fixture.make(67, size / 2), Err(StoreError::Limit { .. })));
    assert_eq!(fixture.store.list().unwrap().len(), 2, "what does not fit removes nothing");
}

#[test]
fn what_the_vmm_refused_is_not_tried_again_until_it_is_made_anew() {
    let fixture = Fixture::new();
    let key = fixture.make(64, LIMIT).unwrap();
    fixture.store.refuse(&key, "another CPU").unwrap();
    assert!(matches!(fixture.find(64), Found::Refused(reason) if reason == "another CPU"));
    assert!(fixture.store.sound(&key).is_none());
    assert_eq!(fixture.make(64, LIMIT).unwrap(), key);
    assert!(matches!(fixture.find(64), Found::Usable(_)));
    fixture.store.remove(&key).unwrap();
    assert!(matches!(fixture.store.remove(&key), Err(StoreError::NotFound(_))));
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let fixture = Fixture::new();
    fixture.make(64, LIMIT).unwrap();
    fs::set_permissions(&fixture.store.directory, fs::Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(fixture.store.find(&fixture.recipe(64)), Err(StoreError::Open(_))));
    assert!(matches!(fixture.make(64, LIMIT), Err(StoreError::Open(_))));
}

#[test]
fn a_template_goes_when_no_guest_from_it_has_answered_for_a_while() {
    let fixture = Fixture::new();
    let key = fixture.make(64, LIMIT).unwrap();
    let mark = fixture.file(&key, DOUBTED);
    let long_ago = || {
        let file = File::options().write(true).open(&mark).unwrap();
        file.set_modified(SystemTime::now() - DOUBT).unwrap();
    };
    for _ in 0..3 {
        fixture.store.doubt(&key).unwrap();
    }
    assert!(matches!(fixture.find(64), Found::Usable(_)), "many at once say nothing");

    long_ago();
    fixture.store.trust(&key);
    fixture.store.doubt(&key).unwrap();
    assert!(matches!(fixture.find(64), Found::Usable(_)), "one has answered meanwhile");

    long_ago();
    fixture.store.doubt(&key).unwrap();
    assert!(matches!(fixture.find(64), Found::Missing));
    fixture.store.doubt(&key).unwrap();
    fixture.store.trust(&key);
}
