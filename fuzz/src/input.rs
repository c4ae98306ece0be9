//! Bytes of the fuzzer's choosing, taken one field after the other.

/// What is left of an input. At its end everything is zero, so every input means something.
#[derive(Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of an input.
    pub fn new(bytes: &'a [u8]) -> Self {
        Input(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, `count` of them if there are so many.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        for (to, from) in bytes.iter_mut().zip(self.take(N)) {
            *to = *from;
        }
        bytes
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `limit` (1 to 256), from one byte.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::from(self.u8()) % limit
    }

    /// One of two, by the lowest bit of a byte.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// A number that is often near the limits of what counts: small, all ones, a power of two, or anything.
    pub fn telling(&mut self) -> u64 {
        match self.below(5) {
            0 => self.u8().into(),
            1 => u64::MAX - u64::from(self.u8()),
            2 => (1u64 << (self.u8() & 63)).wrapping_add(u64::from(self.u8())).wrapping_sub(128),
            3 => self.u32().into(),
            _ => self.u64(),
        }
    }
}
