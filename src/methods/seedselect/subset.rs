//! Which references an image of a bootstrapped run is optimised towards.

use crate::sampler::{self, draw};

/// Indices of a subset of `count` references, a pure function of the image's seed: of every size from 1 to all of them with the same
/// probability, and of every subset of that size. (The paper bootstraps; by what law is not known.)
pub fn subset(seed: u64, count: usize) -> Vec<usize> {
    /// Behind the choices of starting noises.
    const FIRST: u64 = draw::CHOICE + (1 << 32);
    let choice = |which: usize, below| sampler::uniform(seed, FIRST + which as u64, below);
    let size = if count == 0 { 0 } else { 1 + choice(0, count) };
    let mut all: Vec<usize> = (0..count).collect();
    for index in 0..size {
        all.swap(index, index + choice(index + 1, count - index));
    }
    all.truncate(size);
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_subset_is_drawn_as_often_as_others_of_its_size() {
        let mut drawn: HashMap<Vec<usize>, usize> = HashMap::new();
        for seed in 0..9000 {
            *drawn.entry(subset(seed, 3)).or_default() += 1;
        }
        assert_eq!(drawn.len(), 7);
        for (subset, times) in drawn {
            let expected = if subset.len() == 3 { 3000.0 } else { 1000.0 };
            // Five standard deviations of a count.
            assert!((times as f64 - expected).abs() < 5.0 * f64::sqrt(expected), "{subset:?}: {times}");
        }
        assert_eq!((subset(9, 1), subset(9, 0)), (vec![0], vec![]));
    }
}
