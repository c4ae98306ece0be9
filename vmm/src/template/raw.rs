//! KVM's structures as byte strings.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A structure that is serialized as its bytes in memory: one copy either way. Every bit pattern is a valid value of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Raw<T>(pub T);

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0.as_bytes())
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(BytesVisitor(PhantomData))
    }
}

struct BytesVisitor<T>(PhantomData<T>);

impl<T: FromBytes> Visitor<'_> for BytesVisitor<T> {
    type Value = Raw<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", size_of::<T>())
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Raw<T>, E> {
        T::read_from_bytes(bytes).map(Raw).map_err(|_| E::invalid_length(bytes.len(), &self))
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_regs;

    use super::*;

    #[test]
    fn a_structure_comes_back_and_only_whole() {
        let regs = Raw(kvm_regs { rip: 0x1234, rflags: 2, ..kvm_regs::default() });
        let bytes = postcard::to_allocvec(&regs).unwrap();
        assert_eq!(postcard::from_bytes::<Raw<kvm_regs>>(&bytes).unwrap(), regs);
        assert!(postcard::from_bytes::<Raw<u64>>(&bytes).is_err());
        assert!(postcard::from_bytes::<Raw<kvm_regs>>(&bytes[..bytes.len() - 1]).is_err());
    }
}
