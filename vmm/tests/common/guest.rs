//! Guests of a few instructions: a tiny assembler for 64-bit code, wrapped into an ELF "kernel".
//!
//! Only instructions that every KVM can interpret are used: moves, compares, jumps and port I/O.

/// Where the code is loaded and entered.
pub(crate) const LOAD: u64 = 0x10_0000;
/// Where guests may put data.
pub(crate) const DATA: u64 = 0x20_0000;
/// First device window and the distance of windows.
pub(crate) const MMIO: u64 = 0xd000_0000;
pub(crate) const WINDOW: u64 = 0x200;

/// Code under construction.
#[derive(Default, Clone)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    pub(crate) fn new() -> Self {
        Code::default()
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn rax(self, value: u64) -> Self {
        self.bytes(&[0x48, 0xb8]).bytes(&value.to_le_bytes())
    }

    /// `out port, value`
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        self.bytes(&[0x66, 0xba]).bytes(&port.to_le_bytes()).bytes(&[0xb0, value, 0xee])
    }

    /// Reads a port; anything but `expected` is a triple fault.
    pub(crate) fn expect_in(self, port: u16, expected: u8) -> Self {
        self.bytes(&[0x66, 0xba])
            .bytes(&port.to_le_bytes())
            .bytes(&[0xec, 0x3c, expected, 0x74, 0x02])
            .fault()
    }

    /// An undefined instruction, without an interrupt table: a triple fault.
    pub(crate) fn fault(self) -> Self {
        self.bytes(&[0x0f, 0x0b])
    }

    /// Writes a zero to a model-specific register.
    pub(crate) fn clear_msr(self, index: u32) -> Self {
        self.bytes(&[0xb9]).bytes(&index.to_le_bytes()).bytes(&[0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30])
    }

    /// Jumps to itself for ever.
    pub(crate) fn hang(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// Halts for ever, with interrupts enabled.
    pub(crate) fn halt(self) -> Self {
        self.bytes(&[0xfb, 0xf4, 0xeb, 0xfd])
    }

    pub(crate) fn store16(self, address: u64, value: u16) -> Self {
        self.rax(address).bytes(&[0x66, 0xc7, 0x00]).bytes(&value.to_le_bytes())
    }

    pub(crate) fn store32(self, address: u64, value: u32) -> Self {
        self.rax(address).bytes(&[0xc7, 0x00]).bytes(&value.to_le_bytes())
    }

    pub(crate) fn store64(self, address: u64, value: u64) -> Self {
        self.store32(address, value as u32).store32(address + 4, (value >> 32) as u32)
    }

    /// Reads memory or a register; anything but `expected` is a triple fault.
    pub(crate) fn expect32(self, address: u64, expected: u32) -> Self {
        self.rax(address)
            .bytes(&[0x8b, 0x08, 0x81, 0xf9])
            .bytes(&expected.to_le_bytes())
            .bytes(&[0x74, 0x02])
            .fault()
    }

    pub(crate) fn expect8(self, address: u64, expected: u8) -> Self {
        self.rax(address).bytes(&[0x8a, 0x08, 0x80, 0xf9, expected, 0x74, 0x02]).fault()
    }

    /// Waits until a word in memory has a value.
    pub(crate) fn wait16(self, address: u64, value: u16) -> Self {
        self.rax(address)
            .bytes(&[0x66, 0x8b, 0x08, 0x66, 0x81, 0xf9])
            .bytes(&value.to_le_bytes())
            .bytes(&[0x75, 0xf6])
    }

    /// Waits until a register has a value.
    pub(crate) fn wait32(self, address: u64, value: u32) -> Self {
        self.rax(address).bytes(&[0x8b, 0x08, 0x81, 0xf9]).bytes(&value.to_le_bytes()).bytes(&[0x75, 0xf6])
    }

    /// `lidt [address]`
    pub(crate) fn load_idt(self, address: u64) -> Self {
        self.rax(address).bytes(&[0x0f, 0x01, 0x18])
    }

    /// Jumps to an absolute address.
    pub(crate) fn jump(self, address: u64) -> Self {
        self.rax(address).bytes(&[0xff, 0xe0])
    }

    /// Short code that is not run here: a jump over it, then the code.
    pub(crate) fn jump_over(self, code: &Code) -> Self {
        self.bytes(&[0xeb, code.len() as u8]).bytes(&code.0)
    }

    /// Writes bytes, four at a time.
    pub(crate) fn store_bytes(mut self, address: u64, bytes: &[u8]) -> Self {
        for (index, piece) in bytes.chunks(4).enumerate() {
            let mut word = [0; 4];
            word[..piece.len()].copy_from_slice(piece);
            self = self.store32(address + 4 * index as u64, u32::from_le_bytes(word));
        }
        self
    }

    pub(crate) fn power_off(self) -> Self {
        self.out(0x604, 0x34).hang()
    }

    /// Bytes as they are.
    pub(crate) fn data(self, bytes: &[u8]) -> Self {
        self.bytes(bytes)
    }

    /// Length in bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    pub(crate) fn then(self, other: Code) -> Self {
        self.bytes(&other.0)
    }

    /// An ELF file with this code at [`LOAD`].
    pub(crate) fn kernel(self) -> Vec<u8> {
        let code = self.0;
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend(2u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(LOAD.to_le_bytes());
        file.extend(64u64.to_le_bytes());
        file.extend([0; 12]);
        for half in [64u16, 56, 1, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1u32.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [120, LOAD, LOAD, code.len() as u64, code.len() as u64, 0x1000] {
            file.extend(word.to_le_bytes());
        }
        file.extend(code);
        file
    }
}

/// A virtio driver in miniature: device number `index`, rings of one queue each at fixed places.
pub(crate) struct Driver {
    pub window: u64,
}

const RINGS: u64 = 0x30_0000;
const RING_SIZE: u32 = 8;

impl Driver {
    pub(crate) fn new(index: u64) -> Self {
        Driver { window: MMIO + WINDOW * index }
    }

    /// Descriptor table, available ring, used ring of a queue.
    pub(crate) fn rings(&self, queue: u64) -> (u64, u64, u64) {
        let base = RINGS + (self.window - MMIO) / WINDOW * 0x1_0000 + queue * 0x4000;
        (base, base + 0x1000, base + 0x2000)
    }

    /// The whole initialisation, with `queues` queues and no features.
    pub(crate) fn initialise(&self, code: Code, device_id: u32, queues: u32) -> Code {
        self.initialise_with(code, device_id, queues, 0)
    }

    /// The whole initialisation, with some of the first 32 features.
    pub(crate) fn initialise_with(&self, code: Code, device_id: u32, queues: u32, features: u32) -> Code {
        let register = |offset| self.window + offset;
        let mut code = code
            .expect32(register(0), 0x7472_6976)
            .expect32(register(4), 2)
            .expect32(register(8), device_id)
            .store32(register(0x70), 0)
            .store32(register(0x70), 1)
            .store32(register(0x70), 3)
            .store32(register(0x24), 0)
            .store32(register(0x20), features)
            // VERSION_1.
            .store32(register(0x24), 1)
            .store32(register(0x20), 1)
            .store32(register(0x70), 11)
            .expect32(register(0x70), 11);
        for queue in 0..queues {
            let (descriptors, available, used) = self.rings(queue.into());
            code = code.store32(register(0x30), queue).store32(register(0x38), RING_SIZE);
            for (offset, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
                code = code.store64(register(offset), address);
            }
            code = code.store32(register(0x44), 1);
        }
        code.store32(register(0x70), 15).expect32(register(0x70), 15)
    }

    pub(crate) fn descriptor(
        &self,
        code: Code,
        queue: u64,
        index: u64,
        address: u64,
        length: u32,
        flags: u16,
    ) -> Code {
        let at = self.rings(queue).0 + 16 * index;
        let next = if flags & 1 != 0 { index as u32 + 1 } else { 0 };
        code.store64(at, address).store32(at + 8, length).store32(at + 12, u32::from(flags) | next << 16)
    }

    /// Makes descriptor 0 available as the `count`th request, and notifies the device.
    pub(crate) fn kick(&self, code: Code, queue: u32, count: u16) -> Code {
        let (_, available, _) = self.rings(queue.into());
        code.store16(available + 4 + 2 * u64::from(count - 1), 0)
            .store16(available + 2, count)
            .store32(self.window + 0x50, queue)
    }

    /// Waits until the device has used `count` chains.
    pub(crate) fn wait(&self, code: Code, queue: u64, count: u16) -> Code {
        code.wait16(self.rings(queue).2 + 2, count)
    }
}
