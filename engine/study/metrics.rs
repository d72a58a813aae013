//! s1's three metrics of test-time scaling (arXiv 2501.19393, section 3.2) and bootstrap intervals of them.
//!
//! Invariant: plain functions of plain numbers; the same seed gives the same interval. Must not know models, tasks or files.

use super::random::Random;
use serde::Serialize;

/// One condition of a sweep: average thinking tokens and accuracy in percent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    pub tokens: f64,
    pub accuracy: f64,
}

/// What slopes are taken against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Percentage points per doubling of the thinking tokens: reproduces the values that s1's paper publishes. Points of less
    /// than one token have no place on it and are left out.
    Log2,
    /// Percentage points per 1000 thinking tokens: the paper's formula as it stands.
    Linear,
}

impl Axis {
    fn at(self, tokens: f64) -> Option<f64> {
        match self {
            Axis::Log2 => (tokens >= 1.0).then(|| tokens.log2()),
            Axis::Linear => Some(tokens / 1000.0),
        }
    }
}

/// Share of the runs, in percent, whose thinking tokens are within their limits. `runs`: (tokens, least, most). None: no runs.
pub fn control(runs: impl IntoIterator<Item = (f64, Option<f64>, Option<f64>)>) -> Option<f64> {
    let (mut kept, mut all) = (0, 0);
    for (tokens, least, most) in runs {
        all += 1;
        kept += usize::from(least.is_none_or(|least| tokens >= least) && most.is_none_or(|most| tokens <= most));
    }
    (all > 0).then(|| 100.0 * kept as f64 / all as f64)
}

/// The average slope over all pairs of points. None without two points at different places.
pub fn scaling(points: &[Point], axis: Axis) -> Option<f64> {
    let points: Vec<(f64, f64)> = points.iter().filter_map(|p| Some((axis.at(p.tokens)?, p.accuracy))).collect();
    let (mut sum, mut pairs) = (0.0, 0);
    for (i, a) in points.iter().enumerate() {
        for b in points[i + 1..].iter().filter(|b| b.0 != a.0) {
            sum += (b.1 - a.1) / (b.0 - a.0);
            pairs += 1;
        }
    }
    (pairs > 0).then(|| sum / pairs as f64)
}

/// The best accuracy of the sweep. None without points.
pub fn performance(points: &[Point]) -> Option<f64> {
    points.iter().map(|p| p.accuracy).max_by(f64::total_cmp)
}

/// Bounds that hold 95 % of the resampled values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

/// Percentile bootstrap: `statistic` of `rounds` draws of `items` out of `items` with replacement. The items are a task's
/// problems, so that conditions that answer the same problems are resampled together. None where it has no value.
pub fn bootstrap(
    items: usize,
    rounds: usize,
    random: &mut Random,
    mut statistic: impl FnMut(&[usize]) -> Option<f64>,
) -> Option<Interval> {
    let mut drawn = vec![0; items];
    let mut values: Vec<f64> = (0..rounds)
        .filter_map(|_| {
            drawn.fill_with(|| random.below(items));
            statistic(&drawn)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get((share * (values.len() as f64 - 1.0)).round() as usize).copied();
    Some(Interval { low: at(0.025)?, high: at(0.975)? })
}
