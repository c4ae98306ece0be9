//! The programs mean what another compiler of the format makes of the profiles, and are short to run.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a profile that can't be read fails its test"
)]

#[path = "../build/format.rs"]
mod format;

use std::collections::{BTreeMap, HashMap};
use std::fs;

use bulkhead_seccomp_compiler::interpreter::{Call, constant, cost, run};
use bulkhead_seccomp_compiler::{Architecture, X32_BIT, compile};
use libc::sock_filter;
use seccompiler::{BpfMap, TargetArch, compile_from_json};
use serde_json::Value;
use syscalls::x86_64::Sysno;

const PROFILES: [&str; 6] =
    ["vmm-control", "vmm-template", "vmm-device", "vmm-storage", "vmm-vcpu", "fs-server"];

const NATIVE: u32 = Architecture::X86_64.audit();
const AARCH64: u32 = 0xc000_00b7;

/// More numbers than there are calls.
const NUMBERS: std::ops::Range<u32> = 0..600;

fn text(name: &str) -> String {
    fs::read_to_string(format!("{}/{name}.json", env!("CARGO_MANIFEST_DIR"))).expect("read the profile")
}

/// What the build made, and what we ship.
fn shipped(name: &str) -> Vec<sock_filter> {
    let bytes = fs::read(format!("{}/{name}.bpf", env!("OUT_DIR"))).expect("read the program");
    let (instructions, rest) = bytes.as_chunks::<8>();
    assert_eq!(rest, b"");
    let instruction = |&[code0, code1, jt, jf, k0, k1, k2, k3]: &[u8; 8]| sock_filter {
        code: u16::from_le_bytes([code0, code1]),
        jt,
        jf,
        k: u32::from_le_bytes([k0, k1, k2, k3]),
    };
    instructions.iter().map(instruction).collect()
}

fn by_seccompiler(text: &str, name: &str) -> Vec<sock_filter> {
    let programs: BpfMap = compile_from_json(text.as_bytes(), TargetArch::x86_64).expect("compile");
    let theirs = programs[name].iter();
    theirs.map(|insn| sock_filter { code: insn.code, jt: insn.jt, jf: insn.jf, k: insn.k }).collect()
}

/// A condition: argument, value, mask.
type Constants = (usize, u64, u64);

/// The conditions of each conditional rule by the call's number.
fn conditional_rules(text: &str, name: &str) -> BTreeMap<u32, Vec<Vec<Constants>>> {
    let file: HashMap<String, Value> = serde_json::from_str(text).expect("parse");
    let mut rules = BTreeMap::<u32, Vec<Vec<Constants>>>::new();
    for rule in file[name]["filter"].as_array().expect("a list of rules") {
        let Some(args) = rule.get("args") else { continue };
        let constants = args.as_array().expect("a list of conditions").iter().map(|arg| {
            let number = |value: &Value| value.as_u64().expect("a number");
            let mask = arg["op"].get("masked_eq").map_or(u64::MAX, number);
            (number(&arg["index"]) as usize, number(&arg["val"]), mask)
        });
        let call: Sysno = rule["syscall"].as_str().expect("a name").parse().expect("a call");
        rules.entry(call.id() as u32).or_default().push(constants.collect());
    }
    rules
}

/// Values around a constant and its mask.
fn around(value: u64, mask: u64) -> Vec<u64> {
    let mut values = vec![0, 1, u64::MAX, 0xffff_ffff, 1 << 32, mask, !mask, value & mask, value | !mask];
    for near in [value, value.wrapping_sub(1), value.wrapping_add(1)] {
        values.extend([
            near,
            near | 1 << 32,
            near | 1 << 63,
            near | 0xffff_ffff << 32,
            near << 32,
            near ^ 1 << 31,
        ]);
    }
    values.extend((0..64).map(|bit| value ^ 1 << bit));
    values
}

