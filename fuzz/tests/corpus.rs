//! Replays the kept inputs of every target, as they are and damaged, in an ordinary build.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_fuzz::TARGETS;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The names of a folder's files, without their last extension.
fn names(name: &str) -> BTreeSet<String> {
    let files = fs::read_dir(folder(name)).unwrap();
    files.map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn from_base64(line: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for digit in line.bytes().filter(|digit| *digit != b'=') {
        let value = DIGITS.iter().position(|known| *known == digit).expect("not Base64");
        bits = bits << 6 | value as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

fn kept(target: &str) -> Vec<Vec<u8>> {
    let text = fs::read_to_string(folder("corpus").join(format!("{target}.b64"))).unwrap();
    text.lines().map(from_base64).collect()
}

#[test]
fn base64_is_read() {
    assert_eq!(from_base64("Zm9vYg=="), b"foob");
    assert_eq!(from_base64("+/8="), [0xfb, 0xff]);
}

#[test]
fn every_target_has_a_program_and_kept_inputs() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(targets, names("src/bin"));
    assert_eq!(targets, names("corpus"));
    for target in &targets {
        assert!(kept(target).len() >= 5, "{target} has hardly any kept inputs");
    }
}

#[test]
fn kept_inputs_are_taken_as_they_are_and_damaged() {
    let mut count = 0;
    for (name, run) in TARGETS {
        println!("{name}");
        for input in kept(name) {
            run(&input);
            run(&input[..input.len() / 2]);
            for at in (0..input.len()).step_by(input.len() / 4 + 1) {
                let mut damaged = input.clone();
                damaged[at] ^= 0x81;
                run(&damaged);
                count += 1;
            }
        }
    }
    assert!(count > 300, "{count} damaged inputs");
}
