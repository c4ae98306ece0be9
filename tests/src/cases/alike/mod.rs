//! One list of commands, run under runc and under Bulkhead on the same node: their outputs are the same.
//!
//! A [`Group`] is a container for each runtime, in which every [`Row`] runs, in each of the group's places. What a row prints, and its
//! exit code, has to be what it prints under runc, but for the differences that the row names with their reasons; one that is not there
//! any more fails as well. Commands that busybox has not are `probe NAME` (`tests/attack/programs/probe.c`).

mod disks;
mod files;
mod groups;
mod system;

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::{Case, Environment, Runtime};
use crate::bundle;
use crate::ensure;
use crate::failure::{Explain, Outcome};
use crate::shim::{CreateOptions, ShimHost};
use crate::stdio::Streams;
use disks::Disks;

/// The cases of this theme.
pub(crate) const CASES: &[Case] = groups::CASES;

/// How long all rows of a group may take in a container.
const LIMIT: Duration = Duration::from_secs(120);

/// Begins the output of a row in a place.
const MARK: char = '\u{1e}';

/// Where the rows' scripts are in a container.
const SCRIPTS: &str = "/alike";

/// One comparison, or one for each place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    /// What is compared.
    name: &'static str,
    /// A shell script. Its working directory is one of its own in the place.
    command: &'static str,
    /// What is not as under runc.
    differences: &'static [Difference],
}

/// Something that is not as under runc, and is documented.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Difference {
    /// In which places; none means all.
    places: &'static [&'static str],
    /// A part of what runc's container prints.
    runc: &'static str,
    /// What a pod prints instead.
    pod: &'static str,
    /// Why.
    reason: &'static str,
}

/// A comparison of a script's output.
pub(crate) const fn same(name: &'static str, command: &'static str) -> Row {
    Row { name, command, differences: &[] }
}

/// The same with differences.
pub(crate) const fn but(
    name: &'static str,
    command: &'static str,
    differences: &'static [Difference],
) -> Row {
    Row { name, command, differences }
}

/// A difference in all places.
pub(crate) const fn instead(runc: &'static str, pod: &'static str, reason: &'static str) -> Difference {
    Difference { places: &[], runc, pod, reason }
}

impl Difference {
    /// The same in some places only.
    pub(crate) const fn at(mut self, places: &'static [&'static str]) -> Self {
        self.places = places;
        self
    }
}

/// Rows that one container of each runtime runs.
pub(crate) struct Group {
    /// What it is about.
    pub name: &'static str,
    /// Directories in which each row runs; all of a place come after another.
    pub places: &'static [&'static str],
    /// Its rows, in order.
    pub rows: &'static [&'static [Row]],
    /// Changes the container's specification.
    pub configure: fn(&mut Value),
}

/// What a row printed in a place.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    row: usize,
    place: usize,
    text: String,
}

/// Runs a group under both runtimes and compares.
fn compare(environment: &mut Environment, group: &Group) -> Outcome<String> {
    let rows: Vec<&Row> = group.rows.iter().flat_map(|rows| rows.iter()).collect();
    let host = environment.host()?;
    let right = ask(environment, &host.with(Runtime::Runc.program()), group, &rows)?;
    let answers = ask(environment, host, group, &rows)?;
    let mut failures = Vec::new();
    let mut differences = 0;
    ensure!(
        answers.len() == right.len() && right.len() == rows.len() * group.places.len(),
        "{} answers, {} of runc's, of {} rows in {} places",
        answers.len(),
        right.len(),
        rows.len(),
        group.places.len()
    );
    for (answer, right) in answers.iter().zip(&right) {
        let row = rows[right.row];
        let place = group.places[right.place];
        let named: Vec<&Difference> = row
            .differences
            .iter()
            .filter(|difference| difference.places.is_empty() || difference.places.contains(&place))
            .collect();
        differences += named.len();
        if let Err(failure) = judge(&right.text, &answer.text, &named) {
            failures.push(format!("{} in {place}: {failure}", row.name));
        }
    }
    // All of them: that one fails says nothing about the others.
    ensure!(
        failures.is_empty(),
        "{} of {} answers are unlike runc's:\n{}",
        failures.len(),
        right.len(),
        failures.join("\n")
    );
    Ok(format!("{} answers like runc's, {differences} documented differences among them", right.len()))
}

/// Whether an answer is runc's with these differences.
fn judge(right: &str, answer: &str, differences: &[&Difference]) -> Result<(), String> {
    let mut expected = right.to_owned();
    for difference in differences {
        if !expected.contains(difference.runc) {
            return Err(format!(
                "runc does not print {:?} ({}), but:\n{}",
                difference.runc, difference.reason, right
            ));
        }
        expected = expected.replacen(difference.runc, difference.pod, 1);
    }
    if expected == answer {
        return Ok(());
    }
    let is_like_runc = if answer == right { " (as under runc: the difference is gone)" } else { "" };
    Err(format!("{}{is_like_runc}", unlike(&expected, answer)))
}

