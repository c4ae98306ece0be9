//! Guests that execute a byte code: queue and register operations as data, run by a loop of a few instructions.
//!
//! An operation is 16 bytes: an address or port, a value, a number that says what is done with them.

use super::guest::{Code, LOAD, MMIO, WINDOW};

/// Memory of the guest.
pub(crate) const RAM: u64 = 64 << 20;
/// Where buffers are: nothing of the guest's own is at or above it.
pub(crate) const BUFFERS: u64 = 0x100_0000;

/// Operations in order.
#[derive(Default, Clone)]
pub(crate) struct Program(Vec<u8>);

impl Program {
    fn operation(&mut self, address: u64, value: u32, number: u32) {
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self.0.extend(number.to_le_bytes());
    }

    pub(crate) fn store32(&mut self, address: u64, value: u32) {
        self.operation(address, value, 1);
    }

    pub(crate) fn store16(&mut self, address: u64, value: u16) {
        self.operation(address, value.into(), 2);
    }

    pub(crate) fn store8(&mut self, address: u64, value: u8) {
        self.operation(address, value.into(), 3);
    }

    /// Stores the value, zero-extended, in one access.
    pub(crate) fn store64_at_once(&mut self, address: u64, value: u32) {
        self.operation(address, value, 4);
    }

    pub(crate) fn store64(&mut self, address: u64, value: u64) {
        self.store32(address, value as u32);
        self.store32(address + 4, (value >> 32) as u32);
    }

    pub(crate) fn load32(&mut self, address: u64) {
        self.operation(address, 0, 5);
    }

    pub(crate) fn load8(&mut self, address: u64) {
        self.operation(address, 0, 6);
    }

    pub(crate) fn out8(&mut self, port: u16, value: u8) {
        self.operation(port.into(), value.into(), 7);
    }

    pub(crate) fn in8(&mut self, port: u16) {
        self.operation(port.into(), 0, 8);
    }

    /// Does nothing for so many rounds.
    pub(crate) fn spin(&mut self, rounds: u32) {
        self.operation(0, rounds.max(1), 9);
    }

    /// Waits until there is this value.
    pub(crate) fn wait32(&mut self, address: u64, value: u32) {
        self.operation(address, value, 10);
    }

    /// How many operations there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len() / 16
    }

    /// A kernel that runs this and powers off.
    pub(crate) fn kernel(mut self) -> Vec<u8> {
        self.operation(0, 0, 0);
        let program = LOAD + interpreter(0).len();
        interpreter(program).data(&self.0).kernel()
    }
}

/// The loop: rsi is the next operation, rbx its address, ecx its value, eax its number.
fn interpreter(program: u64) -> Code {
    const OPERATIONS: [(u8, &[u8]); 10] = [
        (1, &[0x89, 0x0b]),                          // mov [rbx], ecx
        (2, &[0x66, 0x89, 0x0b]),                    // mov [rbx], cx
        (3, &[0x88, 0x0b]),                          // mov [rbx], cl
        (4, &[0x48, 0x89, 0x0b]),                    // mov [rbx], rcx
        (5, &[0x8b, 0x13]),                          // mov edx, [rbx]
        (6, &[0x8a, 0x13]),                          // mov dl, [rbx]
        (7, &[0x89, 0xda, 0x89, 0xc8, 0xee]),        // mov edx, ebx; mov eax, ecx; out dx, al
        (8, &[0x89, 0xda, 0xec]),                    // mov edx, ebx; in al, dx
        (9, &[0x83, 0xe9, 0x01, 0x75, 0xfb]),        // sub ecx, 1; jnz back
        (10, &[0x8b, 0x13, 0x39, 0xca, 0x75, 0xfa]), // mov edx, [rbx]; cmp edx, ecx; jne back
    ];
    // mov rsi, program
    let start = Code::new().data(&[0x48, 0xbe]).data(&program.to_le_bytes());
    // mov rbx, [rsi]; mov ecx, [rsi + 8]; mov eax, [rsi + 12]; add rsi, 16
    let mut body = vec![0x48, 0x8b, 0x1e, 0x8b, 0x4e, 0x08, 0x8b, 0x46, 0x0c, 0x48, 0x83, 0xc6, 0x10];
    for (number, code) in OPERATIONS {
        // cmp eax, number; jne past this; the code; jmp to the top
        body.extend([0x83, 0xf8, number, 0x75, code.len() as u8 + 5]);
        body.extend(code);
        body.push(0xe9);
        let back = -(body.len() as i32 + 4);
        body.extend(back.to_le_bytes());
    }
    start.data(&body).power_off()
}

