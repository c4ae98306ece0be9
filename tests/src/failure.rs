//! What a check or the harness reports when something is not as it should be.

use std::fmt::Display;

/// A failed check, or a step of the harness that did not work: one message for a person.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

/// The result of a check or of a step.
pub type Outcome<T = ()> = Result<T, Failure>;

/// Says what was being done when something failed.
pub trait Explain<T> {
    /// Turns the failure into a [`Failure`] that starts with `what`.
    fn explain(self, what: impl FnOnce() -> String) -> Outcome<T>;
}

impl<T, E: Display> Explain<T> for Result<T, E> {
    fn explain(self, what: impl FnOnce() -> String) -> Outcome<T> {
        self.map_err(|error| Failure(format!("{}: {error}", what())))
    }
}

impl<T> Explain<T> for Option<T> {
    fn explain(self, what: impl FnOnce() -> String) -> Outcome<T> {
        self.ok_or_else(|| Failure(what()))
    }
}

/// Returns a [`Failure`] with a formatted message.
#[macro_export]
macro_rules! fail {
    ($($message:tt)*) => { return Err($crate::failure::Failure(format!($($message)*))) };
}

/// Returns a [`Failure`] with a formatted message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        // By way of a name: comparisons of floating point numbers can't be negated in place.
        let holds: bool = $condition;
        if !holds {
            $crate::fail!($($message)*)
        }
    };
}

/// Returns a [`Failure`] that shows both values unless they are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($actual:expr, $expected:expr, $($message:tt)*) => {
        match (&$actual, &$expected) {
            (actual, expected) => {
                if actual != expected {
                    $crate::fail!("{}: got {actual:?}, expected {expected:?}", format_args!($($message)*))
                }
            }
        }
    };
}

impl From<bulkhead_cri::stream::StreamError> for Failure {
    fn from(error: bulkhead_cri::stream::StreamError) -> Self {
        Self(error.to_string())
    }
}
