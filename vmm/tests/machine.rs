//! The real program with guests of a few instructions, on whatever KVM this machine has.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use bulkhead_vmm_protocol::{
    AttachDisk, AttachNet, DiskRole, ExitReason, FromVmm, NetOffloads, RefusalKind, Request,
};
use common::guest::{Code, DATA, Driver, LOAD, MMIO, WINDOW};
use common::process::{Boot, Vmm, file_with, kvm_or_skip};

/// Windows: console, entropy, vsock, a file system if there is one, disks.
const CONSOLE: u64 = 0;
const ENTROPY: u64 = 1;
const DISK: u64 = 3;

#[test]
fn power_off_reset_panic_and_triple_fault_are_told_apart() {
    if !kvm_or_skip("power_off_reset_panic_and_triple_fault_are_told_apart") {
        return;
    }
    let reset = Code::new().out(0x64, 0xfe).hang();
    let panic = Code::new().store16(0x472, 0x1234).then(reset.clone());
    for (code, reason) in [
        (Code::new().power_off(), ExitReason::PowerOff),
        (reset, ExitReason::Reset),
        (panic, ExitReason::Panic),
        (Code::new().fault(), ExitReason::TripleFault),
    ] {
        assert_eq!(Boot::new(&code.kernel()).run().0, reason);
    }
}

#[test]
fn a_vcpu_that_can_not_go_on_is_reported() {
    if !kvm_or_skip("a_vcpu_that_can_not_go_on_is_reported") {
        return;
    }
    // Jump to an address where there is no memory: nothing to execute there.
    let code = Code::new().jump(0xc000_0000);
    let (reason, _) = Boot::new(&code.kernel()).run();
    let ExitReason::VcpuFailed { vcpu: 0, detail } = reason else { panic!("{reason:?}") };
    assert!(detail.contains("rip 0xc0000000"), "{detail}");
}

#[test]
fn ports_and_windows_that_do_not_exist_read_as_ones() {
    if !kvm_or_skip("ports_and_windows_that_do_not_exist_read_as_ones") {
        return;
    }
    let code = Code::new()
        .expect_in(0x64, 0)
        .expect_in(0x21, 0xff)
        .out(0x80, 7)
        .expect32(MMIO + 40 * WINDOW, u32::MAX)
        .store32(MMIO + 40 * WINDOW, 1)
        .power_off();
    assert_eq!(Boot::new(&code.kernel()).run().0, ExitReason::PowerOff);
}

/// What KVM has for guests and CPUID doesn't show: there all the same, unless KVM is told otherwise (since Linux 5.9).
#[test]
fn paravirtual_registers_that_are_not_shown_are_not_there() {
    const NAME: &str = "paravirtual_registers_that_are_not_shown_are_not_there";
    const STEAL_TIME: u32 = 0x4b56_4d03;
    const OLD_CLOCK: u32 = 0x12;
    const ASYNCHRONOUS_PAGE_FAULTS: u32 = 0x4b56_4d02;
    if !kvm_or_skip(NAME) {
        return;
    }
    let after = |msr| Boot::new(&Code::new().clear_msr(msr).power_off().kernel()).run().0;
    assert_eq!(after(STEAL_TIME), ExitReason::PowerOff);
    for msr in [OLD_CLOCK, ASYNCHRONOUS_PAGE_FAULTS] {
        assert_eq!(after(msr), ExitReason::TripleFault, "{msr:#x}");
    }
}

#[test]
fn the_guest_starts_with_its_command_line_and_memory_map() {
    if !kvm_or_skip("the_guest_starts_with_its_command_line_and_memory_map") {
        return;
    }
    let code = Code::new()
        .expect32(0x7000 + 0x202, 0x5372_6448)
        .expect32(0x7000 + 0x228, 0x2_0000)
        .expect8(0x7000 + 0x1e8, 3)
        .expect32(0x2_0000, u32::from_le_bytes(*b"cons"))
        .expect32(0x9_fc00, u32::from_le_bytes(*b"_MP_"))
        .power_off();
    assert_eq!(Boot::new(&code.kernel()).run().0, ExitReason::PowerOff);
}

