//! Names of containers and processes: they become path components and reach the guest, so they are checked first.

use bulkhead_base::id::{MAX_ID, is_sound};

/// An id that can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{id:?} can't be used as an id: use 1 to {MAX_ID} of the characters A-Z a-z 0-9 _ . - and start with a letter or digit"
)]
pub struct IdError {
    id: String,
}

/// Checks a container's or process's id.
pub fn check(id: &str) -> Result<(), IdError> {
    if is_sound(id) { Ok(()) } else { Err(IdError { id: id.chars().take(MAX_ID).collect() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_containerd_pass() {
        for id in ["a", "demo-1", "k8s_POD.x", &"f".repeat(MAX_ID)] {
            assert_eq!(check(id), Ok(()), "{id}");
        }
    }

    #[test]
    fn anything_that_could_leave_its_directory_is_refused() {
        for id in ["", ".", "..", "../x", "a/b", "a\0b", "-rf", "ü", &"f".repeat(MAX_ID + 1)] {
            assert!(check(id).is_err(), "{id:?}");
        }
    }
}
