//! From logits to the most probable classes.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::{Error, Status};

/// A class and its probability. The order is the rank: the best is the least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranked {
    pub index: u32,
    pub probability: f32,
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_probability = other.probability.total_cmp(&self.probability);
        by_probability.then(self.index.cmp(&other.index))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Eq for Ranked {}

/// Softmax of `logits`, then the `k` most probable classes, best first; of equals the lower index.
pub fn top_k(logits: &[f32], k: usize) -> Result<Vec<Ranked>, Error> {
    if k == 0 || k > logits.len() {
        return Err(Error::new(
            Status::InvalidArgument,
            format!("k = {k}; it must be 1..={} (the number of logits)", logits.len()),
        ));
    }
    if let Some(index) = logits.iter().position(|&x| x.is_nan() || x == f32::INFINITY) {
        return Err(Error::new(
            Status::NotFinite,
            format!("logits[{index}] is NaN or infinite; the model or its input is broken"),
        ));
    }
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return Err(Error::new(
            Status::NotFinite,
            "all logits are -infinity: no class is possible",
        ));
    }
    // Shifted by the maximum, so that exp can't overflow; in f64, so that the sum is exact enough.
    let exp = |x: f32| (f64::from(x) - f64::from(largest)).exp();
    let total: f64 = logits.iter().map(|&x| exp(x)).sum();
    // A heap of the best k so far, with the worst of them on top.
    let mut best = BinaryHeap::new();
    best.try_reserve_exact(k + 1)
        .map_err(|_| Error::new(Status::OutOfMemory, format!("no memory for {k} classes")))?;
    for (index, &x) in (0..).zip(logits) {
        best.push(Ranked { index, probability: (exp(x) / total) as f32 });
        if best.len() > k {
            best.pop();
        }
    }
    Ok(best.into_sorted_vec())
}