#[test]
fn the_console_prints_what_the_guest_sends() {
    if !kvm_or_skip("the_console_prints_what_the_guest_sends") {
        return;
    }
    let driver = Driver::new(CONSOLE);
    let mut code = driver.initialise(Code::new(), 3, 2).store_bytes(DATA, b"hello from a tiny guest\n");
    code = driver.descriptor(code, 1, 0, DATA, 24, 0);
    code = driver.kick(code, 1, 1);
    code = driver.wait(code, 1, 1);
    // The second time without waiting: what was sent before the end arrives all the same.
    code = driver.kick(code, 1, 2).power_off();
    let (reason, output) = Boot::new(&code.kernel()).run();
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(output, "hello from a tiny guest\nhello from a tiny guest\n");
}

#[test]
fn the_entropy_device_answers_and_interrupts_through_the_ioapic() {
    if !kvm_or_skip("the_entropy_device_answers_and_interrupts_through_the_ioapic") {
        return;
    }
    const VECTOR: u64 = 0x40;
    const IDT: u64 = 0x28_0000;
    const IDT_POINTER: u64 = 0x28_2000;
    let driver = Driver::new(ENTROPY);

    // The interrupt's handler powers off: it is the only way for this guest to end well.
    let handler = Code::new().power_off();
    let skip = 2;
    let handler_address = LOAD + skip;
    let start = Code::new().jump_over(&handler);

    let mut code = start
        .store64(
            IDT + 16 * VECTOR,
            handler_address & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler_address >> 16) << 48,
        )
        .store64(IDT + 16 * VECTOR + 8, 0)
        .store16(IDT_POINTER, 0xfff)
        .store64(IDT_POINTER + 2, IDT)
        .load_idt(IDT_POINTER)
        // Local APIC on; IOAPIC entry of the device (pin 10): fixed, edge, to APIC 0.
        .store32(0xfee0_00f0, 0x1ff)
        .store32(0xfec0_0000, 0x10 + 2 * 10 + 1)
        .store32(0xfec0_0010, 0)
        .store32(0xfec0_0000, 0x10 + 2 * 10)
        .store32(0xfec0_0010, VECTOR as u32);
    code = driver.initialise(code, 4, 1);
    code = driver.descriptor(code, 0, 0, DATA, 8, 2);
    code = driver.kick(code, 0, 1);
    code = driver.wait(code, 0, 1);
    code = code.expect32(driver.rings(0).2 + 8, 8).expect32(driver.window + 0x60, 1).halt();
    assert_eq!(Boot::new(&code.kernel()).run().0, ExitReason::PowerOff);
}

#[test]
fn a_disk_is_read_and_written() {
    if !kvm_or_skip("a_disk_is_read_and_written") {
        return;
    }
    const HEADER: u64 = DATA;
    const STATUS: u64 = DATA + 0x100;
    const SECTOR: u64 = DATA + 0x1000;
    let disk = Driver::new(DISK);
    let mut code = disk.initialise(Code::new(), 2, 1).expect32(disk.window + 0x100, 2);
    // Read sector 1, then write what came to sector 0.
    code = code.store32(HEADER, 0).store64(HEADER + 8, 1).store32(STATUS, 0xee);
    code = disk.descriptor(code, 0, 0, HEADER, 16, 1);
    code = disk.descriptor(code, 0, 1, SECTOR, 512, 1 | 2);
    code = disk.descriptor(code, 0, 2, STATUS, 1, 2);
    code = disk.kick(code, 0, 1);
    code = disk.wait(code, 0, 1).expect8(STATUS, 0).expect8(SECTOR + 511, 0xbb);
    code = code.store32(HEADER, 1).store64(HEADER + 8, 0);
    code = disk.descriptor(code, 0, 1, SECTOR, 512, 1);
    code = disk.kick(code, 0, 2);
    code = disk.wait(code, 0, 2).expect8(STATUS, 0).power_off();

    let mut boot = Boot::new(&code.kernel());
    let contents = [[0xaa; 512], [0xbb; 512]].concat();
    let file = File::from(boot.disk(&contents, false));
    assert_eq!(boot.run().0, ExitReason::PowerOff);
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [0xbb; 512]);
}

