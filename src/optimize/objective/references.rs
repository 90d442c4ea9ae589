//! How far a run's latents are from reference images, in the features of a CLIP and as latents, and how unlikely the length of a noise is.

use super::{Objective, StepContext};
use crate::models::config::ClipImageConfig;
use crate::models::preprocess::Preprocess;
use crate::program::{Scalar, ValueId};
use crate::weights::Component;

/// Named buffers, a row per image, which the caller writes.
pub mod buffer {
    /// Image features of length 1 of the whole of an image, `[B, projection]`.
    pub const CENTROID: &str = "references.centroid";

    /// The same of a view.
    pub fn centroid(view: super::View) -> String {
        match view {
            super::View::Whole => CENTROID.into(),
            super::View::Corner { bottom, right } => format!("{CENTROID}.{}{}", u8::from(bottom), u8::from(right)),
        }
    }

    /// The same of the whole in the features of a held-out CLIP.
    pub const HELD_OUT_CENTROID: &str = "references.centroid.held_out";
    /// Features of length 1 of the prompts, `[B, projection]`.
    pub const PROMPT: &str = "references.prompt";
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
    /// What it is shown of an image.
    pub views: &'static [View],
}

/// A part of an image. What a tower does not see in one of them, a detail between two of its patches say, it sees in another, and what fools
/// it in one seldom fools it in all: the mean distance over views tells images apart better than that of the whole. (CLIP-guided generation
/// has long averaged over random cutouts; these are the same for every image and iteration, so that losses can be compared.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Whole,
    /// All but a sixteenth of the height and of the width, at the ends away from a corner.
    Corner {
        bottom: bool,
        right: bool,
    },
}

impl View {
    pub const WHOLE: &'static [View] = &[View::Whole];
    pub const ALL: &'static [View] = &[
        View::Whole,
        View::Corner { bottom: false, right: false },
        View::Corner { bottom: false, right: true },
        View::Corner { bottom: true, right: false },
        View::Corner { bottom: true, right: true },
    ];

    /// Top, left, height and width of it in an image of `[height, width]` pixels.
    pub fn frame(self, [height, width]: [usize; 2]) -> [usize; 4] {
        let cut = |side: usize| if side > 1 { (side / 16).max(1) } else { 0 };
        match self {
            View::Whole => [0, 0, height, width],
            View::Corner { bottom, right } => {
                let (tall, wide) = (height - cut(height), width - cut(width));
                [usize::from(bottom) * cut(height), usize::from(right) * cut(width), tall, wide]
            }
        }
    }
}

impl Tower {
    /// The buffer of what its features of a view are compared with.
    fn centroid(&self, view: View) -> String {
        match self.component {
            Component::HeldOutClip => buffer::HELD_OUT_CENTROID.into(),
            _ => buffer::centroid(view),
        }
    }

    /// Features of length 1, `[B, projection]`, of a view of an image, as an accumulator as the centroids are.
    fn features(&self, s: &mut StepContext<'_>, view: View, image: ValueId) -> ValueId {
        let image = match (view, &s.b.shape(image)[..]) {
            (View::Corner { .. }, &[_, height, width, _]) => {
                let [top, left, height, width] = view.frame([height, width]);
                s.b.crop(image, top, left, height, width)
            }
            _ => image,
        };
        let features = s.image_features(&self.config, self.component, &self.preprocess, image);
        s.b.to_accumulator(features)
    }
}

/// `weight` times the mean over the tower's views of `1 − cos(f, c) + prompt · (1 − cos(f, t))`, of the features `f` of the decoded latents,
/// the centroid `c` of the view and the features `t` of the prompt. With one view and without the prompt it is the semantic term of the
/// loss of SeedSelect (Samuel et al. 2024; the released code's SeedOpt, lines 139 to 152).
pub fn semantics(tower: &Tower, prompt: f64, weight: f64) -> Objective<'_> {
    Objective::new("semantics", move |s: &mut StepContext<'_>| {
        let image = s.decode(s.latents);
        let weight = weight / tower.views.len() as f64;
        let distance = |s: &mut StepContext<'_>, features: ValueId, other: ValueId, weight: f64| {
            let cosine = s.b.dot(features, other);
            s.b.affine(cosine, -weight, weight)
        };
        let mut terms = Vec::new();
        for view in tower.views {
            let features = tower.features(s, *view, image);
            let shape = s.b.shape(features);
            let centroid = s.b.accumulator_input(tower.centroid(*view), &shape);
            terms.push(distance(s, features, centroid, weight));
            if prompt != 0.0 {
                let text = s.b.input(buffer::PROMPT, &shape);
                let text = s.b.to_accumulator(text);
                terms.push(distance(s, features, text, weight * prompt));
            }
        }
        let sum = terms.into_iter().reduce(|sum, term| s.b.add(sum, term));
        sum.unwrap_or_else(|| {
            s.b.fail("a tower without a view");
            image
        })
    })
}

/// `weight · −ln(exp(cos(f, c) / τ) / Σ_k exp(cos(f, c_k) / τ))` over the class of the references and `others` other classes: InfoNCE
/// (van den Oord et al. 2018, eq. 4). An extension: whether the paper's contrastive variant has this form is not known.
pub fn contrast(tower: &Tower, others: usize, temperature: f64, weight: f64) -> Objective<'_> {
    Objective::new("contrast", move |s: &mut StepContext<'_>| {
        let image = s.decode(s.latents);
        let features = tower.features(s, View::Whole, image);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_lie_in_the_image() {
        let frames: Vec<[usize; 4]> = View::ALL.iter().map(|view| view.frame([64, 96])).collect();
        assert_eq!(frames, [[0, 0, 64, 96], [0, 0, 60, 90], [0, 6, 60, 90], [4, 0, 60, 90], [4, 6, 60, 90]]);
        for sides in [[1, 1], [1, 9], [15, 2]] {
            for view in View::ALL {
                let [top, left, height, width] = view.frame(sides);
                assert!(height > 0 && width > 0 && top + height <= sides[0] && left + width <= sides[1]);
            }
        }
    }
}
