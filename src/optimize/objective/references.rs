//! How far a run's latents are from reference images, in the features of a CLIP and as latents, and how unlikely the length of a noise is.

use super::{Objective, StepContext};
use crate::models::config::ClipImageConfig;
use crate::models::preprocess::Preprocess;
use crate::program::{Scalar, ValueId};
use crate::weights::Component;

/// Named buffers, a row per image, which the caller writes.
pub mod buffer {
    /// Image features of length 1, `[B, projection]`.
    pub const CENTROID: &str = "references.centroid";
    /// The same in the features of a held-out CLIP.
    pub const HELD_OUT_CENTROID: &str = "references.centroid.held_out";
    /// Clean latents at the UNet's scale, `[B, h, w, C]`.
    pub const LATENTS: &str = "references.latents";

    /// Features of length 1 of another class, `[B, projection]`; see [`super::contrast`].
    pub fn other(class: usize) -> String {
        format!("references.other.{class}")
    }
}

/// The image tower that images are seen by.
#[derive(Clone, Debug)]
pub struct Tower {
    pub config: ClipImageConfig,
    pub component: Component,
    pub preprocess: Preprocess,
}

impl Tower {
    /// The buffer of what its features are compared with.
    fn centroid(&self) -> &'static str {
        if self.component == Component::HeldOutClip { buffer::HELD_OUT_CENTROID } else { buffer::CENTROID }
    }

    /// Features of length 1, `[B, projection]`, of the image that the latents decode to.
    fn features(&self, s: &mut StepContext<'_>) -> ValueId {
        let image = s.decode(s.latents);
        s.image_features(&self.config, self.component, &self.preprocess, image)
    }
}

/// `weight · (1 − cos(f, c))` of the features `f` of the decoded latents and the centroid `c`: the semantic term of the loss of SeedSelect
/// (Samuel et al. 2024; the released code's SeedOpt, lines 139 to 152).
pub fn semantics(tower: &Tower, weight: f64) -> Objective<'_> {
    Objective::new("semantics", move |s: &mut StepContext<'_>| {
        let features = tower.features(s);
        let shape = s.b.shape(features);
        let centroid = s.b.accumulator_input(tower.centroid(), &shape);
        let cosine = s.b.dot(features, centroid);
        s.b.affine(cosine, -weight, weight)
    })
}

/// `weight · −ln(exp(cos(f, c) / τ) / Σ_k exp(cos(f, c_k) / τ))` over the class of the references and `others` other classes: InfoNCE
/// (van den Oord et al. 2018, eq. 4). An extension: whether the paper's contrastive variant has this form is not known.
pub fn contrast(tower: &Tower, others: usize, temperature: f64, weight: f64) -> Objective<'_> {
    Objective::new("contrast", move |s: &mut StepContext<'_>| {
        let features = tower.features(s);
        let shape = s.b.shape(features);
        let cosine = |s: &mut StepContext<'_>, name: String| {
            let centroid = s.b.accumulator_input(name, &shape);
            let cosine = s.b.dot(features, centroid);
            s.b.affine(cosine, 1.0 / temperature, 0.0)
        };
        let own = cosine(s, buffer::CENTROID.to_string());
        // Relative to the own class: Σ_k exp(cos_k − cos_own), whose first term is 1.
        let mut sum = None;
        for class in 0..others {
            let other = cosine(s, buffer::other(class));
            let difference = s.difference(other, own);
            let term = s.b.map(difference, Scalar::Exp);
            sum = Some(sum.map_or(term, |sum| s.b.add(sum, term)));
        }
        let sum = sum.unwrap_or_else(|| s.b.affine(own, 0.0, 0.0));
        let sum = s.b.affine(sum, 1.0, 1.0);
        let loss = s.b.map(sum, Scalar::Ln);
        s.b.affine(loss, weight, 0.0)
    })
}

/// `weight · (1/d) Σ (s − u)²` of the latents `s` and the mean latents `u` of the references: the appearance term of the loss of SeedSelect
/// (the released code's main.py, line 105). No gradient passes through the VAE.
pub fn appearance(weight: f64) -> Objective<'static> {
    Objective::new("appearance", move |s: &mut StepContext<'_>| {
        let shape = s.b.shape(s.latents);
        let len: usize = shape[1..].iter().product();
        let target = s.b.accumulator_input(buffer::LATENTS, &shape);
        let difference = s.difference(s.latents, target);
        let squares = s.squares(difference);
        s.b.affine(squares, weight / len as f64, 0.0)
    })
}

/// `weight · (f(m) − f(r))`: how much less likely the length `r` of a starting noise of `d` numbers is than the likeliest, `m = √(d − 1)`,
/// under the chi law `f(r) = (d − 1) ln r − r²/2 + const` (Samuel et al. 2023, *Norm-guided latent space exploration*; the released code's
/// main.py, line 164). Its gradient is `weight · (1 − (d − 1)/r²) z`, the regularisation of ReNO (Eyring et al. 2024). For the start of a
/// run, whose latents are `scale` times the noise.
pub fn norm_prior(weight: f64, scale: f64) -> Objective<'static> {
    Objective::new("norm prior", move |s: &mut StepContext<'_>| {
        let len: usize = s.b.shape(s.latents)[1..].iter().product();
        let d = (len.max(2) - 1) as f64;
        // With q = r²/(d − 1) it is (d − 1)/2 · (q − 1 − ln q): no difference of large numbers.
        let squares = s.squares(s.latents);
        let q = s.b.affine(squares, 1.0 / (scale * scale * d), 0.0);
        let logarithm = s.b.map(q, Scalar::Ln);
        let excess = s.difference(q, logarithm);
        s.b.affine(excess, weight * d / 2.0, -weight * d / 2.0)
    })
}
