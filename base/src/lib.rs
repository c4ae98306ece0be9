//! What several parts have to say alike, each fact once. This crate depends on nothing, so that every other may depend on it.

pub mod capabilities;
pub mod clone;
pub mod guest;
pub mod id;
pub mod parts;

use std::error::Error;

/// An error and its sources in one line, outermost first.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Step(&'static str, Option<Box<Step>>);

    impl fmt::Display for Step {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Step {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|step| step as _)
        }
    }

    #[test]
    fn the_outermost_error_comes_first() {
        let error = Step("can't start", Some(Box::new(Step("no room", Some(Box::new(Step("full", None)))))));
        assert_eq!(chain(&error), "can't start: no room: full");
    }
}