/// Arguments that meet each rule, meet none, and miss by little in one argument.
fn arguments(rules: &[Vec<Constants>]) -> Vec<[u64; 6]> {
    let mut bases = Vec::new();
    for filler in [0, u64::MAX] {
        bases.push([filler; 6]);
        bases.extend(rules.iter().map(|rule| {
            let mut args = [filler; 6];
            rule.iter().for_each(|&(index, value, _)| args[index] = value);
            args
        }));
    }
    let mut values: Vec<u64> =
        rules.iter().flatten().flat_map(|&(_, value, mask)| around(value, mask)).collect();
    values.sort_unstable();
    values.dedup();
    let mut all = bases.clone();
    for base in bases {
        for index in 0..6 {
            all.extend(values.iter().map(|&value| {
                let mut args = base;
                args[index] = value;
                args
            }));
        }
    }
    all
}

fn assert_same_meaning(name: &str, text: &str, ours: &[sock_filter]) {
    let theirs = by_seccompiler(text, name);
    let rules = conditional_rules(text, name);
    let check = |call: &Call| assert_eq!(run(ours, call), run(&theirs, call), "{name}: {call:x?}");
    for number in NUMBERS {
        for args in arguments(rules.get(&number).map(Vec::as_slice).unwrap_or_default()) {
            check(&Call { number, architecture: NATIVE, args });
        }
        for args in [[0; 6], [u64::MAX; 6]] {
            for architecture in [Architecture::X86.audit(), AARCH64, 0] {
                check(&Call { number, architecture, args });
            }
            for number in [X32_BIT + number, u32::MAX - number] {
                check(&Call { number, architecture: NATIVE, args });
            }
        }
    }
}

#[test]
fn two_compilers_agree_on_each_profile() {
    for name in PROFILES {
        assert_same_meaning(name, &text(name), &shipped(name));
    }
}

