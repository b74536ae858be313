//! Softmax and top k.

use inference::Status;
use inference::postprocess::{Ranked, top_k};
use proptest::prelude::*;

#[test]
fn known_values() {
    let best = top_k(&[1.0, 3.0, 2.0], 3).unwrap();
    let order: Vec<_> = best.iter().map(|class| class.index).collect();
    assert_eq!(order, [1, 2, 0]);
    for (class, expected) in best.iter().zip([0.665_240_96, 0.244_728_47, 0.090_030_57]) {
        assert!((class.probability - expected).abs() < 1e-7);
    }
}

#[test]
fn equals_come_in_order_of_their_index() {
    let best = top_k(&[7.0; 5], 3).unwrap();
    let expected = [0, 1, 2].map(|index| Ranked { index, probability: 0.2 });
    assert_eq!(best, expected);
    // Both probabilities are 0 in f32: the logits no longer count.
    let best = top_k(&[-900.0, -800.0, 0.0], 3).unwrap();
    assert_eq!(best.iter().map(|class| class.index).collect::<Vec<_>>(), [2, 0, 1]);
}

#[test]
fn extreme_logits() {
    assert_eq!(top_k(&[f32::MAX, f32::MIN], 1).unwrap()[0], Ranked { index: 0, probability: 1.0 });
    let best = top_k(&[f32::NEG_INFINITY, 0.0], 2).unwrap();
    assert_eq!(best[1], Ranked { index: 0, probability: 0.0 });
}

#[test]
fn logits_must_be_numbers() {
    for bad in [f32::NAN, f32::INFINITY] {
        let error = top_k(&[0.0, 1.0, bad, bad], 1).unwrap_err();
        assert_eq!(error.status, Status::NotFinite);
        assert!(error.message.contains("logits[2]"), "{}", error.message);
    }
    assert_eq!(top_k(&[f32::NEG_INFINITY; 3], 1).unwrap_err().status, Status::NotFinite);
}

#[test]
fn k_must_fit() {
    for (n, k) in [(0, 0), (0, 1), (3, 0), (3, 4), (3, usize::MAX)] {
        assert_eq!(top_k(&vec![0.0; n], k).unwrap_err().status, Status::InvalidArgument, "{n} {k}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    /// Against a softmax of all and a stable sort.
    #[test]
    fn any_logits(logits in prop::collection::vec(-50f32..50.0, 1..60), k in 1usize..60) {
        let k = k.min(logits.len());
        let exp: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
        let total: f64 = exp.iter().sum();
        let mut all: Vec<_> = exp.iter().map(|x| (x / total) as f32).enumerate().collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (class, (index, probability)) in top_k(&logits, k).unwrap().iter().zip(all) {
            prop_assert!((class.probability - probability).abs() <= 1e-6 * probability);
            // Where two are equal up to rounding, either may come first.
            if class.index as usize != index {
                let other = (exp[class.index as usize] / total) as f32;
                prop_assert!((other - probability).abs() <= 1e-6 * probability);
            }
        }
    }
}
