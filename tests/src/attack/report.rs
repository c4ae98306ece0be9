//! The table of attempts, for people and for programs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Attempt, Contrast, Profile};
use crate::cases::Runtime;
use crate::failure::{Explain, Outcome};

/// What came of one attempt in one kind of container.
#[derive(Debug, Clone)]
pub struct Result {
    /// The runtime.
    pub runtime: Runtime,
    /// The profile.
    pub profile: Profile,
    /// What it did to the host; empty if it was contained.
    pub breaches: Vec<String>,
    /// What the program says, in short.
    pub said: String,
}

/// An attempt and its results.
pub struct Row {
    /// The attempt.
    pub attempt: Attempt,
    /// The results there are.
    pub results: Vec<Result>,
}

impl Row {
    /// Why the run fails because of this row, if so: a breach of ours, or runc not showing what it is there to show.
    pub fn failures(&self) -> impl Iterator<Item = String> + '_ {
        let ours = self.results.iter().filter(|result| result.runtime == Runtime::Bulkhead);
        let breaches = ours.flat_map(|result| result.breaches.iter().cloned());
        let shown =
            self.of(Runtime::Runc, Profile::Privileged).is_none_or(|result| !result.breaches.is_empty());
        let blind = self.attempt.runc_breaks && !shown;
        breaches.chain(blind.then(|| "runc contained it, so nothing is shown".to_owned()))
    }

    /// The results, a line each.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        self.results.iter().map(|result| {
            let what = match result.breaches.as_slice() {
                [] => "contained".to_owned(),
                breaches => format!("NOT contained: {}", breaches.join("; ")),
            };
            format!("{}, {}: {what} ({})", runtime_name(result.runtime), result.profile.name(), result.said)
        })
    }

    fn of(&self, runtime: Runtime, profile: Profile) -> Option<&Result> {
        self.results.iter().find(|result| result.runtime == runtime && result.profile == profile)
    }
}

/// How many attempts there were in pods of a runtime and how many of them were contained, both profiles together.
pub fn count(rows: &[Row], runtime: Runtime) -> (usize, usize) {
    let results = || rows.iter().flat_map(|row| &row.results).filter(|result| result.runtime == runtime);
    (results().count(), results().filter(|result| result.breaches.is_empty()).count())
}

/// Writes `attack.md` and `attack.json` into a directory.
///
/// # Errors
/// When it can't be written.
pub fn write(directory: &Path, rows: &[Row]) -> Outcome {
    fs::create_dir_all(directory).explain(|| format!("make {}", directory.display()))?;
    for (name, text) in [("attack.md", markdown(rows)), ("attack.json", format!("{:#}\n", object(rows)))] {
        let path = directory.join(name);
        fs::write(&path, text).explain(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn object(rows: &[Row]) -> Value {
    let attempts: Vec<Value> = rows
        .iter()
        .map(|row| {
            let results: Vec<Value> = row
                .results
                .iter()
                .map(|result| {
                    json!({
                        "runtime": runtime_name(result.runtime), "profile": result.profile.name(),
                        "contained": result.breaches.is_empty(), "breaches": result.breaches, "said": result.said,
                    })
                })
                .collect();
            let without = match row.attempt.contrast {
                Contrast::Runc => Value::Null,
                Contrast::Without(reason) => reason.into(),
            };
            json!({ "name": row.attempt.name, "what": row.attempt.what, "not_on_runc": without, "results": results })
        })
        .collect();
    let total = |runtime| {
        let (tried, contained) = count(rows, runtime);
        json!({ "tried": tried, "contained": contained })
    };
    json!({ "runc": total(Runtime::Runc), "bulkhead": total(Runtime::Bulkhead), "attempts": attempts })
}

fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "# Attempts to get out of a container\n\nEach was run as root in a container with the default capabilities and in a privileged one. \
         What it did is read off the host's facts.\n\n",
    );
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let (tried, contained) = count(rows, runtime);
        let _ = writeln!(text, "- {}: {contained} of {tried} contained", runtime_name(runtime));
    }
    text += "\n| attempt | what | runc, default | runc, privileged | Bulkhead, default | Bulkhead, privileged |\n|---|---|---|---|---|---|\n";
    for row in rows {
        let _ = write!(text, "| `{}` | {} |", row.attempt.name, cell(row.attempt.what));
        for runtime in [Runtime::Runc, Runtime::Bulkhead] {
            for profile in Profile::ALL {
                let shown = match (row.of(runtime, profile), row.attempt.contrast) {
                    (Some(result), _) if result.breaches.is_empty() => "contained".into(),
                    (Some(result), _) => format!("**{}**", cell(&result.breaches.join("; "))),
                    (None, Contrast::Without(reason)) if runtime == Runtime::Runc => {
                        format!("not tried: {}", cell(reason))
                    }
                    (None, _) => "not tried".into(),
                };
                let _ = write!(text, " {shown} |");
            }
        }
        text.push('\n');
    }
    text
}

fn runtime_name(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Bulkhead => "Bulkhead",
        Runtime::Runc => "runc",
    }
}

/// Text that does not end a table's cell, and not endless.
fn cell(text: &str) -> String {
    let one: String = text.replace('|', "\\|").replace('\n', " ");
    match one.char_indices().nth(300) {
        Some((end, _)) => format!("{} …", &one[..end]),
        None => one,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::Program;

    #[test]
    fn a_breach_is_told_from_what_was_contained() {
        let result = |runtime, breaches: &[&str]| Result {
            runtime,
            profile: Profile::Default,
            breaches: breaches.iter().map(|breach| (*breach).to_owned()).collect(),
            said: String::new(),
        };
        let rows = [Row {
            attempt: Attempt::new("a-b", "some|thing", Program::Attack(&[])),
            results: vec![result(Runtime::Runc, &["mounted: x|y"]), result(Runtime::Bulkhead, &[])],
        }];
        assert_eq!(count(&rows, Runtime::Runc), (1, 0));
        assert_eq!(count(&rows, Runtime::Bulkhead), (1, 1));
        let text = markdown(&rows);
        assert!(
            text.contains("| `a-b` | some\\|thing | **mounted: x\\|y** | not tried | contained |"),
            "{text}"
        );
        assert_eq!(object(&rows)["attempts"][0]["results"][0]["contained"], false);
    }
}
