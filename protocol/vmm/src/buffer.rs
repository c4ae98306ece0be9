//! Room for FUSE messages, which takes memory only while there are large ones.

use crate::MAX_FUSE_MESSAGE;

/// A message that is longer, in bytes, leaves memory behind that is worth a system call to give back.
const LARGE: usize = 16 * 1024;

/// Bytes of a page.
const PAGE: usize = 4096;

/// Room for the longest packet and one byte, by which a longer one is told.
#[derive(Debug)]
pub struct MessageBuffer {
    bytes: Vec<u8>,
    /// The longest message since memory was given back.
    longest: usize,
}

impl Default for MessageBuffer {
    fn default() -> Self {
        Self { bytes: vec![0; MAX_FUSE_MESSAGE + 1], longest: 0 }
    }
}

impl MessageBuffer {
    /// All of the room, with whatever was left there.
    #[must_use]
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Notes that a message had so many bytes.
    pub fn note(&mut self, length: usize) {
        self.longest = self.longest.max(length);
    }

    /// Whether there has been a large message.
    #[must_use]
    pub fn is_large(&self) -> bool {
        self.longest > LARGE
    }

    /// Gives the memory of large messages back to the kernel; what is left are zeroes, or the end of a message.
    pub fn give_back(&mut self) {
        if !self.is_large() {
            return;
        }
        self.longest = 0;
        let start = self.bytes.as_mut_ptr();
        let before = start.align_offset(PAGE).min(self.bytes.len());
        let length = (self.bytes.len() - before) / PAGE * PAGE;
        // SAFETY: whole pages of this vector's allocation, which is private memory of no file; that they become zeroes is as good
        // as any other contents. If the kernel refuses, nothing has changed.
        unsafe { libc::madvise(start.add(before).cast(), length, libc::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_large_messages_goes_back() {
        let mut buffer = MessageBuffer::default();
        buffer.room().fill(7);
        buffer.note(LARGE);
        buffer.give_back();
        assert!(!buffer.is_large() && buffer.room().iter().all(|byte| *byte == 7));
        buffer.note(LARGE + 1);
        assert!(buffer.is_large());
        buffer.give_back();
        assert!(!buffer.is_large());
        let left = buffer.room().iter().filter(|byte| **byte == 7).count();
        assert!(left < 2 * PAGE, "{left}");
        buffer.room().fill(8);
        assert!(buffer.room().iter().all(|byte| *byte == 8));
    }
}
