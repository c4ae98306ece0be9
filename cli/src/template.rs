//! `bulkhead template`: making, listing, removing and checking templates by hand.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bulkhead_shim::builder::{self, BuildError, Options};
use bulkhead_shim::config::{Config, ConfigError, Source};
use bulkhead_shim::template::store::Listed;
use bulkhead_shim::template::{Key, Order, Store, StoreError};

use crate::arguments::{Selection, TemplateAction};

/// How long another maker is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// What keeps a command from being carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Making one.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A key that names no template, or several.
    #[error("{count} templates have a key that begins with {text:?}; bulkhead template list shows them")]
    Ambiguous {
        /// What was given.
        text: String,
        /// How many.
        count: usize,
    },
    /// Nothing can be printed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

/// Carries an action out; false when a template is not sound.
///
/// # Errors
/// What keeps the action from being carried out.
pub(crate) fn run(
    config: Option<PathBuf>,
    action: &TemplateAction,
    out: &mut impl Write,
) -> Result<bool, TemplateError> {
    let config = Config::load(&config.map_or(Source::Default, Source::File))?;
    let store = Store::new(config.template_dir.clone());
    match action {
        TemplateAction::Build { vcpus, memory, again } => {
            let config = config.with_size(vcpus.as_deref(), memory.as_deref())?;
            let options = Options { again: *again, patience: PATIENCE, ..Options::default() };
            let built = builder::build(&Order::of(&config), options)?;
            match built.took {
                Some(took) => writeln!(out, "{} made in {:.3} s", built.key, took.as_secs_f64())?,
                None => writeln!(out, "{} is there already", built.key)?,
            }
        }
        TemplateAction::List => {
            for listed in store.list()? {
                writeln!(out, "{}", line(&listed))?;
            }
        }
        TemplateAction::Remove(selection) => {
            for key in select(&store, selection)? {
                store.remove(&key)?;
                writeln!(out, "{key} removed")?;
            }
        }
        TemplateAction::Verify(selection) => {
            let mut sound = true;
            for key in select(&store, selection)? {
                match store.verify(&key) {
                    Ok(()) => writeln!(out, "ok    {key}")?,
                    Err(error @ StoreError::Damaged { .. }) => {
                        sound = false;
                        writeln!(out, "FAIL  {key}: {error}")?;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            return Ok(sound);
        }
    }
    Ok(true)
}

fn select(store: &Store, selection: &Selection) -> Result<Vec<Key>, TemplateError> {
    let all: Vec<Key> = store.list()?.into_iter().map(|listed| listed.key).collect();
    match selection {
        Selection::All => Ok(all),
        Selection::Keys(texts) => texts.iter().map(|text| pick(&all, text)).collect(),
    }
}

fn pick(all: &[Key], text: &str) -> Result<Key, TemplateError> {
    let matching: Vec<&Key> = all.iter().filter(|key| key.to_string().starts_with(text)).collect();
    match matching.as_slice() {
        [key] => Ok((*key).clone()),
        other => Err(TemplateError::Ambiguous { text: text.to_owned(), count: other.len() }),
    }
}

fn line(listed: &Listed) -> String {
    let what = match &listed.meta {
        Some(meta) => format!(
            "{} vCPU, {} MiB, kernel {}, agent {}",
            meta.inputs.vcpus, meta.inputs.memory_mib, meta.guest_kernel, meta.agent
        ),
        None => "damaged: meta.json can't be read".to_owned(),
    };
    let age = SystemTime::now().duration_since(listed.used).unwrap_or_default().as_secs();
    let refused = match &listed.refused {
        Some(reason) => format!(", refused: {reason}"),
        None => String::new(),
    };
    format!("{}  {what}, {} KiB on disk, used {age} s ago{refused}", listed.key, listed.size / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_key_is_enough_if_it_is_one() {
        let key = |digit: &str| Key::try_from(format!("ab{}", digit.repeat(62))).unwrap();
        let all = [key("1"), key("2")];
        assert_eq!(pick(&all, "ab1").unwrap(), all[0]);
        for (text, expected) in [("ab", 2), ("b", 0), ("", 2)] {
            let Err(TemplateError::Ambiguous { count, .. }) = pick(&all, text) else {
                panic!("{text}: one was picked")
            };
            assert_eq!(count, expected, "{text}");
        }
    }
}