#[test]
fn disks_come_and_go_in_a_running_machine() {
    if !kvm_or_skip("disks_come_and_go_in_a_running_machine") {
        return;
    }
    // The second slot, behind the balloon and no other disks.
    let (slot, disk) = (1, Driver::new(DISK + 2));
    let (_, available, used) = disk.rings(0);
    // Neither a free slot nor a new disk has been told anything, and the old disk has.
    let new_disk = |code: Code| code.wait32(disk.window + 0x70, 0).wait32(disk.window + 8, 2);
    let mut code = Code::new();
    for _ in 0..2 {
        code = new_disk(code);
        code = code.store16(available + 2, 0).store16(used + 2, 0);
        code = disk.initialise(code, 2, 1).expect32(disk.window + 0x114, 4096);
        // Write 0x11 to the first byte of sector 3.
        code = code
            .store32(DATA, 1)
            .store64(DATA + 8, 3)
            .store32(DATA + 0x100, 0xee)
            .store32(DATA + 0x1000, 0x11);
        code = disk.descriptor(code, 0, 0, DATA, 16, 1);
        code = disk.descriptor(code, 0, 1, DATA + 0x1000, 512, 1);
        code = disk.descriptor(code, 0, 2, DATA + 0x100, 1, 2);
        code = disk.kick(code, 0, 1);
        code = disk.wait(code, 0, 1).expect8(DATA + 0x100, 0);
    }
    let (mut vmm, reply) = Boot::new(&new_disk(code).power_off().kernel()).start();
    reply.unwrap();

    let disk = |slot| AttachDisk {
        slot,
        role: DiskRole::Root,
        read_only: false,
        serial: "test".into(),
        block_size: 4096,
        parts: Vec::new(),
    };
    let detach = |vmm: &mut Vmm, slot| {
        vmm.control.send(&Request::DetachDevice { slot }, &[]).unwrap();
        vmm.reply()
    };
    for _ in 0..2 {
        let file = File::from(file_with(&[0; 4096]));
        let attach = |vmm: &mut Vmm, slot| {
            vmm.control.send(&Request::AttachDisk(disk(slot)), &[file.as_fd()]).unwrap();
            vmm.reply()
        };
        attach(&mut vmm, slot).unwrap();
        for wrong in [slot, 10, 255] {
            assert_eq!(attach(&mut vmm, wrong).unwrap_err().kind, RefusalKind::InvalidRequest, "{wrong}");
        }
        let start = Instant::now();
        let mut byte = [0];
        while byte != [0x11] {
            assert!(start.elapsed() < Duration::from_secs(20), "the guest wrote nothing");
            file.read_exact_at(&mut byte, 3 * 512).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        detach(&mut vmm, slot).unwrap();
        for wrong in [slot, 0, 10] {
            assert_eq!(detach(&mut vmm, wrong).unwrap_err().kind, RefusalKind::InvalidRequest, "{wrong}");
        }
    }
    vmm.control.send(&Request::AttachDisk(disk(slot)), &[]).unwrap();
    assert_eq!(vmm.reply().unwrap_err().kind, RefusalKind::InvalidRequest, "without a descriptor");
    let file = file_with(&[0; 4096]);
    vmm.control.send(&Request::AttachDisk(disk(slot)), &[file.as_fd()]).unwrap();
    vmm.reply().unwrap();
    assert_eq!(vmm.wait_for_end().0, ExitReason::PowerOff);
}

#[test]
fn a_slot_takes_a_network_interface_after_a_disk() {
    if !kvm_or_skip("a_slot_takes_a_network_interface_after_a_disk") {
        return;
    }
    const MRG_RXBUF: u32 = 1 << 15;
    let (slot, net) = (0, Driver::new(DISK + 1));
    let mut code = Code::new().wait32(net.window + 8, 2).wait32(net.window + 8, 1);
    code = net.initialise_with(code, 1, 2, MRG_RXBUF).expect32(net.window + 0x100, 0x3322_1102);
    // A buffer to receive into, and a packet of zeroes to send.
    code = net.descriptor(code, 0, 0, DATA, 2048, 2);
    code = net.kick(code, 0, 1);
    code = net.descriptor(code, 1, 0, DATA + 0x1000, 12 + 60, 0);
    code = net.kick(code, 1, 1);
    code = net.wait(code, 1, 1);
    code = net.wait(code, 0, 1).expect8(DATA + 12, 0x77).expect32(net.rings(0).2 + 8, 12 + 100);
    let (mut vmm, reply) = Boot::new(&code.power_off().kernel()).start();
    reply.unwrap();

    let disk = AttachDisk {
        slot,
        role: DiskRole::Volume,
        read_only: false,
        serial: "test".into(),
        block_size: 512,
        parts: Vec::new(),
    };
    vmm.control.send(&Request::AttachDisk(disk), &[file_with(&[0; 4096]).as_fd()]).unwrap();
    vmm.reply().unwrap();
    // Stays for long enough to be seen.
    std::thread::sleep(Duration::from_millis(200));
    vmm.control.send(&Request::DetachDevice { slot }, &[]).unwrap();
    vmm.reply().unwrap();

    let offloads = NetOffloads { checksum_and_tso: false, uso: false };
    let request = AttachNet { slot, mac: [2, 0x11, 0x22, 0x33, 4, 5], mtu: 1500, queue_pairs: 1, offloads };
    let (tap, wire) = UnixDatagram::pair().unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    vmm.control.send(&Request::AttachNet(request.clone()), &[tap.as_fd(), wire.as_fd()]).unwrap();
    assert_eq!(vmm.reply().unwrap_err().kind, RefusalKind::InvalidRequest, "two queues for one pair");
    vmm.control.send(&Request::AttachNet(request), &[tap.as_fd()]).unwrap();
    vmm.reply().unwrap();
    let mut packet = [0x77; 4096];
    assert_eq!(wire.recv(&mut packet).unwrap(), 12 + 60);
    assert_eq!(packet[..72], [0; 72]);
    packet[12..].fill(0x77);
    wire.send(&packet[..112]).unwrap();
    assert_eq!(vmm.wait_for_end().0, ExitReason::PowerOff);
}

#[test]
fn a_driver_that_breaks_the_rules_finds_the_device_stopped() {
    if !kvm_or_skip("a_driver_that_breaks_the_rules_finds_the_device_stopped") {
        return;
    }
    let driver = Driver::new(ENTROPY);
    let mut code = driver.initialise(Code::new(), 4, 1);
    // A chain that links to itself.
    code = driver.descriptor(code, 0, 0, DATA, 8, 2);
    let flags = driver.rings(0).0 + 12;
    code = code.store32(flags, 3);
    code = driver.kick(code, 0, 1);
    code = code.wait32(driver.window + 0x60, 2).expect32(driver.window + 0x70, 64 + 15);
    // The other devices go on, and so does this one after a reset.
    code = code.store32(driver.window + 0x70, 0).expect32(driver.window + 0x70, 0).power_off();
    assert_eq!(Boot::new(&code.kernel()).run().0, ExitReason::PowerOff);
}

#[test]
fn a_guest_that_hangs_is_killed_with_its_shim() {
    if !kvm_or_skip("a_guest_that_hangs_is_killed_with_its_shim") {
        return;
    }
    for code in [Code::new().hang(), Code::new().halt()] {
        let mut boot = Boot::new(&code.kernel());
        boot.prepare.vcpus = 2;
        let (vmm, reply) = boot.start();
        reply.unwrap();
        let (mut child_only, control) = vmm.into_parts();
        let start = Instant::now();
        drop(control);
        child_only.wait();
        assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
    }
}

#[test]
fn requests_out_of_order_are_refused() {
    if !kvm_or_skip("requests_out_of_order_are_refused") {
        return;
    }
    let (mut vmm, reply) = Boot::new(&Code::new().hang().kernel()).start();
    reply.unwrap();
    let second = Boot::new(&Code::new().hang().kernel());
    let fds: Vec<_> = second.fds.iter().map(AsFd::as_fd).collect();
    vmm.control.send(&Request::Boot(Box::new(second.config.clone())), &fds).unwrap();
    assert_eq!(vmm.reply().unwrap_err().kind, RefusalKind::InvalidRequest);
    vmm.control.send(&"nonsense", &[]).unwrap();
    assert_eq!(vmm.reply().unwrap_err().kind, RefusalKind::InvalidRequest);
}

#[test]
fn what_can_not_be_booted_is_refused_with_its_kind() {
    if !kvm_or_skip("what_can_not_be_booted_is_refused_with_its_kind") {
        return;
    }
    let kernel = Code::new().power_off().kernel();
    type Change = fn(&mut Boot);
    let cases: [(&str, Change, RefusalKind); 7] = [
        (
            "no kernel",
            |boot| boot.fds[0] = common::process::file_with(b"nothing of the kind"),
            RefusalKind::Kernel,
        ),
        (
            "a truncated kernel",
            |boot| boot.fds[0] = common::process::file_with(&Code::new().power_off().kernel()[..125]),
            RefusalKind::Kernel,
        ),
        ("no KVM", |boot| boot.prepare_fds[0] = File::open("/dev/null").unwrap().into(), RefusalKind::Kvm),
        ("no vCPU", |boot| boot.prepare.vcpus = 0, RefusalKind::InvalidRequest),
        ("too little memory", |boot| boot.prepare.memory_mib = 1, RefusalKind::InvalidRequest),
        ("a long command line", |boot| boot.config.cmdline = "x".repeat(3000), RefusalKind::InvalidRequest),
        (
            "a pipe as a disk",
            |boot| {
                let (reader, _writer) = std::io::pipe().unwrap();
                let file = boot.pass(reader.into());
                boot.config.disks.push(bulkhead_vmm_protocol::BlockConfig {
                    file,
                    read_only: true,
                    serial: String::new(),
                });
            },
            RefusalKind::Disk,
        ),
    ];
    for (what, change, kind) in cases {
        let mut boot = Boot::new(&kernel);
        change(&mut boot);
        let (mut vmm, reply) = boot.start();
        let refusal = reply.expect_err(what);
        assert_eq!(refusal.kind, kind, "{what}: {refusal}");
        assert!(vmm.wait().success(), "{what}");
    }
}

#[test]
fn a_vmm_whose_shim_says_nothing_ends_with_it() {
    let vmm = Vmm::spawn(env!("CARGO_BIN_EXE_bulkhead-vmm"));
    let (mut child, control) = vmm.into_parts();
    drop(control);
    child.wait();
}

#[test]
fn the_machines_own_kvm_can_be_measured() {
    if !kvm_or_skip("the_machines_own_kvm_can_be_measured") {
        return;
    }
    let speed = bulkhead_vmm::calibrate::measure(std::path::Path::new("/dev/kvm")).unwrap();
    assert!((10_000.0..1e11).contains(&speed.guest), "{speed:?}");
    assert!((1e-6..10.0).contains(&speed.ratio()), "{speed:?}");
}

#[test]
fn nothing_is_sent_that_was_not_asked_for() {
    if !kvm_or_skip("nothing_is_sent_that_was_not_asked_for") {
        return;
    }
    let (vmm, reply) = Boot::new(&Code::new().hang().kernel()).start();
    reply.unwrap();
    vmm.control.set_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(matches!(vmm.control.receive::<FromVmm>(), Err(bulkhead_vmm_protocol::ChannelError::TimedOut)));
}
