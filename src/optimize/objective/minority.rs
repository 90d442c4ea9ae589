//! The objective of MinorityPrompt (Um & Ye 2025): how far an estimate of the clean image moves when it is noised and estimated again.

use super::{At, Condition, Loss, Objective, StepContext};
use crate::program::Scalar;

/// The switches of [`minority`]; the default is the method. Records of images have them under the names of the flags.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Minority {
    /// Weight λ of the term whose second estimate has no gradient.
    pub lambda: f64,
    /// Leaves out the other term, so that no gradient passes through the second estimate (the paper's naive objective).
    #[serde(rename = "stop_second")]
    pub detach_second: bool,
    /// The second estimate is conditioned on the optimized prompt, not the user's.
    #[serde(rename = "second_learned")]
    pub second_optimized: bool,
    /// Both estimates are those of classifier-free guidance.
    pub guided: bool,
    /// Squared distances.
    pub squared: bool,
}

impl Default for Minority {
    fn default() -> Minority {
        Minority { lambda: 1.0, detach_second: false, second_optimized: false, guided: false, squared: false }
    }
}

/// How far the estimate `f` of the clean image moves when it is noised to level `s` and estimated again, without the token, `g`; raised
/// (Um & Ye 2025, eq. 8 to 10).
///
/// `J = ‖sg(f) − g‖ + λ ‖f − sg(g)‖`. With `e` the noise seen in `α_s f + σ_s n`, `f − g = (σ_s / α_s)(e − n)` exactly: both terms have
/// that length, and `∇J = ∇‖f − g‖ + (λ − 1) (∂f)ᵀ (f − g) / ‖f − g‖`. At λ = 1 `f` itself drops out, and with it the cancellation
/// in `f − g`.
pub fn minority(o: Minority) -> Objective<'static> {
    Objective::new("minority", move |s: &mut StepContext<'_>| {
        let predict = |s: &mut StepContext<'_>, x, at, condition| match o.guided {
            true => s.guided(x, at, condition),
            false => s.predict(x, at, condition),
        };
        let first = predict(s, s.latents, At::T1, Condition::Optimized);
        let f = s.estimate(first);
        let n = s.draw();
        let noised = s.renoise(f, n);
        let second =
            predict(s, noised, At::T2, if o.second_optimized { Condition::Optimized } else { Condition::Prompt });
        let e = s.noise(second);
        let moved = s.ratio_times_difference(e, n);
        let squares = s.squares(moved);
        let norm = s.root(squares);
        let distance = if o.squared { squares } else { norm };

        let through_second = if o.detach_second { 0.0 } else { 1.0 };
        let report = s.b.affine(distance, through_second + o.lambda, 0.0);
        let mut raised = (!o.detach_second).then_some(distance);
        if o.lambda != through_second {
            let direction = if o.squared {
                s.b.affine(moved, 2.0, 0.0)
            } else {
                let norm = s.b.affine(norm, 1.0, f64::from(f32::MIN_POSITIVE));
                let inverse = s.b.map(norm, Scalar::Reciprocal);
                s.b.scale(moved, inverse)
            };
            let direction = s.b.detach(direction);
            let along = s.b.dot(direction, f);
            let along = s.b.affine(along, o.lambda - through_second, 0.0);
            raised = Some(raised.map_or(along, |raised| s.b.add(raised, along)));
        }
        Loss { minimize: s.negated(raised.unwrap_or(report)), report }
    })
}