/// Lines of two texts that are not in both, up to where they are alike again at the end.
fn unlike(expected: &str, answer: &str) -> String {
    let (mut expected, mut answer): (Vec<_>, Vec<_>) = (expected.lines().collect(), answer.lines().collect());
    let begin = expected.iter().zip(&answer).take_while(|(one, other)| one == other).count();
    expected.drain(..begin);
    answer.drain(..begin);
    while expected.last().is_some() && expected.last() == answer.last() {
        expected.pop();
        answer.pop();
    }
    format!("{answer:?}, expected {expected:?}")
}

/// Runs the rows in a container of a shim.
fn ask(environment: &Environment, host: &ShimHost, group: &Group, rows: &[&Row]) -> Outcome<Vec<Answer>> {
    let id = environment.id(&format!("alike-{}", group.name));
    let scripts = host.path().join(format!("{id}-scripts"));
    fs::create_dir_all(&scripts).explain(|| format!("make {}", scripts.display()))?;
    for (number, row) in rows.iter().enumerate() {
        let path = scripts.join(number.to_string());
        fs::write(&path, row.command).explain(|| format!("write {}", path.display()))?;
    }
    let disks = Disks::new(&environment.layout, host.path(), &id)?;
    let mut spec = bundle::spec(&id, bundle::shell(&script(group, rows.len())));
    let program = environment.layout.rootfs("attack").join("bin/attack");
    for mount in [
        bundle::bind(&scripts, SCRIPTS, &["rbind", "ro"]),
        bundle::bind(&program, "/bin/attack-probe", &["bind", "ro"]),
    ]
    .into_iter()
    .chain(disks.mounts())
    {
        bundle::add(&mut spec["mounts"], mount);
    }
    (group.configure)(&mut spec);
    let output = run(host, &id, &spec)?;
    drop(disks);
    fs::remove_dir_all(&scripts).explain(|| format!("remove {}", scripts.display()))?;
    answers(&output)
}

/// The script of a group's container.
fn script(group: &Group, rows: usize) -> String {
    let mark = MARK;
    format!(
        "probe() {{ attack-probe probe \"$@\"; }}
         place=0
         for directory in {places}; do
             row=0
             while [ $row -lt {rows} ]; do
                 echo '{mark}'$place $row
                 mkdir -p $directory/alike-$row && cd $directory/alike-$row || exit 1
                 timeout 30 sh -c 'probe() {{ attack-probe probe \"$@\"; }}; . {SCRIPTS}/'$row </dev/null 2>&1
                 echo \"exit code $?\"
                 cd /
                 chmod 755 $directory/alike-$row
                 rm -rf $directory/alike-$row 2>&1 || echo \"can't be removed\"
                 row=$((row + 1))
             done
             place=$((place + 1))
         done",
        places = group.places.join(" "),
    )
}

fn run(host: &ShimHost, id: &str, spec: &Value) -> Outcome<String> {
    let bundle = host.bundle(id, spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    shim.create(&stdio, CreateOptions::default())?;
    shim.start("")?;
    let exit = shim.wait("", LIMIT)?;
    let (output, errors) = (stdio.stdout.to_end(LIMIT)?, stdio.stderr.to_end(LIMIT)?);
    super::Container { bundle, shim, stdio }.finish()?;
    ensure!(
        exit.exit_status == 0 && errors.is_empty(),
        "exit status {}, {errors:?}, after {output:?}",
        exit.exit_status
    );
    Ok(output)
}

fn answers(output: &str) -> Outcome<Vec<Answer>> {
    output
        .split(MARK)
        .skip(1)
        .map(|part| {
            let (head, text) = part.split_once('\n').explain(|| format!("no line in {part:?}"))?;
            let (place, row) = head.split_once(' ').explain(|| format!("no two numbers in {head:?}"))?;
            let number = |text: &str| text.parse().explain(|| format!("a number in {head:?}"));
            Ok(Answer { row: number(row)?, place: number(place)?, text: text.to_owned() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_named_differences_pass() {
        let named = instead("b\n", "c\n", "a reason");
        assert_eq!(judge("a\nb\n", "a\nb\n", &[]), Ok(()));
        assert_eq!(judge("a\nb\n", "a\nc\n", &[&named]), Ok(()));
        assert!(judge("a\nb\n", "a\nc\n", &[]).unwrap_err().contains("[\"c\"], expected [\"b\"]"));
        assert!(judge("a\nb\n", "a\nb\n", &[&named]).unwrap_err().contains("the difference is gone"));
        assert!(judge("a\nx\n", "a\nc\n", &[&named]).unwrap_err().contains("a reason"));
    }

    #[test]
    fn output_is_split_into_answers() {
        let text = "\u{1e}0 0\none\nexit code 0\n\u{1e}0 1\nexit code 1\n";
        let answers = answers(text).unwrap();
        assert_eq!(answers[0], Answer { row: 0, place: 0, text: "one\nexit code 0\n".into() });
        assert_eq!(answers[1], Answer { row: 1, place: 0, text: "exit code 1\n".into() });
    }
}
