//! Saving machines and restoring them: the real program with guests of a few instructions.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bulkhead_vmm::template::{self, MachineState};
use bulkhead_vmm_protocol::{ExitReason, MemorySource, RefusalKind, Request, RestoreConfig};
use common::guest::{Code, DATA, Driver};
use common::process::{Boot, Vmm, file_with, kvm_or_skip};

const CONSOLE: u64 = 0;
const ENTROPY: u64 = 1;
const VSOCK: u64 = 2;
const DISK: u64 = 3;
/// Set by the guest when it is ready to be saved, and by the test to let it go on.
const FLAG: u64 = DATA + 0x8000;
const RANDOM: u64 = DATA + 0x100;
const HEADER: u64 = DATA + 0x200;
const STATUS: u64 = DATA + 0x300;
const SECTOR: u64 = DATA + 0x1000;
const MEMORY: u64 = 64 << 20;

/// A guest that uses every device, waits to be saved, and uses them again when the test lets it go on.
fn guest() -> Vec<u8> {
    let [console, entropy, vsock, disk] = [CONSOLE, ENTROPY, VSOCK, DISK].map(Driver::new);
    let mut code = console.initialise(Code::new(), 3, 2).store_bytes(DATA, b"before\n\0");
    code = console.descriptor(code, 1, 0, DATA, 7, 0);
    code = entropy.initialise(code, 4, 1);
    code = entropy.descriptor(code, 0, 0, RANDOM, 8, 2);
    code = vsock.initialise(code, 19, 3);
    code = disk.initialise(code, 2, 1).store32(HEADER, 0).store64(HEADER + 8, 1).store32(STATUS, 0xee);
    code = disk.descriptor(code, 0, 0, HEADER, 16, 1);
    code = disk.descriptor(code, 0, 1, SECTOR, 512, 1 | 2);
    code = disk.descriptor(code, 0, 2, STATUS, 1, 2);
    let use_all = |mut code: Code, count| {
        for (driver, queue) in [(&console, 1), (&entropy, 0), (&disk, 0)] {
            code = driver.kick(code, queue, count);
            code = driver.wait(code, queue.into(), count);
        }
        code.expect8(STATUS, 0).expect8(SECTOR + 511, 0xbb).store32(STATUS, 0xee).store32(SECTOR + 508, 0)
    };
    code = use_all(code, 1).store32(FLAG, 1).wait32(FLAG, 2).store_bytes(DATA, b"after!\n\0");
    use_all(code, 2).power_off().kernel()
}

fn memory_file() -> File {
    let file = File::from(file_with(b""));
    file.set_len(MEMORY).unwrap();
    file
}

fn boot_with(memory: &File) -> Boot {
    let mut boot = Boot::new(&guest());
    boot.prepare.memory = MemorySource::Shared(boot.pass_first(memory.try_clone().unwrap().into()));
    boot.disk(&[[0xaa; 512], [0xbb; 512]].concat(), true);
    boot
}

