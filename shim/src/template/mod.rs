//! Templates: saved, already booted machines that pods start from.
//!
//! What a template depends on, a [`recipe::Recipe`], gives its [`key::Key`]; the [`store::Store`] finds, checks, publishes
//! and removes templates by their keys. Nothing here starts a process or knows what a pod is.

mod content;
mod digests;
pub(crate) mod key;
pub(crate) mod recipe;
pub mod store;

pub use key::Key;
pub use recipe::Order;
pub(crate) use recipe::Recipe;
pub(crate) use store::{Found, Template};
pub use store::{Store, StoreError};
