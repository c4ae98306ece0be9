//! The report as one self-contained HTML page.

use std::fmt::Write;

use super::chart::{bars, escape, stacks};
use super::{Better, Report, Row, short};

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin:2rem 0 .4rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .7rem;text-align:left;border-bottom:1px solid #8884}
td.n{text-align:right}
svg{max-width:100%;height:auto}svg text{font-size:13px;fill:currentColor}
.whisker{stroke:currentColor;stroke-width:1.2;fill:none;opacity:.6}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.35em}.legend span{margin-right:1.2em}
.note{color:#666}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#1c1c1e}.note{color:#aaa}}";

/// A row with this in its name is a phase of the row before it.
const PHASE_SEPARATOR: char = '/';

/// The page.
pub(crate) fn page(report: &Report) -> String {
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Bulkhead: isolation overhead</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n\
         <h1>Bulkhead: isolation overhead</h1>\n"
    );
    host(&mut html, report);
    let names = report.row_names();
    for name in names.iter().filter(|name| !name.contains(PHASE_SEPARATOR)) {
        chart(&mut html, report, name);
    }
    table(&mut html, report);
    skipped(&mut html, report);
    html.push_str("</body></html>\n");
    html
}

// Writing to a string can't fail: the results of `write!` below are of no interest.

fn host(html: &mut String, report: &Report) {
    let host = &report.host;
    let _ = write!(
        html,
        "<p>Time is {}.</p>\n<table>\n<tr><th>kernel</th><td>{}</td></tr>\n\
         <tr><th>CPU</th><td>{} x {}</td></tr>\n<tr><th>memory</th><td>{} MiB</td></tr>\n",
        escape(host.clock.explanation()),
        escape(&host.kernel),
        host.cpus,
        escape(&host.cpu),
        host.memory >> 20,
    );
    for (name, value) in host.versions.iter().chain(&host.settings) {
        let _ = writeln!(html, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(value));
    }
    html.push_str("</table>\n");
}

fn chart(html: &mut String, report: &Report, name: &str) {
    let rows: Vec<&Row> = report.rows.iter().filter(|row| row.row == name).collect();
    let Some(first) = rows.first() else { return };
    let direction = match first.better {
        Better::Lower => "less is better",
        Better::Higher => "more is better",
    };
    let _ = write!(
        html,
        "<h2>{}</h2>\n<p class=\"note\">bar: median, whisker: 99th percentile, n = {}; {direction}</p>\n{}",
        escape(name),
        rows.iter().map(|row| row.n.to_string()).collect::<Vec<_>>().join(", "),
        bars(&rows, &report.runtimes())
    );
    let phases = stacks_of(report, name);
    if !phases.is_empty() {
        let _ = write!(html, "<p class=\"note\">by part (medians)</p>\n{}", stacks(&phases, &first.unit));
    }
}

/// The phases of a row, for each runtime that has any.
fn stacks_of<'a>(report: &'a Report, name: &str) -> Vec<(&'a str, Vec<(&'a str, f64)>)> {
    let phase = |row: &'a Row| row.row.strip_prefix(name)?.strip_prefix(PHASE_SEPARATOR);
    report
        .runtimes()
        .into_iter()
        .filter_map(|runtime| {
            let phases: Vec<(&str, f64)> = report
                .rows
                .iter()
                .filter(|row| row.runtime == runtime)
                .filter_map(|row| Some((phase(row)?, row.p50)))
                .collect();
            (!phases.is_empty()).then_some((runtime, phases))
        })
        .collect()
}

fn table(html: &mut String, report: &Report) {
    html.push_str(
        "<h2>All figures</h2>\n<table>\n<tr><th>row</th><th>runtime</th><th>n</th><th>p50</th><th>p90</th><th>p99</th>\
         <th>unit</th></tr>\n",
    );
    for row in
        report.row_names().into_iter().flat_map(|name| report.rows.iter().filter(move |row| row.row == name))
    {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td><td>{}</td></tr>",
            escape(&row.row),
            escape(&row.runtime),
            row.n,
            short(row.p50),
            short(row.p90),
            short(row.p99),
            escape(&row.unit)
        );
    }
    html.push_str("</table>\n");
}

fn skipped(html: &mut String, report: &Report) {
    if report.skipped.is_empty() {
        return;
    }
    html.push_str("<h2>Not measured</h2>\n<table>\n<tr><th>row</th><th>runtime</th><th>why</th></tr>\n");
    for skipped in &report.skipped {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&skipped.row),
            escape(&skipped.runtime),
            escape(&skipped.reason)
        );
    }
    html.push_str("</table>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;

    #[test]
    fn the_page_is_self_contained_and_escaped() {
        let html = page(&sample());
        assert!(!html.contains("http") && !html.contains("<script") && !html.contains("src="), "{html}");
        assert!(html.contains("CPU &lt;1&gt;") && !html.contains("CPU <1>"));
        assert!(html.contains("no &lt;network&gt; yet"));
        for tag in ["table", "svg", "tr", "td", "p", "h2", "text"] {
            let (opened, closed) = (
                html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count(),
                html.matches(&format!("</{tag}>")).count(),
            );
            assert_eq!(opened, closed, "{tag}");
        }
    }

    #[test]
    fn phases_are_stacked_by_runtime_and_have_no_chart_of_their_own() {
        let report = sample();
        assert_eq!(
            stacks_of(&report, "pod-start-cold"),
            [("bulkhead", vec![("kernel", 205.0), ("agent", 100.0)])]
        );
        let html = page(&report);
        assert!(html.contains("<h2>pod-start-cold</h2>"));
        assert!(!html.contains("<h2>pod-start-cold/kernel</h2>"));
    }
}