/// Our profiles use few of the comparisons.
#[test]
fn two_compilers_agree_on_each_comparison() {
    let operators = [
        r#""eq""#,
        r#""ne""#,
        r#""lt""#,
        r#""le""#,
        r#""gt""#,
        r#""ge""#,
        r#"{"masked_eq": 240}"#,
        r#"{"masked_eq": 0}"#,
        r#"{"masked_eq": 4294967295}"#,
        r#"{"masked_eq": 64424509680}"#,
        r#"{"masked_eq": 64424509440}"#,
    ];
    for mismatch in [r#""kill_process""#, r#"{"errno": 38}"#, r#""log""#] {
        for operator in operators {
            let condition = |index: u32, width: &str, value: u64| {
                format!(r#"{{"index": {index}, "type": "{width}", "op": {operator}, "val": {value}}}"#)
            };
            // One condition; two that hold together; two alternatives.
            let mut rules = Vec::new();
            for (width, value, [one, both, either]) in [
                ("dword", 0x1_0000_0025, ["read", "write", "open"]),
                ("qword", 0x1_0000_0025, ["mmap", "mprotect", "munmap"]),
                ("dword", 0, ["ioctl", "pread64", "pwrite64"]),
                ("qword", u64::MAX, ["statx", "io_pgetevents", "rseq"]),
            ] {
                let conditions = [(1, value), (4, value), (5, 7)];
                let [first, second, third] = conditions.map(|(index, value)| condition(index, width, value));
                rules.push(format!(r#"{{"syscall": "{one}", "args": [{first}]}}"#));
                rules.push(format!(r#"{{"syscall": "{both}", "args": [{first}, {second}]}}"#));
                rules.push(format!(r#"{{"syscall": "{either}", "args": [{second}]}}"#));
                rules.push(format!(r#"{{"syscall": "{either}", "args": [{third}]}}"#));
            }
            let text = format!(
                r#"{{"all": {{"mismatch_action": {mismatch}, "match_action": "allow", "filter": [
                    {{"syscall": "close"}}, {{"syscall": "stat", "comment": "text"}}, {}]}}}}"#,
                rules.join(",")
            );
            assert_same_meaning("all", &text, &compile(&format::parse(&text, "all").expect("parse")));
        }
    }
}

/// The kernel runs a program for each number when it is installed, and at each call that is not always allowed.
#[test]
fn no_call_costs_many_instructions() {
    for name in PROFILES {
        let text = text(name);
        let (ours, theirs, rules) =
            (shipped(name), by_seccompiler(&text, name), conditional_rules(&text, name));
        let costs = |program: &[sock_filter], conditional: bool| {
            NUMBERS
                .filter(|number| rules.contains_key(number) == conditional)
                .flat_map(|number| {
                    let rules = rules.get(&number).map(Vec::as_slice).unwrap_or_default();
                    arguments(rules).into_iter().map(move |args| Call { number, architecture: NATIVE, args })
                })
                .map(|call| cost(program, &call))
                .max()
                .unwrap_or_default()
        };
        let unconditional = costs(&ours, false);
        println!(
            "{name}: {} instructions, at most {unconditional} for a call without conditions and {} for one with some; \
             by seccompiler {}, {} and {}",
            ours.len(),
            costs(&ours, true),
            theirs.len(),
            costs(&theirs, false),
            costs(&theirs, true),
        );
        assert!(unconditional <= 16, "{name}: {unconditional} instructions");
        assert!(ours.len() <= theirs.len(), "{name}: {} instructions", ours.len());
    }
}

/// The kernel does not run the program at all for calls of which it can tell at its installation that they are allowed.
#[test]
fn calls_without_conditions_are_constant_to_the_kernel() {
    for name in PROFILES {
        let (program, rules) = (shipped(name), conditional_rules(&text(name), name));
        for number in NUMBERS {
            let is_constant = constant(&program, number, NATIVE).is_some();
            assert_eq!(is_constant, !rules.contains_key(&number), "{name}: {number}");
        }
    }
}

#[test]
fn what_is_not_understood_is_an_error() {
    let file = |actions: &str, rules: &str| format!(r#"{{"p": {{{actions}, "filter": [{rules}]}}}}"#);
    let actions = r#""mismatch_action": "kill_process", "match_action": "allow""#;
    let error = |text: String| {
        let error = format::parse(&text, "p").map(|profile| profile.calls).expect_err(&text);
        std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string)
    };
    let rule = |rule: &str| error(file(actions, rule));
    let condition = |index: &str, width: &str, op: &str, more: &str| {
        rule(&format!(
            r#"{{"syscall": "read", "args": [{{"index": {index}, "type": "{width}", "op": {op}, "val": 1{more}}}]}}"#
        ))
    };
    assert!(rule(r#"{"syscall": "raed"}"#).contains("raed"));
    assert!(rule(r#"{"syscall": "read", "arg": []}"#).contains("unknown field `arg`"));
    assert!(rule(r#"{"syscall": "read", "syscall": "write"}"#).contains("duplicate field"));
    assert!(rule(r#"{"syscall": "read", "args": []}"#).contains("empty list"));
    assert!(rule(r#"{"syscall": "read"}, {"syscall": "read"}"#).contains("beside others"));
    let conditional = r#"{"syscall": "read", "args": [{"index": 0, "type": "dword", "op": "eq", "val": 1}]}"#;
    assert!(rule(&format!(r#"{{"syscall": "read"}}, {conditional}"#)).contains("beside others"));
    assert!(rule(&format!(r#"{conditional}, {{"syscall": "read"}}"#)).contains("beside others"));

    assert!(condition("6", "dword", r#""eq""#, "").contains("argument 6"));
    assert!(condition("0", "word", r#""eq""#, "").contains("unknown variant `word`"));
    assert!(condition("0", "dword", r#""equal""#, "").contains("unknown variant `equal`"));
    assert!(condition("0", "dword", r#"{"masked_ne": 1}"#, "").contains("unknown variant `masked_ne`"));
    assert!(condition("0", "dword", r#""masked_eq""#, "").contains("newtype variant"));
    assert!(condition("0", "dword", r#""eq""#, r#", "mask": 1"#).contains("unknown field `mask`"));

    let same = r#""mismatch_action": "allow", "match_action": "allow""#;
    assert!(error(file(same, "")).contains("the same"));
    let odd = r#""mismatch_action": "kill", "match_action": "allow""#;
    assert!(error(file(odd, "")).contains("unknown variant `kill`"));
    let more = format!(r#"{actions}, "default_action": "allow""#);
    assert!(error(file(&more, "")).contains("unknown field `default_action`"));

    let profile = file(actions, "");
    let body = &profile[1..profile.len() - 1];
    assert!(error(format!("{{{body}, {body}}}")).contains("one profile, named p"));
    assert!(error(profile.replacen('p', "q", 1)).contains("one profile, named p"));
    assert!(error("{}".to_owned()).contains("one profile, named p"));
}