/// Random numbers, the same for a seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        dice.next();
        dice
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

const QUEUES: u64 = 3;
/// Where each device kind's requests go: console, entropy, vsock, file system, disk, balloon, network.
const REQUEST_QUEUE: [u64; 7] = [1, 0, 1, 1, 0, 2, 1];
/// And how many queues it has.
const QUEUES_OF: [u64; 7] = [2, 1, 3, 2, 1, 3, 2];

/// Rings of a device's queue, in order: descriptors, available, used.
fn rings(device: u64, queue: u64) -> [u64; 3] {
    let base = 0x80_0000 + device * 0x4_0000 + queue * 0x1_0000;
    [base, base + 0x8000, base + 0xc000]
}

/// A program under construction, and what its driver's side remembers.
struct Driver<'a> {
    program: Program,
    dice: &'a mut Dice,
    /// Of a hundred chances to do something wrong, how many are taken.
    wild: u64,
    /// The next index of each queue's available ring.
    next: [[u16; QUEUES as usize]; 8],
}

/// A program of so many steps for a machine with so many device windows.
///
/// Steps are what drivers do, in any order and with any values. Some programs are nearly well-behaved, so that they get somewhere,
/// others do nothing right. The last but one device is a network interface, and waited for.
pub(crate) fn random(dice: &mut Dice, steps: usize, devices: u64) -> Program {
    let wild = dice.one_of(&[2, 10, 40, 100]);
    let mut driver = Driver { program: Program::default(), dice, wild, next: [[0; 3]; 8] };
    driver.program.wait32(register(devices - 2, 8), 1);
    for device in 0..devices {
        if !driver.errs(15) {
            driver.initialise(device);
        }
    }
    for _ in 0..steps {
        let device = driver.dice.below(devices);
        match driver.dice.below(100) {
            0..60 => driver.request(device),
            60..70 => driver.program.spin(driver.dice.below(2000) as u32),
            70..75 => driver.initialise(device),
            75..80 => driver.program.store32(register(device, 0x64), driver.dice.next() as u32 & 3),
            _ if driver.errs(100) => driver.anything(device),
            _ => driver.program.load32(register(device, driver.dice.below(0x120) & !3)),
        }
    }
    driver.program
}

fn register(device: u64, offset: u64) -> u64 {
    MMIO + device * WINDOW + offset
}

