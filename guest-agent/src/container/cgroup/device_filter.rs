//! Which devices a container may use: an eBPF program on its group (`linux.resources.devices`).
//!
//! The program gets the kind of access, the kind of device and its numbers, and tries the rules from the last to the first;
//! the first that fits decides. What no rule fits is refused.

use std::io;
use std::os::fd::OwnedFd;

use bulkhead_bpf::code::{
    AND_32, CONTEXT, EXIT, JUMP_EQUAL_32, JUMP_NOT_EQUAL_32, LOAD_WORD, MOVE_32, MOVE_REGISTER_32, RESULT,
    SHIFT_RIGHT_32,
};
use bulkhead_bpf::{Instruction, Moment, ProgramKind, instruction};

use super::super::spec;
use super::Cgroup;

/// Kinds of access, from `linux/bpf.h`.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// A wrong rule, or a program that the kernel did not take.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum DeviceFilterError {
    #[error("linux.resources.devices: there is no device type {0:?}")]
    Kind(String),
    #[error("linux.resources.devices: {0:?} is not an access of r, w and m")]
    Access(String),
    #[error("linux.resources.devices: {0} is not a device number")]
    Number(i64),
    #[error("the kernel refused the device filter")]
    Load(#[source] io::Error),
    #[error("can't attach the device filter to the cgroup")]
    Attach(#[source] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `None` means both kinds.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    const fn character(major: u32, minor: Option<u32>) -> Self {
        Self { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: READ | WRITE | MKNOD }
    }

    const fn mknod(kind: u32) -> Self {
        Self { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD }
    }

    fn new(rule: &spec::DeviceRule) -> Result<Self, DeviceFilterError> {
        let kind = match rule.kind.as_deref() {
            None | Some("" | "a") => None,
            Some("c") => Some(CHARACTER),
            Some("b") => Some(BLOCK),
            Some(other) => return Err(DeviceFilterError::Kind(other.to_owned())),
        };
        let number = |number: Option<i64>| match number {
            None | Some(-1) => Ok(None),
            Some(number) => u32::try_from(number).map(Some).map_err(|_| DeviceFilterError::Number(number)),
        };
        let text = rule.access.as_deref().unwrap_or_default();
        let access = text.chars().try_fold(0, |access, c| match c {
            'r' => Ok(access | READ),
            'w' => Ok(access | WRITE),
            'm' => Ok(access | MKNOD),
            _ => Err(DeviceFilterError::Access(text.to_owned())),
        })?;
        // A rule without any access means all of them, as in other runtimes.
        let access = if access == 0 { READ | WRITE | MKNOD } else { access };
        Ok(Self { allow: rule.allow, kind, major: number(rule.major)?, minor: number(rule.minor)?, access })
    }

    fn is_everything(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == READ | WRITE | MKNOD
    }
}

/// What every container may use, whatever the rules say: the default devices, terminals, and making nodes.
const ALWAYS: [Rule; 10] = [
    Rule::mknod(CHARACTER),
    Rule::mknod(BLOCK),
    Rule::character(1, Some(3)),
    Rule::character(1, Some(5)),
    Rule::character(1, Some(7)),
    Rule::character(1, Some(8)),
    Rule::character(1, Some(9)),
    Rule::character(5, Some(0)),
    Rule::character(5, Some(2)),
    Rule::character(136, None),
];

/// A checked list of rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFilter {
    /// In the order of the specification; `None` when everything is allowed and there is nothing to filter.
    rules: Option<Vec<Rule>>,
}

impl DeviceFilter {
    /// Reads the rules of the specification.
    pub(crate) fn new(rules: &[spec::DeviceRule]) -> Result<Self, DeviceFilterError> {
        let mut rules = rules.iter().map(Rule::new).collect::<Result<Vec<_>, _>>()?;
        // What comes before a rule for everything has no effect.
        if let Some(last) = rules.iter().rposition(Rule::is_everything) {
            rules.drain(..last);
        }
        if matches!(rules.as_slice(), [rule] if rule.allow && rule.is_everything()) {
            return Ok(Self { rules: None });
        }
        rules.extend(ALWAYS);
        Ok(Self { rules: Some(rules) })
    }

    /// Attaches the filter to a group, where it stays until the group is gone or `old` is replaced.
    pub(crate) fn attach(&self, cgroup: &Cgroup) -> Result<Option<AttachedFilter>, DeviceFilterError> {
        let Some(rules) = &self.rules else { return Ok(None) };
        let program = load(&compile(rules)).map_err(DeviceFilterError::Load)?;
        bulkhead_bpf::attach(&program, cgroup.directory(), Moment::Device)
            .map_err(DeviceFilterError::Attach)?;
        Ok(Some(AttachedFilter { program }))
    }
}

/// A filter on a group.
#[derive(Debug)]
pub(crate) struct AttachedFilter {
    program: OwnedFd,
}

impl AttachedFilter {
    /// Takes the filter off the group again, after another one has been attached.
    pub(crate) fn detach(self, cgroup: &Cgroup) -> Result<(), DeviceFilterError> {
        bulkhead_bpf::detach(&self.program, cgroup.directory(), Moment::Device)
            .map_err(DeviceFilterError::Attach)
    }
}

/// Registers: the four values of a request.
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 1;

/// Translates the rules into a program (`struct bpf_cgroup_dev_ctx`: access << 16 | kind, major, minor).
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER_32, ACCESS, KIND, 0, 0),
        instruction(SHIFT_RIGHT_32, ACCESS, 0, 0, 16),
        instruction(AND_32, KIND, 0, 0, 0xffff),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(rule));
        if rule.is_everything() {
            // The kernel takes no instructions that can't be reached.
            return program;
        }
    }
    program.extend(result(false));
    program
}

