//! Charts as SVG: no script, nothing loaded from elsewhere.

use std::fmt::Write;

use super::{Row, short};

const WIDTH: f64 = 720.0;
const LABEL_WIDTH: f64 = 150.0;
/// Room for the figure behind the longest bar.
const VALUE_WIDTH: f64 = 150.0;
const BAR_HEIGHT: f64 = 20.0;
const BAR_PITCH: f64 = 28.0;
/// Distinct, of similar lightness, readable on white and on dark grey.
const COLOURS: [&str; 14] = [
    "#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac", "#eeca3b",
    "#2f6f4f", "#8c6bb1", "#d67195", "#6b8e23", "#5f7f8f",
];

/// The colour of the thing with this number.
pub(crate) fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

/// A bar for each row up to its median, with a whisker up to its 99th percentile. A runtime's place in `runtimes` decides its
/// colour, which is the same in every chart.
pub(crate) fn bars(rows: &[&Row], runtimes: &[&str]) -> String {
    let longest = rows.iter().map(|row| row.p99.max(row.p50)).fold(0.0, f64::max);
    let mut svg = open(rows.len());
    for (number, row) in rows.iter().enumerate() {
        let y = BAR_PITCH * number as f64;
        let middle = y + BAR_HEIGHT / 2.0;
        let (median, high) = (scale(row.p50, longest), scale(row.p99, longest));
        label(&mut svg, &row.runtime, middle);
        let _ = write!(
            svg,
            "<rect x=\"{LABEL_WIDTH}\" y=\"{y:.1}\" width=\"{median:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{}\"/>\
             <path d=\"M{:.1} {middle:.1}H{:.1}M{:.1} {:.1}v10\" class=\"whisker\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{} {} (p99 {})</text>",
            colour(runtimes.iter().position(|runtime| *runtime == row.runtime).unwrap_or(number)),
            LABEL_WIDTH + median,
            LABEL_WIDTH + high,
            LABEL_WIDTH + high,
            middle - 5.0,
            LABEL_WIDTH + high.max(median) + 6.0,
            middle + 4.0,
            short(row.p50),
            escape(&row.unit),
            short(row.p99),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// One bar for each of `stacks`, made of its phases' medians in the order given.
///
/// A stack is a label and the phases' names with their medians, all in the same unit.
pub(crate) fn stacks(stacks: &[(&str, Vec<(&str, f64)>)], unit: &str) -> String {
    let total = |phases: &[(&str, f64)]| phases.iter().map(|(_, value)| value.max(0.0)).sum::<f64>();
    let longest = stacks.iter().map(|(_, phases)| total(phases)).fold(0.0, f64::max);
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in stacks.iter().flat_map(|(_, phases)| phases) {
        if !names.contains(name) {
            names.push(name);
        }
    }
    let mut svg = open(stacks.len());
    for (number, (name, phases)) in stacks.iter().enumerate() {
        let y = BAR_PITCH * number as f64;
        label(&mut svg, name, y + BAR_HEIGHT / 2.0);
        let mut x = LABEL_WIDTH;
        for (phase, value) in phases {
            let width = scale(value.max(0.0), longest);
            let which = names.iter().position(|name| name == phase).unwrap_or_default();
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{}\">\
                 <title>{}: {} {}</title></rect>",
                colour(which),
                escape(phase),
                short(*value),
                escape(unit),
            );
            x += width;
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\">{} {}</text>",
            x + 6.0,
            y + BAR_HEIGHT / 2.0 + 4.0,
            short(total(phases)),
            escape(unit),
        );
    }
    svg.push_str("</svg>\n<p class=\"legend\">");
    for (number, name) in names.iter().enumerate() {
        let _ = write!(svg, "<span><i style=\"background:{}\"></i>{}</span> ", colour(number), escape(name));
    }
    svg.push_str("</p>\n");
    svg
}

fn open(bars: usize) -> String {
    let height = BAR_PITCH * bars as f64;
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">")
}

fn label(svg: &mut String, text: &str, middle: f64) {
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        LABEL_WIDTH - 8.0,
        middle + 4.0,
        escape(text)
    );
}

fn scale(value: f64, longest: f64) -> f64 {
    if longest > 0.0 { value.max(0.0) / longest * (WIDTH - LABEL_WIDTH - VALUE_WIDTH) } else { 0.0 }
}

/// Text as HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Better;

    #[test]
    fn the_longest_bar_fills_the_chart() {
        let row = |runtime: &str, samples: &[f64]| {
            Row::new("r", runtime, "ms", Better::Lower, samples.to_vec()).unwrap()
        };
        let (short, long) = (row("a<b", &[50.0]), row("c", &[100.0]));
        let svg = bars(&[&short, &long], &["c"]);
        assert!(svg.contains(colour(0)), "{svg}");
        assert!(svg.contains("width=\"210.0\"") && svg.contains("width=\"420.0\""), "{svg}");
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"), "{svg}");
    }

    #[test]
    fn a_phase_has_one_colour_everywhere() {
        let svg = stacks(
            &[("runc", vec![("create", 10.0), ("start", 30.0)]), ("ours", vec![("start", 40.0)])],
            "ms",
        );
        let of_start = format!("fill=\"{}\"><title>start", colour(1));
        assert_eq!(svg.matches(&of_start).count(), 2, "{svg}");
        assert!(svg.contains(">40.0 ms</text>"), "{svg}");
    }

    #[test]
    fn nothing_measured_is_no_division_by_zero() {
        assert!(!stacks(&[("a", vec![("p", 0.0)])], "ms").contains("NaN"));
        assert!(bars(&[], &[]).contains("height=\"0\""));
    }
}
