//! NAO (Samuel et al. 2023, arXiv 2306.08687): paths between noises and centroids of noises that stay where noises are likely, beside
//! the closed forms they are compared with.

pub mod chi;
pub mod combine;
pub mod cost;
pub mod descent;
pub mod path;

pub use path::Settings;

use crate::{Error, Result};

/// How to go from one noise to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Interpolation {
    Nao(Settings),
    Slerp,
    Lerp,
}

/// Which noise lies in the middle of several.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Middle {
    Nao(Settings),
    /// [`combine::lol`] with equal weights.
    Lol,
    Mean,
}

/// `frames` noises from `a` to `b`, both among them as they are. Those of NAO lie at equal distances along its path.
/// `Error::Usage` where the two do not go together or there is no way between them.
pub fn frames(a: &[f32], b: &[f32], frames: usize, how: Interpolation) -> Result<Vec<Vec<f32>>> {
    if frames < 2 {
        return Err(Error::Usage(format!("{frames} frames from one noise to another: at least the two are asked for")));
    }
    path::check(&[a, b])?;
    let fractions = (1..frames - 1).map(|k| k as f64 / (frames - 1) as f64);
    let inner: Vec<Vec<f32>> = match how {
        Interpolation::Nao(settings) => {
            let path = path::path(a, b, &settings)?;
            let lengths = path.lengths();
            fractions.map(|t| path.at(&lengths, t)).collect()
        }
        Interpolation::Slerp => fractions.map(|t| combine::slerp(a, b, t)).collect::<Result<_>>()?,
        Interpolation::Lerp => fractions.map(|t| combine::lerp(a, b, t)).collect(),
    };
    Ok([a.to_vec()].into_iter().chain(inner).chain([b.to_vec()]).collect())
}

/// The noise in the middle of two or more. `Error::Usage` where they do not go together or have no middle.
pub fn middle(noises: &[&[f32]], how: Middle) -> Result<Vec<f32>> {
    path::check(noises)?;
    match how {
        Middle::Nao(settings) => Ok(path::centroid(noises, &settings)?.noise),
        Middle::Lol => Ok(combine::lol(noises, &vec![1.0; noises.len()])),
        Middle::Mean => Ok(combine::mean(noises)),
    }
}