fn result(allow: bool) -> [Instruction; 2] {
    [instruction(MOVE_32, RESULT, 0, 0, allow.into()), instruction(EXIT, 0, 0, 0, 0)]
}

/// Conditions jump behind the rule's result when they don't hold.
fn compile_rule(rule: &Rule) -> Vec<Instruction> {
    let mut block = Vec::new();
    if let Some(kind) = rule.kind {
        block.push(instruction(JUMP_NOT_EQUAL_32, KIND, 0, 0, kind));
    }
    if rule.access != READ | WRITE | MKNOD {
        block.push(instruction(MOVE_REGISTER_32, SCRATCH, ACCESS, 0, 0));
        if rule.allow {
            // Every access asked for has to be among the rule's.
            block.push(instruction(AND_32, SCRATCH, 0, 0, !rule.access));
            block.push(instruction(JUMP_NOT_EQUAL_32, SCRATCH, 0, 0, 0));
        } else {
            // One of them is enough for a refusal.
            block.push(instruction(AND_32, SCRATCH, 0, 0, rule.access));
            block.push(instruction(JUMP_EQUAL_32, SCRATCH, 0, 0, 0));
        }
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number {
            block.push(instruction(JUMP_NOT_EQUAL_32, register, 0, 0, number));
        }
    }
    block.extend(result(rule.allow));
    let length = block.len();
    for (position, instruction) in block.iter_mut().enumerate() {
        if matches!(instruction.code, JUMP_NOT_EQUAL_32 | JUMP_EQUAL_32) {
            instruction.offset = (length - position - 1) as i16;
        }
    }
    block
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    bulkhead_bpf::load(ProgramKind::CgroupDevice, Moment::Device, "", program)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(json: &str) -> Result<DeviceFilter, DeviceFilterError> {
        DeviceFilter::new(&serde_json::from_str::<Vec<spec::DeviceRule>>(json).unwrap())
    }

    /// Executes the program as the kernel does.
    fn allowed(filter: &DeviceFilter, kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let Some(rules) = &filter.rules else { return true };
        let program = compile(rules);
        let mut registers = [0u32; 6];
        let mut position = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[position];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let immediate = immediate as u32;
            position += 1;
            let jump = usize::try_from(offset).unwrap();
            match code {
                LOAD_WORD => registers[to] = [access << 16 | kind, major, minor][jump / 4],
                MOVE_32 => registers[to] = immediate,
                MOVE_REGISTER_32 => registers[to] = registers[from],
                AND_32 => registers[to] &= immediate,
                SHIFT_RIGHT_32 => registers[to] >>= immediate,
                JUMP_NOT_EQUAL_32 if registers[to] != immediate => position += jump,
                JUMP_EQUAL_32 if registers[to] == immediate => position += jump,
                JUMP_NOT_EQUAL_32 | JUMP_EQUAL_32 => {}
                EXIT => return registers[0] != 0,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn by_default_only_the_usual_devices_work() {
        for json in ["[]", r#"[{"allow": false, "access": "rwm"}]"#] {
            let filter = filter(json).unwrap();
            assert!(allowed(&filter, CHARACTER, READ | WRITE, 1, 3), "null");
            assert!(allowed(&filter, CHARACTER, READ, 136, 7), "a terminal");
            assert!(allowed(&filter, BLOCK, MKNOD, 8, 0), "making a node");
            assert!(!allowed(&filter, BLOCK, READ, 8, 0), "using it");
            assert!(!allowed(&filter, CHARACTER, READ, 1, 1), "memory");
            assert!(!allowed(&filter, BLOCK, READ, 1, 3), "a block device with the numbers of null");
        }
    }

    #[test]
    fn later_rules_overrule_earlier_ones() {
        let filter = filter(
            r#"[{"allow": true, "type": "b", "major": 8, "access": "rw"}, {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": -1, "access": "rw"},
                {"allow": false, "type": "b", "major": 7, "minor": 1, "access": "w"}]"#,
        )
        .unwrap();
        assert!(!allowed(&filter, BLOCK, READ, 8, 0), "a rule for everything came later");
        assert!(allowed(&filter, BLOCK, READ | WRITE, 7, 0));
        assert!(allowed(&filter, BLOCK, READ, 7, 1));
        assert!(!allowed(&filter, BLOCK, READ | WRITE, 7, 1), "one forbidden access is enough");
        assert!(!allowed(&filter, CHARACTER, READ, 7, 0));
    }

    #[test]
    fn a_container_may_be_allowed_everything() {
        let filter = filter(r#"[{"allow": false}, {"allow": true, "access": "rwm"}]"#).unwrap();
        assert_eq!(filter.rules, None);
    }

    #[test]
    fn wrong_rules_are_refused() {
        assert!(matches!(filter(r#"[{"type": "x"}]"#), Err(DeviceFilterError::Kind(_))));
        assert!(matches!(filter(r#"[{"access": "rx"}]"#), Err(DeviceFilterError::Access(_))));
        assert!(matches!(filter(r#"[{"major": -2}]"#), Err(DeviceFilterError::Number(-2))));
    }

    #[test]
    fn the_kernel_accepts_the_program() {
        let DeviceFilter { rules } = filter(
            r#"[{"allow": false}, {"allow": true, "type": "b", "major": 7, "access": "rw"},
                {"allow": false, "type": "b", "minor": 4000000000, "access": "w"}]"#,
        )
        .unwrap();
        load(&compile(&rules.unwrap())).unwrap();
    }
}