impl Driver<'_> {
    /// Whether to do something wrong that a wild program does so often.
    fn errs(&mut self, percent: u64) -> bool {
        self.dice.below(10_000) < percent * self.wild
    }

    /// One request as the device knows them, nearly.
    fn request(&mut self, device: u64) {
        let kind = (device as usize).min(REQUEST_QUEUE.len() - 1);
        let queue = REQUEST_QUEUE[kind];
        let buffer = BUFFERS + self.dice.below(64) * 0x1000;
        let chain: &[(u64, u32, u16)] = match kind {
            0 => &[(0, 64, 0)],
            1 => &[(0, 64, 2)],
            2 => {
                packet(&mut self.program, self.dice, buffer);
                &[(0, 44, 0)]
            }
            3 => {
                message(&mut self.program, self.dice, buffer);
                &[(0, 40, 1), (0x100, 64, 1), (0x800, 512, 2)]
            }
            4 => {
                self.program.store32(buffer, self.dice.one_of(&[0, 1, 1, 4, 8]));
                self.program.store64(buffer + 8, self.dice.below(140));
                let write = self.dice.chance(50);
                if write {
                    &[(0, 16, 1), (0x200, 512, 1), (0x800, 1, 2)]
                } else {
                    &[(0, 16, 1), (0x200, 512, 3), (0x800, 1, 2)]
                }
            }
            5 => &[(0, 0x2000, 2)],
            _ => {
                (0..3).for_each(|word| self.program.store32(buffer + 4 * word, 0));
                &[(0, 72, 0)]
            }
        };
        let [table, available, _] = rings(device, queue);
        let first = self.dice.below(12);
        for (index, (offset, length, flags)) in chain.iter().enumerate() {
            let at = table + 16 * (first + index as u64);
            self.program.store64(at, buffer + offset);
            self.program.store32(at + 8, *length);
            let next = if flags & 1 != 0 { first as u32 + index as u32 + 1 } else { 0 };
            self.program.store32(at + 12, u32::from(*flags) | next << 16);
        }
        if self.errs(20) {
            request(&mut self.program, self.dice);
        }
        if self.errs(20) {
            descriptors(&mut self.program, self.dice, device, queue);
        }
        // Receiving queues have something to fill.
        if self.dice.chance(30) && queue == 1 && self.dice.chance(50) {
            self.offer(device, 0, buffer);
        }
        let next = &mut self.next[device as usize][queue as usize];
        self.program.store16(available + 4 + 2 * u64::from(*next % 16), first as u16);
        *next = next.wrapping_add(1);
        self.program.store16(available + 2, *next);
        self.program.store32(register(device, 0x50), queue as u32);
        if self.dice.chance(50) {
            self.program.spin(300);
        }
    }

    /// A buffer for a device to fill.
    fn offer(&mut self, device: u64, queue: u64, buffer: u64) {
        let [table, available, _] = rings(device, queue);
        self.program.store64(table, buffer);
        self.program.store32(table + 8, 4096);
        self.program.store32(table + 12, 2);
        let next = &mut self.next[device as usize][queue as usize];
        self.program.store16(available + 4 + 2 * u64::from(*next % 16), 0);
        *next = next.wrapping_add(1);
        self.program.store16(available + 2, *next);
        self.program.store32(register(device, 0x50), queue as u32);
    }

    /// What no driver does.
    fn anything(&mut self, device: u64) {
        let (program, dice) = (&mut self.program, &mut *self.dice);
        let queue = dice.below(QUEUES);
        match dice.below(12) {
            0 | 1 => {
                // Any register, in any width.
                let address = register(device, dice.below(0x200));
                let value = dice.next() as u32 >> dice.below(32);
                match dice.below(4) {
                    0 => program.store8(address, value as u8),
                    1 => program.store16(address & !1, value as u16),
                    2 => program.store64_at_once(address & !7, value),
                    _ => program.store32(address & !3, value),
                }
            }
            2 => {
                let address = register(device, dice.below(0x1000));
                if dice.chance(50) { program.load32(address & !3) } else { program.load8(address) }
            }
            3 => {
                let port = dice.next() as u16;
                if ![0x604, 0x64].contains(&port) {
                    if dice.chance(50) { program.out8(port, dice.next() as u8) } else { program.in8(port) }
                }
            }
            4 => program.store32(register(device, 0x70), dice.one_of(&[0, 1, 3, 11, 15, 64, 128, 0xff])),
            5 | 6 => descriptors(program, dice, device, queue),
            7 => request(program, dice),
            8..=10 => {
                available(program, dice, device, queue);
                notify(program, dice, device, queue);
            }
            _ => (0..dice.below(30)).for_each(|_| notify(program, dice, device, queue)),
        }
    }

    fn initialise(&mut self, device: u64) {
        for status in [0, 1, 3] {
            self.program.store32(register(device, 0x70), status);
        }
        let features = match self.errs(10) {
            true => self.dice.next() as u32,
            // Of devices' own the ones that ours want: reports, and receive buffers that are merged.
            false => {
                let own = [(5, 1 << 5), (6, 1 << 15)].iter().find(|(owner, _)| *owner == device);
                self.dice.one_of(&[0, 1 << 28, 1 << 29, 3 << 28]) | own.map_or(0, |(_, bit)| *bit)
            }
        };
        self.program.store32(register(device, 0x24), 0);
        self.program.store32(register(device, 0x20), features);
        self.program.store32(register(device, 0x24), 1);
        let version = u32::from(!self.errs(5));
        self.program.store32(register(device, 0x20), version);
        self.program.store32(register(device, 0x70), 11);
        let kind = (device as usize).min(QUEUES_OF.len() - 1);
        let queues = if self.errs(10) { QUEUES } else { QUEUES_OF[kind] };
        for queue in 0..queues {
            self.program.store32(register(device, 0x30), queue as u32);
            let size = if self.errs(50) { size(self.dice) } else { 16 };
            self.program.store32(register(device, 0x38), size);
            for (offset, place) in [0x80, 0x90, 0xa0].into_iter().zip(rings(device, queue)) {
                let place = if self.errs(10) { misplaced(self.dice, place) } else { place };
                self.program.store64(register(device, offset), place);
            }
            self.program.store16(rings(device, queue)[1] + 2, 0);
            self.next[device as usize][queue as usize] = 0;
            let ready = if self.errs(5) { self.dice.next() as u32 } else { 1 };
            self.program.store32(register(device, 0x44), ready);
        }
        self.program.store32(register(device, 0x70), 15);
    }
}

