//! Closed forms that NAO is compared with: LERP, SLERP, the mean, and LOL's combination.

use crate::{Error, Result};

/// Above this |cosine| the great circle between two noises is as good as straight, as in the released code of NAO.
const STRAIGHT: f64 = 0.9995;

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

pub fn norm(a: &[f32]) -> f64 {
    dot(a, a).sqrt()
}

pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

/// `Σ wᵢ xᵢ`, rounded once.
pub fn sum(noises: &[&[f32]], weights: &[f64]) -> Vec<f32> {
    let mut sum = vec![0.0; noises.first().map_or(0, |noise| noise.len())];
    for (noise, weight) in noises.iter().zip(weights) {
        sum.iter_mut().zip(*noise).for_each(|(sum, &x)| *sum += weight * f64::from(x));
    }
    sum.into_iter().map(|x| x as f32).collect()
}

/// The straight line, `(1 - t) a + t b`.
pub fn lerp(a: &[f32], b: &[f32], t: f64) -> Vec<f32> {
    sum(&[a, b], &[1.0 - t, t])
}

/// Shoemake 1985: `(sin((1 - t) θ) a + sin(t θ) b) / sin θ` with `θ` the angle between the two, which keep their lengths; LERP where
/// they are almost parallel. `Error::Usage` where they are opposite, for then no great circle is the shortest.
pub fn slerp(a: &[f32], b: &[f32], t: f64) -> Result<Vec<f32>> {
    let cosine = dot(a, b) / (norm(a) * norm(b));
    if cosine < -STRAIGHT {
        return Err(opposite());
    }
    if cosine > STRAIGHT {
        return Ok(lerp(a, b, t));
    }
    let angle = cosine.acos();
    Ok(sum(&[a, b], &[((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()]))
}

pub fn opposite() -> Error {
    Error::Usage("the noises point in opposite directions, and no way between them is shorter than all others".into())
}

/// The mean: `k` independent noises have one that is `√k` times too short.
pub fn mean(noises: &[&[f32]]) -> Vec<f32> {
    sum(noises, &vec![1.0 / noises.len() as f64; noises.len()])
}

/// Bodin et al. 2024 (LOL, arXiv 2408.08558), for noises of mean 0: `Σ wᵢ xᵢ / √(Σ wᵢ²)`, which of independent noises `N(0, I)` is one.
pub fn lol(noises: &[&[f32]], weights: &[f64]) -> Vec<f32> {
    let scale = weights.iter().map(|w| w * w).sum::<f64>().sqrt();
    sum(noises, &weights.iter().map(|w| w / scale).collect::<Vec<_>>())
}
