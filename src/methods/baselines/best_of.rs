//! Best of n: the simplest rival at equal compute. Every image is the best of several seeds by some score.

use crate::pipeline::generate::{Image, Job, Loaded};
use crate::pipeline::{Observer, Progress};
use crate::{Error, Result};

/// The seed of candidate `index` of `n` for an image: those of images with neighbouring seeds do not overlap.
pub fn candidate(seed: u64, n: usize, index: usize) -> u64 {
    seed.wrapping_mul(n as u64).wrapping_add(index as u64)
}

/// A chosen image with the seed that makes it alone, and its score.
pub struct Chosen {
    pub image: Image,
    pub seed: u64,
    pub score: f64,
}

/// Scores a batch that the generator has just made.
pub type Judge<'a> = dyn FnMut(&mut Loaded<'_, '_>, &[Job], &[Image]) -> Result<Vec<f64>> + 'a;

/// Makes one full batch of images, each the highest of `n` by `score`; of equal ones the first. `Progress::Image` comes once per
/// image, when it is chosen.
pub fn run(
    images: &mut Loaded<'_, '_>,
    n: usize,
    jobs: &[Job],
    score: &mut Judge<'_>,
    observe: &mut Observer<'_>,
) -> Result<Vec<Chosen>> {
    if n == 0 {
        return Err(Error::Usage("the best of 0 images: must be 1 or more".into()));
    }
    let mut best: Vec<Option<Chosen>> = jobs.iter().map(|_| None).collect();
    for index in 0..n {
        let candidates: Vec<Job> =
            jobs.iter().map(|job| Job { seed: candidate(job.seed, n, index), ..job.clone() }).collect();
        let made = images.run(&candidates, &mut |progress| match progress {
            Progress::Image { .. } => Ok(()),
            Progress::Step { .. } | Progress::Iteration(_) | Progress::Again => observe(progress),
        })?;
        let scores = score(images, &candidates, &made)?;
        for (((job, image), score), best) in candidates.iter().zip(made).zip(scores).zip(&mut best) {
            if best.as_ref().is_none_or(|best| score > best.score) {
                *best = Some(Chosen { image, seed: job.seed, score });
            }
        }
    }
    let chosen: Vec<Chosen> = best.into_iter().flatten().collect();
    for (index, chosen) in chosen.iter().enumerate() {
        observe(Progress::Image { index, image: &chosen.image })?;
    }
    Ok(chosen)
}
