//! Statistics of samples: percentiles, and whether two sets of samples differ beyond noise.

/// The `percent`-th percentile by nearest rank, which is always one of the samples; `None` without any.
///
/// With fewer than 100 samples the 99th is the largest.
pub(crate) fn percentile(samples: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

/// How a later set of samples compares with an earlier one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Change {
    /// Median after divided by median before.
    pub ratio: f64,
    /// Whether noise is no likely explanation.
    pub significant: bool,
}

/// Changes of the median below this fraction are never called significant: nobody would act on them.
const SMALLEST_CHANGE: f64 = 0.02;
/// Where there are too few samples for a test, a change counts only above this fraction (and without overlap).
const SMALLEST_CHANGE_OF_FEW: f64 = 0.05;
/// Two-sided 1 % level of the normal distribution.
const SIGNIFICANT_Z: f64 = 2.576;
/// Samples on each side from which on the test's normal approximation holds.
const ENOUGH: usize = 8;

/// Compares two sets of samples of the same quantity; `None` if either is empty or the first median is not positive.
///
/// With at least eight samples on both sides by the Mann-Whitney U test (two-sided, 1 %, corrected for ties), which assumes
/// nothing about the distribution; with fewer, the two ranges must not overlap. Either way the medians must differ by more than
/// a floor (2 %, 5 % for few samples).
pub(crate) fn compare(before: &[f64], after: &[f64]) -> Option<Change> {
    let (before_median, after_median) = (percentile(before, 50.0)?, percentile(after, 50.0)?);
    if before_median <= 0.0 {
        return None;
    }
    let ratio = after_median / before_median;
    let moved = (ratio - 1.0).abs();
    let significant = if before.len() >= ENOUGH && after.len() >= ENOUGH {
        moved > SMALLEST_CHANGE && mann_whitney_z(before, after) > SIGNIFICANT_Z
    } else {
        moved > SMALLEST_CHANGE_OF_FEW && !overlap(before, after)
    };
    Some(Change { ratio, significant })
}

fn overlap(a: &[f64], b: &[f64]) -> bool {
    let lowest = |samples: &[f64]| samples.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = |samples: &[f64]| samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    lowest(a) <= highest(b) && lowest(b) <= highest(a)
}

/// How many standard deviations the U statistic is from what it would be for equal distributions.
fn mann_whitney_z(a: &[f64], b: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> =
        a.iter().map(|value| (*value, true)).chain(b.iter().map(|value| (*value, false))).collect();
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    let (count_a, count_b, count) = (a.len() as f64, b.len() as f64, all.len() as f64);

    // Ranks start at 1; equal values share the mean of theirs.
    let mut rank_sum_a = 0.0;
    let mut ties = 0.0;
    let mut start = 0;
    while start < all.len() {
        let end = start + all[start..].iter().take_while(|(value, _)| *value == all[start].0).count();
        let rank = (start + 1 + end) as f64 / 2.0;
        rank_sum_a += rank * all[start..end].iter().filter(|(_, of_a)| *of_a).count() as f64;
        let tied = (end - start) as f64;
        ties += tied * (tied * tied - 1.0);
        start = end;
    }
    let u = rank_sum_a - count_a * (count_a + 1.0) / 2.0;
    let mean = count_a * count_b / 2.0;
    let variance = count_a * count_b / 12.0 * ((count + 1.0) - ties / (count * (count - 1.0)));
    if variance <= 0.0 { 0.0 } else { (u - mean).abs() / variance.sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<f64> = (1..=10).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 50.0), Some(5.0));
        assert_eq!(percentile(&samples, 90.0), Some(9.0));
        assert_eq!(percentile(&samples, 99.0), Some(10.0));
        assert_eq!(percentile(&samples, 0.0), Some(1.0));
        assert_eq!(percentile(&[3.0], 99.0), Some(3.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn z_agrees_with_a_worked_example() {
        // Two samples of five without overlap: U = 0, mean 12.5, variance 5 * 5 * 11 / 12.
        let z = mann_whitney_z(&[1.0, 2.0, 3.0, 4.0, 5.0], &[6.0, 7.0, 8.0, 9.0, 10.0]);
        assert!((z - 12.5 / (275.0_f64 / 12.0).sqrt()).abs() < 1e-9, "{z}");
        // All tied: no information at all.
        assert_eq!(mann_whitney_z(&[1.0; 5], &[1.0; 5]), 0.0);
    }

    #[test]
    fn noise_is_not_a_change() {
        let before: Vec<f64> = (0..20).map(|i| 100.0 + f64::from(i * 7 % 11)).collect();
        let after: Vec<f64> = (0..20).map(|i| 100.5 + f64::from(i * 5 % 11)).collect();
        assert!(!compare(&before, &after).unwrap().significant);
    }

    #[test]
    fn a_shift_beyond_the_spread_is_a_change() {
        let before: Vec<f64> = (0..20).map(|i| 100.0 + f64::from(i * 7 % 11)).collect();
        let after: Vec<f64> = before.iter().map(|value| value * 1.2).collect();
        let change = compare(&before, &after).unwrap();
        assert!(change.significant);
        assert!((change.ratio - 1.2).abs() < 1e-9);
    }

    #[test]
    fn a_repeatable_but_tiny_shift_is_not_a_change() {
        let before = [100.0, 100.1, 100.2, 100.3, 100.4, 100.5, 100.6, 100.7];
        let after = before.map(|value| value + 1.0);
        assert!(mann_whitney_z(&before, &after) > SIGNIFICANT_Z);
        assert!(!compare(&before, &after).unwrap().significant);
    }

    #[test]
    fn few_samples_must_not_overlap() {
        assert!(compare(&[10.0], &[11.0]).unwrap().significant);
        assert!(!compare(&[10.0], &[10.4]).unwrap().significant);
        assert!(!compare(&[10.0, 12.0], &[11.0, 13.0]).unwrap().significant);
        assert!(compare(&[10.0, 11.0], &[12.0, 13.0]).unwrap().significant);
    }

    #[test]
    fn nothing_to_compare_with() {
        assert_eq!(compare(&[], &[1.0]), None);
        assert_eq!(compare(&[1.0], &[]), None);
        assert_eq!(compare(&[0.0], &[1.0]), None);
    }
}