fn wait_for_flag(memory: &File) {
    let start = Instant::now();
    let mut word = [0; 4];
    while word != [1, 0, 0, 0] {
        assert!(start.elapsed() < Duration::from_secs(20), "the guest didn't get ready");
        memory.read_exact_at(&mut word, FLAG).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn save(vmm: &mut Vmm) -> (MachineState, Vec<u8>) {
    let mut file = File::from(file_with(b""));
    vmm.control.send(&Request::Save, &[file.as_fd()]).unwrap();
    vmm.reply().unwrap();
    let state = template::read(&mut file).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    (state, bytes)
}

fn restore(mut boot: Boot, state: OwnedFd) -> (Vmm, Result<(), bulkhead_vmm_protocol::Refusal>) {
    let state = boot.pass(state);
    boot.start_with(|config| Request::Restore(Box::new(RestoreConfig { config, state })))
}

#[test]
fn a_saved_machine_goes_on_and_saves_the_same_again() {
    if !kvm_or_skip("a_saved_machine_goes_on_and_saves_the_same_again") {
        return;
    }
    let memory = memory_file();
    let (mut vmm, reply) = boot_with(&memory).start();
    reply.unwrap();
    wait_for_flag(&memory);
    let (first, bytes) = save(&mut vmm);
    vmm.control.send(&Request::Save, &[]).unwrap();
    assert_eq!(vmm.reply().unwrap_err().kind, RefusalKind::InvalidRequest, "it has stopped");
    drop(vmm);

    // Again, without letting it go on: everything but registers and time must be the same.
    let (mut vmm, reply) = restore(boot_with(&memory), file_with(&bytes));
    reply.unwrap();
    let (second, _) = save(&mut vmm);
    assert_eq!(
        (&second.devices, &second.ioapic, &second.cpuid),
        (&first.devices, &first.ioapic, &first.cpuid)
    );
    assert!(second.clock.0.clock >= first.clock.0.clock, "time went backwards");
    let tsc = |state: &MachineState| state.vcpus[0].tsc();
    assert!(tsc(&second) >= tsc(&first), "the time stamp counter went backwards");
    drop(vmm);

    // And to the end, several times from the same files.
    memory.write_all_at(&[2, 0, 0, 0], FLAG).unwrap();
    for _ in 0..2 {
        let mut boot = boot_with(&memory);
        let MemorySource::Shared(file) = boot.prepare.memory else { panic!() };
        boot.prepare.memory = MemorySource::Private(file);
        // A list of pages that the guest does not have: it goes on without.
        let working_set = boot.pass_first(file_with(&[0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0]));
        boot.prepare.working_set = Some(working_set);
        let (vmm, reply) = restore(boot, file_with(&bytes));
        reply.unwrap();
        assert_eq!(vmm.wait_for_end(), (ExitReason::PowerOff, "after!\n".to_owned()));
    }
    let mut text = [0; 7];
    memory.read_exact_at(&mut text, DATA).unwrap();
    assert_eq!(&text, b"before\n", "a restored machine wrote to the template");
}

#[test]
fn what_can_not_be_restored_is_refused() {
    if !kvm_or_skip("what_can_not_be_restored_is_refused") {
        return;
    }
    let memory = memory_file();
    let (mut vmm, reply) = boot_with(&memory).start();
    reply.unwrap();
    wait_for_flag(&memory);
    let (_, bytes) = save(&mut vmm);
    drop(vmm);

    let refused = |what: &str, change: &dyn Fn(&mut Boot), state: &[u8], why: &str| {
        let mut boot = boot_with(&memory);
        change(&mut boot);
        let (mut vmm, reply) = restore(boot, file_with(state));
        let refusal = reply.expect_err(what);
        assert_eq!(refusal.kind, RefusalKind::Template, "{what}: {refusal}");
        assert!(refusal.message.contains(why), "{what}: {refusal}");
        assert!(vmm.wait().success(), "{what}");
    };
    refused("an empty state", &|_| (), b"", "no saved machine");
    refused("half a state", &|_| (), &bytes[..bytes.len() / 2], "cut short");
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 2] ^= 4;
    refused("a damaged state", &|_| (), &damaged, "checksum");
    refused(
        "memory of its own",
        &|boot| boot.prepare.memory = MemorySource::Anonymous,
        &bytes,
        "memory file",
    );
    refused("two vCPUs", &|boot| boot.prepare.vcpus = 2, &bytes, "vCPUs");
    refused("another context id", &|boot| boot.config.vsock.guest_cid = 4, &bytes, "configuration");
    refused("another disk", &|boot| drop(boot.disk(&[0; 512], true)), &bytes, "devices");
}

#[test]
fn a_machine_in_memory_of_its_own_is_not_saved() {
    if !kvm_or_skip("a_machine_in_memory_of_its_own_is_not_saved") {
        return;
    }
    let (mut vmm, reply) = Boot::new(&Code::new().hang().kernel()).start();
    reply.unwrap();
    let file = File::from(file_with(b""));
    vmm.control.send(&Request::Save, &[file.as_fd()]).unwrap();
    assert_eq!(vmm.reply().unwrap_err().kind, RefusalKind::Template);
}
