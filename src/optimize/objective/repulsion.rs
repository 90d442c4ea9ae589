//! An objective that keeps the images of a batch apart (the `popt_diverse` of MinorityPrompt's released code).

use super::{At, Condition, Objective, StepContext};
use crate::program::ValueId;

/// How far the estimates of a batch are from each other: `Σ_{j ≠ i} ‖f_i − f_j‖` of image `i`, with gradients on both sides, raised
/// (`popt_diverse` of the released code).
pub fn repulsion() -> Objective<'static> {
    Objective::new("repulsion", |s: &mut StepContext<'_>| {
        let batch = s.batch();
        if batch < 2 {
            s.b.fail("repulsion needs at least two images in a batch");
        }
        let prediction = s.predict(s.latents, At::T1, Condition::Optimized);
        let f = s.estimate(prediction);
        // Every image beside its `shift`-th next one, round and round.
        let twice = s.b.repeat(f, 2);
        let mut sum: Option<ValueId> = None;
        for shift in 1..batch {
            let other = s.b.slice(twice, shift, batch);
            let distance = s.distance(f, other);
            sum = Some(sum.map_or(distance, |sum| s.b.add(sum, distance)));
        }
        s.raise(sum.unwrap_or(f))
    })
}