/// Where a ring can't be, or is another one.
fn misplaced(dice: &mut Dice, place: u64) -> u64 {
    match dice.below(3) {
        // Where there is no memory, across its end, in the devices' windows.
        0 => dice.one_of(&[RAM - 8, RAM, 0xd000_0000, 1 << 32, u64::MAX - 15, u64::MAX << 12]),
        1 => rings(dice.below(4), dice.below(QUEUES))[dice.below(3) as usize],
        _ => place + dice.below(16),
    }
}

/// A queue's size: as devices like it, and otherwise.
fn size(dice: &mut Dice) -> u32 {
    match dice.below(10) {
        0 => dice.one_of(&[0, 3, 65535, 32768, u32::MAX]),
        1 => dice.next() as u32 & 0xffff,
        _ => dice.one_of(&[1, 2, 8, 16, 64, 256]),
    }
}

/// Where a buffer is: above the guest's own, or where nothing is.
fn place(dice: &mut Dice) -> u64 {
    match dice.below(12) {
        0 => dice.one_of(&[
            RAM - 1,
            RAM - 16,
            RAM,
            0xcfff_ffff,
            0xd000_0000,
            0xfee0_0000,
            1 << 32,
            u64::MAX,
            u64::MAX - 4096,
        ]),
        _ => BUFFERS + dice.below(64) * 0x1000 + dice.one_of(&[0, 0, 0, 1, 8, 0xff0]),
    }
}

fn descriptor(program: &mut Program, dice: &mut Dice, at: u64, index: u64) {
    let length = dice.one_of(&[0, 1, 8, 12, 16, 44, 80, 512, 512, 4096, 65536, 1 << 20, u32::MAX]);
    let flags: u16 = match dice.below(10) {
        0 => dice.next() as u16,
        1 => 4,
        2 => 5,
        _ => dice.one_of(&[0, 1, 1, 2, 3, 3]),
    };
    let next = match dice.below(8) {
        0 => dice.one_of(&[0, index as u16, 65535, 256]),
        1 => dice.below(64) as u16,
        _ => index as u16 + 1,
    };
    program.store64(at, place(dice));
    program.store32(at + 8, length);
    program.store32(at + 12, u32::from(flags) | u32::from(next) << 16);
}

