//! The file with a machine's state: a header of 24 bytes, then the state in postcard's wire format.
//!
//! ```text
//!  0  magic "BulkhdVM"
//!  8  format version, 4 bytes
//! 12  length of the state, 4 bytes
//! 16  checksum of the state, 8 bytes
//! ```
//! Numbers are little-endian. The checksum finds accidents, not attacks.

use std::fs::File;
use std::io::{self, Read, Seek, Write};

use super::MachineState;

/// Changes with every change of the header, of [`MachineState`] or of what a value in it means.
pub(crate) const FORMAT_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"BulkhdVM";
const HEADER: usize = 24;

/// The most bytes of a state: many times what 16 vCPUs and all devices need.
const MAX_STATE: usize = 1 << 20;

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It can't be read.
    #[error("it can't be read")]
    Read(#[source] io::Error),
    /// It can't be written.
    #[error("it can't be written")]
    Write(#[source] io::Error),
    /// It is something else.
    #[error("it is no saved machine, or has been cut short")]
    NoState,
    /// Another version of this program wrote it.
    #[error("it has format version {0}, and this program knows {FORMAT_VERSION} only: make it again")]
    Version(u32),
    /// It is larger than anything that was ever saved.
    #[error("it has more than {MAX_STATE} bytes")]
    TooLarge,
    /// It has changed since it was written.
    #[error("its checksum is wrong: it is damaged")]
    Checksum,
    /// The contents aren't a state.
    #[error("its contents make no sense")]
    Contents(#[source] postcard::Error),
}

/// Writes a state to an empty file.
pub fn write(state: &MachineState, file: &mut File) -> Result<(), FormatError> {
    file.write_all(&encode(state)?).map_err(FormatError::Write)
}

/// Reads a state, wherever the file's position is: it may be shared with others that read it.
pub fn read(file: &mut File) -> Result<MachineState, FormatError> {
    file.rewind().map_err(FormatError::Read)?;
    let mut bytes = Vec::with_capacity(16 * 1024);
    let limit = (HEADER + MAX_STATE + 1) as u64;
    file.take(limit).read_to_end(&mut bytes).map_err(FormatError::Read)?;
    decode(&bytes)
}

fn encode(state: &MachineState) -> Result<Vec<u8>, FormatError> {
    let state = postcard::to_allocvec(state).map_err(FormatError::Contents)?;
    if state.len() > MAX_STATE {
        return Err(FormatError::TooLarge);
    }
    let mut bytes = Vec::with_capacity(HEADER + state.len());
    bytes.extend(MAGIC);
    bytes.extend(FORMAT_VERSION.to_le_bytes());
    bytes.extend((state.len() as u32).to_le_bytes());
    bytes.extend(checksum(&state).to_le_bytes());
    bytes.extend(state);
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<MachineState, FormatError> {
    let Some((header, state)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(FormatError::NoState);
    };
    let (magic, rest) = header.split_at(MAGIC.len());
    let (words, _) = rest.as_chunks::<4>();
    let &[version, length, low, high] = words else { return Err(FormatError::NoState) };
    if magic != MAGIC {
        return Err(FormatError::NoState);
    }
    let version = u32::from_le_bytes(version);
    if version != FORMAT_VERSION {
        return Err(FormatError::Version(version));
    }
    if state.len() > MAX_STATE {
        return Err(FormatError::TooLarge);
    }
    if u32::from_le_bytes(length) as usize != state.len() {
        return Err(FormatError::NoState);
    }
    if u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32 != checksum(state) {
        return Err(FormatError::Checksum);
    }
    let (state, rest) = postcard::take_from_bytes(state).map_err(FormatError::Contents)?;
    if rest.is_empty() { Ok(state) } else { Err(FormatError::NoState) }
}

/// FNV-1a, by words of 8 bytes.
fn checksum(bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x100_0000_01b3;
    let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(PRIME).rotate_left(23);
    let (words, rest) = bytes.as_chunks::<8>();
    let hash = words.iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| step(hash, u64::from_le_bytes(*word)));
    rest.iter().fold(step(hash, bytes.len() as u64), |hash, byte| step(hash, u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_clock_data;

    use super::*;
    use crate::devices::mmio::TransportState;
    use crate::devices::{BackendState, DeviceState};
    use crate::ioapic::IoApicState;
    use crate::template::Raw;

    fn state() -> MachineState {
        MachineState {
            memory_mib: 128,
            cpuid: vec![Raw(kvm_bindings::kvm_cpuid_entry2 { function: 7, ..Default::default() })],
            vcpus: Vec::new(),
            clock: Raw(kvm_clock_data { clock: 77, ..Default::default() }),
            ioapic: IoApicState::default(),
            devices: vec![DeviceState {
                id: 4,
                config: vec![1, 2, 3],
                config_generation: 1,
                transport: TransportState::default(),
                interrupt_status: 1,
                positions: None,
                backend: BackendState::None,
            }],
        }
    }

    #[test]
    fn a_state_comes_back() {
        let bytes = encode(&state()).unwrap();
        assert_eq!(decode(&bytes).unwrap(), state());
    }

    #[test]
    fn other_versions_and_files_are_told_apart() {
        let mut bytes = encode(&state()).unwrap();
        bytes[8] = 9;
        assert!(matches!(decode(&bytes), Err(FormatError::Version(9))));
        bytes[0] = b'x';
        assert!(matches!(decode(&bytes), Err(FormatError::NoState)));
        assert!(matches!(decode(&[]), Err(FormatError::NoState)));
    }

    #[test]
    fn every_change_of_a_byte_and_every_cut_is_refused() {
        let bytes = encode(&state()).unwrap();
        for at in 0..bytes.len() {
            for bit in [1, 0x80] {
                let mut changed = bytes.clone();
                changed[at] ^= bit;
                assert!(decode(&changed).is_err(), "byte {at}");
            }
            assert!(decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(decode(&[bytes, vec![0]].concat()).is_err());
    }

    #[test]
    fn nonsense_with_a_right_checksum_never_panics() {
        let sound = encode(&state()).unwrap();
        let mut seed = 1u64;
        for _ in 0..20_000 {
            let mut bytes = sound.clone();
            for _ in 0..3 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = HEADER + (seed >> 33) as usize % (bytes.len() - HEADER);
                bytes[at] = (seed >> 24) as u8;
            }
            let sum = checksum(&bytes[HEADER..]);
            bytes[16..24].copy_from_slice(&sum.to_le_bytes());
            let _ = decode(&bytes);
        }
    }
}
