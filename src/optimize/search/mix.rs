//! Moves between candidates of unit variance, and the choices of a search: all that one has to be able to do with a variable.

use crate::sampler::{draw, uniform};

/// A value whose numbers are independent and standard normal, as noise is.
pub trait Mix: Clone {
    /// A value that is `step` of `other` and √(1 − step²) of `self`, `step` in [0, 1], and again of unit variance.
    #[must_use]
    fn mix(&self, other: &Self, step: f64) -> Self;
}

/// Below this share of its length nothing of a mixture is left: the two are opposite.
const NOTHING: f64 = 1e-6;

impl Mix for Vec<f32> {
    /// `√(1 − s²) a + s b`, brought to the length that it has where the two are orthogonal, as independent noises nearly are: the square
    /// of the length lies between those of `a` and `b` however related they are, so that no number of moves changes the variance. Of
    /// opposite values it is `a`.
    fn mix(&self, other: &Self, step: f64) -> Self {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let kept = (1.0 - step * step).sqrt();
        let orthogonal = kept * kept * dot(self, self) + step * step * dot(other, other);
        let square = orthogonal + 2.0 * kept * step * dot(self, other);
        if square <= NOTHING * orthogonal {
            return self.clone();
        }
        let scale = (orthogonal / square).sqrt();
        let (of_self, of_other) = (scale * kept, scale * step);
        let mixed = |(a, b): (&f32, &f32)| (of_self * f64::from(*a) + of_other * f64::from(*b)) as f32;
        self.iter().zip(other).map(mixed).collect()
    }
}

/// Whether a move by `step` goes anywhere.
pub(super) fn is_step(step: f64) -> bool {
    step > 0.0 && step <= 1.0
}

pub(super) fn is_probability(p: f64) -> bool {
    (0.0..=1.0).contains(&p)
}

/// Choices of one image's search, a pure function of its seed and of how many came before.
pub(super) struct Choices {
    seed: u64,
    made: u64,
}

impl Choices {
    pub fn new(seed: u64) -> Choices {
        Choices { seed, made: 0 }
    }

    /// A whole number below `below`.
    pub fn below(&mut self, below: usize) -> usize {
        self.made += 1;
        uniform(self.seed, draw::CHOICE + self.made - 1, below)
    }

    /// True with this probability.
    pub fn happens(&mut self, probability: f64) -> bool {
        const PARTS: usize = 1 << 32;
        (self.below(PARTS) as f64) < probability * PARTS as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::normal;

    fn noise(draw: u64, len: usize) -> Vec<f32> {
        let mut noise = vec![0.0; len];
        normal(5, draw, &mut noise);
        noise
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn the_ends_of_a_move() {
        let (a, b) = (noise(0, 64), noise(1, 64));
        assert_eq!((a.mix(&b, 0.0), a.mix(&b, 1.0)), (a.clone(), b));
        let same = a.mix(&a, 0.3);
        assert!(same.iter().zip(&a).all(|(x, y)| (x - y).abs() < 1e-6), "between a value and itself is nothing else");
        let opposite: Vec<f32> = a.iter().map(|x| -x).collect();
        assert_eq!(a.mix(&opposite, 0.5f64.sqrt()), a);
        assert_ne!(a.mix(&opposite, 0.2), opposite);
        let zeros = vec![0.0; 64];
        assert_eq!(zeros.mix(&zeros, 0.5), zeros);
        assert!(zeros.mix(&a, 0.5).iter().chain(&a.mix(&zeros, 0.5)).all(|x| x.is_finite()));
    }

    #[test]
    fn a_step_is_that_far_away() {
        let (a, b) = (noise(0, 1 << 14), noise(1, 1 << 14));
        for step in [0.1, 0.5, 0.9] {
            let moved = a.mix(&b, step);
            let cosine = dot(&a, &moved) / (dot(&a, &a) * dot(&moved, &moved)).sqrt();
            assert!((cosine - (1.0 - step * step).sqrt()).abs() < 0.02, "{step}: {cosine}");
        }
    }

    /// Also where the two are related, or opposed.
    #[test]
    fn the_length_of_a_mixture_lies_between() {
        let (a, b) = (noise(0, 64), noise(1, 64));
        let of = |x: f32, y: f32| -> Vec<f32> { a.iter().zip(&b).map(|(a, b)| x * a + y * b).collect() };
        for other in [of(0.0, 1.0), of(0.6, 0.8), of(0.8, 0.1), of(-0.7, 0.2), of(-1.2, 0.1)] {
            for step in [0.1, 0.4, 0.5f64.sqrt(), 0.9] {
                let square = dot(&a.mix(&other, step), &a.mix(&other, step));
                let expected = (1.0 - step * step) * dot(&a, &a) + step * step * dot(&other, &other);
                assert!((square / expected - 1.0).abs() < 1e-5, "{step}: {square}, expected {expected}");
            }
        }
    }

    #[test]
    fn no_number_of_moves_changes_the_variance() {
        for len in [64, 1024, 1 << 14] {
            let (mut x, mut relative) = (noise(0, len), noise(1, len));
            for draw in 2..200 {
                // Mixtures of relatives, ever closer ones, and of strangers.
                (x, relative) = (x.mix(&relative, 0.5f64.sqrt()).mix(&noise(draw, len), 0.4), x);
            }
            let (mean, variance) = (x.iter().sum::<f32>() / len as f32, dot(&x, &x) / len as f64);
            let error = 4.0 * (2.0 / len as f64).sqrt();
            assert!((variance - 1.0).abs() < error && f64::from(mean).abs() < error, "{len}: {mean}, {variance}");
        }
    }

    #[test]
    fn choices_are_a_function_of_the_seed() {
        let all = |seed: u64| -> Vec<usize> {
            let mut choices = Choices::new(seed);
            (0..1000).map(|_| choices.below(10)).collect()
        };
        assert_eq!(all(7), all(7));
        assert_ne!(all(7), all(8));
        assert!((0..10).all(|value| (60..140).contains(&all(7).iter().filter(|x| **x == value).count())));
        let share = |probability: f64| {
            let mut choices = Choices::new(3);
            (0..1000).filter(|_| choices.happens(probability)).count()
        };
        assert_eq!((share(0.0), share(1.0)), (0, 1000));
        assert!((360..440).contains(&share(0.4)), "{}", share(0.4));
    }
}
