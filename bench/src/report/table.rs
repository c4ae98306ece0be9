//! The report as a table for a terminal.

use std::fmt::Write;

use super::{Report, short};
use crate::runtime::Kind;

/// A line for each row: median, percentiles, and the ratio of the median to runc's.
pub fn table(report: &Report) -> String {
    let head = ["row", "runtime", "n", "p50", "p90", "p99", "unit", "to runc"].map(str::to_owned);
    let lines: Vec<[String; 8]> = report
        .row_names()
        .into_iter()
        .flat_map(|name| report.rows.iter().filter(move |row| row.row == name))
        .map(|row| {
            let reference = report.row(&row.row, Kind::Runc.name()).filter(|reference| reference.p50 > 0.0);
            let ratio =
                reference.map_or_else(|| "-".to_owned(), |runc| format!("{:.2}x", row.p50 / runc.p50));
            [
                row.row.clone(),
                row.runtime.clone(),
                row.n.to_string(),
                short(row.p50),
                short(row.p90),
                short(row.p99),
                row.unit.clone(),
                ratio,
            ]
        })
        .collect();
    let mut text = align(&head, &lines);
    for skipped in &report.skipped {
        // Writing to a string can't fail.
        let _ = writeln!(text, "SKIPPED  {} under {}: {}", skipped.row, skipped.runtime, skipped.reason);
    }
    let _ = writeln!(text, "Time is {}.", report.host.clock.explanation());
    text
}

/// Columns as wide as they need to be; numbers to the right.
pub(crate) fn align<const COLUMNS: usize>(head: &[String; COLUMNS], lines: &[[String; COLUMNS]]) -> String {
    let mut widths = head.each_ref().map(|cell| cell.chars().count());
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in std::iter::once(head).chain(lines) {
        let mut formatted = String::new();
        for (column, (cell, width)) in line.iter().zip(widths).enumerate() {
            let separator = if column == 0 { "" } else { "  " };
            let _ = if column < 2 {
                write!(formatted, "{separator}{cell:<width$}")
            } else {
                write!(formatted, "{separator}{cell:>width$}")
            };
        }
        text.push_str(formatted.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;

    #[test]
    fn columns_line_up_and_ratios_are_to_runc() {
        let text = table(&sample());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("row "), "{text}");
        assert!(lines[1].contains("runc") && lines[1].ends_with("1.00x"), "{text}");
        assert!(lines[2].contains("bulkhead") && lines[2].ends_with("2.90x"), "{text}");
        assert!(lines[3].ends_with('-'), "{text}");
        let unit = |line: &str| line.find(" ms ").unwrap();
        assert_eq!(unit(lines[1]), unit(lines[3]), "{text}");
        assert!(text.contains("SKIPPED  network under bulkhead: no <network> yet\n"), "{text}");
        assert!(text.contains("virtual time"), "{text}");
    }
}
