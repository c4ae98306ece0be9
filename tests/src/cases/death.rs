//! death
use super::Case;
/// The cases of this theme.
pub const CASES: &[Case] = &[];
