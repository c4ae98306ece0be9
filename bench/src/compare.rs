//! Comparing two reports.

use std::fmt::Write;

use crate::report::table::align;
use crate::report::{Better, Report, Row, short};
use crate::stats;

/// How two reports differ.
#[derive(Debug, Default)]
pub struct Comparison {
    improved: Vec<[String; 6]>,
    worsened: Vec<[String; 6]>,
    unchanged: usize,
    missing: Vec<String>,
    warnings: Vec<String>,
}

/// Compares `after` with `before`, row by row.
pub fn compare(before: &Report, after: &Report) -> Comparison {
    let mut comparison = Comparison::default();
    if before.host.clock != after.host.clock {
        comparison.warnings.push(
            "one report is in virtual time, the other in wall time: times can't be compared".to_owned(),
        );
    }
    for (what, old, new) in
        [("kernel", &before.host.kernel, &after.host.kernel), ("CPU", &before.host.cpu, &after.host.cpu)]
    {
        if old != new {
            comparison.warnings.push(format!("measured with another {what}: {old:?}, then {new:?}"));
        }
    }
    for old in &before.rows {
        match after.row(&old.row, &old.runtime) {
            Some(new) => comparison.judge(old, new),
            None => comparison.missing.push(format!("{} under {}", old.row, old.runtime)),
        }
    }
    comparison
}

impl Comparison {
    fn judge(&mut self, before: &Row, after: &Row) {
        let Some(change) =
            stats::compare(&before.samples, &after.samples).filter(|change| change.significant)
        else {
            self.unchanged += 1;
            return;
        };
        let line = [
            before.row.clone(),
            before.runtime.clone(),
            short(before.p50),
            short(after.p50),
            before.unit.clone(),
            format!("{:+.1} %", (change.ratio - 1.0) * 100.0),
        ];
        let lower = change.ratio < 1.0;
        if lower == (before.better == Better::Lower) {
            self.improved.push(line);
        } else {
            self.worsened.push(line);
        }
    }

    /// Whether anything became worse.
    pub fn is_worse(&self) -> bool {
        !self.worsened.is_empty()
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        for warning in &self.warnings {
            let _ = writeln!(text, "WARNING  {warning}");
        }
        let head = ["row", "runtime", "before", "after", "unit", "change"].map(str::to_owned);
        for (title, lines) in [("worse", &self.worsened), ("better", &self.improved)] {
            if lines.is_empty() {
                let _ = writeln!(text, "{title}: nothing");
            } else {
                let _ = write!(text, "{title}:\n{}", align(&head, lines));
            }
        }
        let _ = writeln!(text, "within noise: {} rows", self.unchanged);
        for missing in &self.missing {
            let _ = writeln!(text, "only in the first report: {missing}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Clock;
    use crate::report::tests::sample;

    #[test]
    fn a_report_does_not_differ_from_itself() {
        let comparison = compare(&sample(), &sample());
        assert!(!comparison.is_worse());
        assert_eq!(
            comparison.text(),
            format!("worse: nothing\nbetter: nothing\nwithin noise: {} rows\n", sample().rows.len())
        );
    }

    #[test]
    fn direction_depends_on_the_row() {
        let before = sample();
        let mut after = sample();
        for row in &mut after.rows {
            let halved = row.samples.iter().map(|sample| sample / 2.0).collect();
            *row = Row::new(&row.row, &row.runtime, &row.unit, row.better, halved).unwrap();
        }
        let comparison = compare(&before, &after);
        assert!(comparison.is_worse());
        let text = comparison.text();
        let (worse, better) = text.split_once("better:").unwrap();
        assert!(worse.contains("burst-20") && worse.contains("-50.0 %"), "{text}");
        assert!(better.contains("pod-start-cold"), "{text}");
    }

    #[test]
    fn unlike_reports_are_warned_about() {
        let mut after = sample();
        after.host.clock = Clock::Wall;
        after.host.kernel = "6.2".to_owned();
        after.rows.pop();
        let text = compare(&sample(), &after).text();
        assert!(text.contains("WARNING  one report is in virtual time"), "{text}");
        assert!(text.contains("another kernel"), "{text}");
        assert!(text.contains("only in the first report: burst-20 under runc"), "{text}");
    }
}
