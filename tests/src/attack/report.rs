//! The table of attempts, for people and for programs.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

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
    /// Why it was not tried here, if so.
    pub absent: Option<String>,
}

/// An attempt and its results.
pub struct Row {
    /// Its place among all attempts.
    pub number: usize,
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
                [] if result.absent.is_some() => {
                    format!("not tried: {}", result.absent.as_deref().unwrap_or_default())
                }
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
    let tried = |result: &&Result| result.runtime == runtime && result.absent.is_none();
    let results = || rows.iter().flat_map(|row| &row.results).filter(tried);
    (results().count(), results().filter(|result| result.breaches.is_empty()).count())
}

/// Writes `attack.md` and `attack.json` into a directory.
///
/// # Errors
/// When it can't be written.
pub fn write(directory: &Path, rows: &[Row]) -> Outcome {
    store(directory, &object(rows))
}

/// Puts the tables of several runs together.
///
/// # Errors
/// When one can't be read.
pub fn merge(directory: &Path, parts: &[PathBuf]) -> Outcome {
    let mut attempts = Vec::new();
    for part in parts {
        let path = part.join("attack.json");
        let text = fs::read_to_string(&path).explain(|| format!("read {}", path.display()))?;
        let mut table: Value = serde_json::from_str(&text).explain(|| format!("parse {}", path.display()))?;
        if let Some(list) = table["attempts"].as_array_mut() {
            attempts.append(list);
        }
    }
    attempts.sort_by_key(|attempt| attempt["number"].as_u64());
    store(directory, &table(attempts))
}

fn store(directory: &Path, table: &Value) -> Outcome {
    fs::create_dir_all(directory).explain(|| format!("make {}", directory.display()))?;
    for (name, text) in [("attack.md", markdown(table)), ("attack.json", format!("{table:#}\n"))] {
        let path = directory.join(name);
        fs::write(&path, text).explain(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// With the totals.
fn table(attempts: Vec<Value>) -> Value {
    let total = |runtime: Runtime| {
        let results = || {
            let all = attempts.iter().filter_map(|attempt| attempt["results"].as_array()).flatten();
            all.filter(move |result| {
                result["runtime"] == runtime_name(runtime) && result["contained"].is_boolean()
            })
        };
        let contained = results().filter(|result| result["contained"] == true).count();
        json!({ "tried": results().count(), "contained": contained })
    };
    let (runc, bulkhead) = (total(Runtime::Runc), total(Runtime::Bulkhead));
    json!({ "runc": runc, "bulkhead": bulkhead, "attempts": attempts })
}

fn object(rows: &[Row]) -> Value {
    let attempts = rows.iter().map(|row| {
        let results: Vec<Value> = row
            .results
            .iter()
            .map(|result| {
                json!({
                    "runtime": runtime_name(result.runtime), "profile": result.profile.name(),
                    "contained": result.absent.is_none().then_some(result.breaches.is_empty()),
                    "absent": result.absent, "breaches": result.breaches, "said": result.said,
                })
            })
            .collect();
        let without = match row.attempt.contrast {
            Contrast::Runc => Value::Null,
            Contrast::Without(reason) => reason.into(),
        };
        json!({ "number": row.number, "name": row.attempt.name, "what": row.attempt.what, "not_on_runc": without, "results": results })
    });
    table(attempts.collect())
}

fn markdown(table: &Value) -> String {
    let mut text = String::from(
        "# Attempts to get out of a container\n\nEach was run as root in a container with the default capabilities and in a privileged one. \
         What it did is read off the host's facts.\n\n",
    );
    for (runtime, key) in [(Runtime::Runc, "runc"), (Runtime::Bulkhead, "bulkhead")] {
        let total = &table[key];
        let _ = writeln!(
            text,
            "- {}: {} of {} contained",
            runtime_name(runtime),
            total["contained"],
            total["tried"]
        );
    }
    text += "\n| attempt | what | runc, default | runc, privileged | Bulkhead, default | Bulkhead, privileged |\n|---|---|---|---|---|---|\n";
    for attempt in table["attempts"].as_array().into_iter().flatten() {
        let word = |key: &str| cell(attempt[key].as_str().unwrap_or_default());
        let _ = write!(text, "| `{}` | {} |", word("name"), word("what"));
        for runtime in [Runtime::Runc, Runtime::Bulkhead] {
            for profile in Profile::ALL {
                let results = attempt["results"].as_array().into_iter().flatten();
                let mut results = results.filter(|result| {
                    result["runtime"] == runtime_name(runtime) && result["profile"] == profile.name()
                });
                let shown = match results.next() {
                    Some(result) => outcome(result),
                    None if runtime == Runtime::Runc => format!("not tried: {}", word("not_on_runc")),
                    None => "not tried".into(),
                };
                let _ = write!(text, " {shown} |");
            }
        }
        text.push('\n');
    }
    text
}

fn outcome(result: &Value) -> String {
    if let Some(reason) = result["absent"].as_str() {
        return format!("not tried: {}", cell(reason));
    }
    if result["contained"] == true {
        return "contained".into();
    }
    let breaches = result["breaches"].as_array().into_iter().flatten().filter_map(Value::as_str);
    format!("**{}**", cell(&breaches.collect::<Vec<_>>().join("; ")))
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
            absent: None,
        };
        let rows = [Row {
            number: 1,
            attempt: Attempt::new("a-b", "some|thing", Program::Attack(&[])),
            results: vec![result(Runtime::Runc, &["mounted: x|y"]), result(Runtime::Bulkhead, &[])],
        }];
        assert_eq!(count(&rows, Runtime::Runc), (1, 0));
        assert_eq!(count(&rows, Runtime::Bulkhead), (1, 1));
        let text = markdown(&object(&rows));
        assert!(
            text.contains("| `a-b` | some\\|thing | **mounted: x\\|y** | not tried:  | contained |"),
            "{text}"
        );
        assert_eq!(object(&rows)["attempts"][0]["results"][0]["contained"], false);
        assert_eq!(object(&rows)["runc"], json!({ "tried": 1, "contained": 0 }));
    }

    #[test]
    fn tables_are_put_together_in_order() {
        let directory = crate::cleanup::WorkDir::new("report").unwrap();
        let parts = [2, 1].map(|number| directory.path().join(number.to_string()));
        for (part, number) in parts.iter().zip([2, 1]) {
            let name = if number == 1 { "a-first" } else { "a-second" };
            let row =
                Row { number, attempt: Attempt::new(name, "", Program::Attack(&[])), results: Vec::new() };
            write(part, &[row]).unwrap();
        }
        merge(directory.path(), &parts).unwrap();
        let text = fs::read_to_string(directory.path().join("attack.md")).unwrap();
        assert!(text.find("a-first").unwrap() < text.find("a-second").unwrap(), "{text}");
    }
}