fn descriptors(program: &mut Program, dice: &mut Dice, device: u64, queue: u64) {
    for _ in 0..dice.below(5) {
        let index = dice.below(16);
        descriptor(program, dice, rings(device, queue)[0] + 16 * index, index);
    }
    // A table of its own, for those that are indirect.
    if dice.chance(30) {
        let table = BUFFERS + dice.below(64) * 0x1000;
        for index in 0..dice.below(6) {
            descriptor(program, dice, table + 16 * index, index);
        }
    }
}

/// The head of a request to a disk, of a packet of vsock's or of the network's, or of a FUSE message.
fn request(program: &mut Program, dice: &mut Dice) {
    let at = BUFFERS + dice.below(64) * 0x1000;
    match dice.below(4) {
        0 => {
            program.store32(at, dice.one_of(&[0, 1, 4, 8, 11, 13, 0xffff_ffff]));
            program.store64(at + 8, dice.one_of(&[0, 1, 7, 8, u64::MAX, u64::MAX >> 9]));
        }
        1 => packet(program, dice, at),
        2 => message(program, dice, at),
        _ => {
            program.store32(at, dice.next() as u32 & 0x7_07ff);
            program.store32(at + 4, dice.next() as u32);
            program.store32(at + 8, dice.next() as u32 & 0xffff);
        }
    }
}

/// A packet of vsock's: source, destination, ports, length, type and operation, flags, room.
fn packet(program: &mut Program, dice: &mut Dice, at: u64) {
    program.store64(at, dice.one_of(&[3, 3, 3, 2, 0, u64::MAX]));
    program.store64(at + 8, dice.one_of(&[2, 2, 2, 3, u64::MAX]));
    program.store32(at + 16, dice.next() as u32 >> dice.below(32));
    program.store32(at + 20, dice.one_of(&[1024, 1025, 0, u32::MAX]));
    program.store32(at + 24, dice.one_of(&[0, 1, 4096, 65536, u32::MAX]));
    program.store32(at + 28, dice.one_of(&[1, 1, 1, 2, 0]) | (dice.below(10) as u32) << 16);
    program.store32(at + 32, dice.next() as u32 & 3);
    program.store32(at + 36, dice.one_of(&[0, 65536, u32::MAX]));
    program.store32(at + 40, dice.next() as u32 >> dice.below(32));
}

/// The head of a FUSE message and the beginning of what follows: length, operation, number, node.
fn message(program: &mut Program, dice: &mut Dice, at: u64) {
    program.store32(at, dice.one_of(&[104, 104, 104, 40, 56, 0, u32::MAX]));
    program.store32(at + 4, dice.one_of(&[26, 26, 1, 3, 15, 22, 38, 42, 2, 0, u32::MAX]));
    program.store64(at + 8, dice.next());
    program.store64(at + 16, dice.one_of(&[1, 1, 2, 0, u64::MAX]));
    program.store32(at + 0x100, dice.one_of(&[7, 8, 0, u32::MAX]));
    program.store32(at + 0x104, 31);
}

fn available(program: &mut Program, dice: &mut Dice, device: u64, queue: u64) {
    let ring = rings(device, queue)[1];
    let heads = dice.below(4) as u16;
    for slot in 0..8 {
        let head = if dice.chance(5) { dice.next() as u16 } else { dice.below(16) as u16 };
        program.store16(ring + 4 + 2 * slot, if dice.chance(20) { 0 } else { head });
    }
    // The index goes on by a few, or jumps.
    let index = if dice.chance(10) { dice.next() as u16 } else { heads + dice.below(8) as u16 };
    program.store16(ring + 2, index);
}

fn notify(program: &mut Program, dice: &mut Dice, device: u64, queue: u64) {
    let value = if dice.chance(5) { dice.next() as u32 } else { queue as u32 };
    program.store32(MMIO + device * WINDOW + 0x50, value);
}
