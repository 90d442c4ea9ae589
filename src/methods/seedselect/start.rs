//! Where SeedSelect begins: at a noise of the image's own, or among the noises that the references are inverted to (NAO).

use super::nao::chi::Chi;
use super::nao::combine::{self, norm};
use super::nao::{Middle, Settings, middle, path};
use crate::exec::Executor;
use crate::pipeline::generate::{self, Job};
use crate::pipeline::inversion::{self, Inversion};
use crate::pipeline::{Observer, Pipeline};
use crate::sampler::{self, Method, draw};
use crate::{Error, Result};
use std::collections::HashMap;

/// What starting noises are drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Gaussian noise under the image's seed.
    Noise,
    /// The likely paths from the norm-aware centroid of the inverted references to each of them: what the released code of NAO runs
    /// SeedSelect from, point by point (Samuel et al. 2023, arXiv 2306.08687; its main.py, lines 159 to 182).
    Nao,
    /// The combinations of the inverted references by LOL (Bodin et al. 2024, arXiv 2408.08558), with weights from equal ones to those
    /// of one reference alone.
    Lol,
}

impl Start {
    pub fn name(self) -> &'static str {
        match self {
            Start::Noise => "noise",
            Start::Nao => "nao",
            Start::Lol => "lol",
        }
    }
}

/// The inversion of one reference: DDIM in so many steps at guidance 1, as the released code does it (nao/ddim_inversion.py), whatever
/// samples.
pub(super) fn plan<'p>(
    pipeline: &'p Pipeline,
    executor: &dyn Executor,
    images: &generate::Settings,
    steps: usize,
) -> Result<Inversion<'p>> {
    let sampler =
        sampler::Settings { method: Method::Ddim, steps, eta: 0.0, guidance: 1.0, cfg_pp: false, ..images.sampler };
    Inversion::plan(pipeline, executor, &generate::Settings { sampler, ..images.clone() }, 1, 0)
}

/// What inverts the references under the prompts of a batch.
pub(super) struct Inverter<'p> {
    pub inversion: inversion::Loaded<'p>,
    pub start: Start,
    /// Of the references, `[C, h, w]`, the means of their posteriors at the UNet's scale.
    pub latents: Vec<Vec<f32>>,
    /// Under each prompt of the last batch.
    pub inverted: HashMap<String, Inverted>,
}

impl Inverter<'_> {
    /// Inverts the references under the prompts of the jobs that the batch before did not have.
    pub fn prepare(&mut self, executor: &mut dyn Executor, jobs: &[Job], observe: &mut Observer<'_>) -> Result<()> {
        self.inverted.retain(|prompt, _| jobs.iter().any(|job| job.prompt == *prompt));
        for Job { prompt, .. } in jobs {
            if self.inverted.contains_key(prompt) {
                continue;
            }
            let mut noises = Vec::with_capacity(self.latents.len());
            for latents in &self.latents {
                noises.extend(self.inversion.run(executor, &[prompt], std::slice::from_ref(latents), observe)?);
            }
            self.inverted.insert(prompt.clone(), Inverted::new(noises, self.start)?);
        }
        Ok(())
    }

    /// Starting noise `index` of a job whose prompt was prepared, `[C, h, w]`.
    pub fn draw(&self, job: &Job, index: usize) -> Result<Vec<f32>> {
        let inverted = self.inverted.get(&job.prompt);
        inverted
            .ok_or_else(|| Error::Usage("the references are not inverted under this prompt".into()))?
            .draw(job, index)
    }
}

/// The noises that references are inverted to under one prompt.
pub(super) struct Inverted {
    noises: Vec<Vec<f32>>,
    /// Their centroid, where starts lie on the paths from it.
    centroid: Option<Vec<f32>>,
}

impl Inverted {
    /// `Error::Usage` where the noises have no middle.
    fn new(noises: Vec<Vec<f32>>, start: Start) -> Result<Inverted> {
        let all: Vec<&[f32]> = noises.iter().map(|noise| &noise[..]).collect();
        let centroid = match start {
            Start::Nao => Some(middle(&all, Middle::Nao(Settings::default()))?),
            Start::Noise | Start::Lol => None,
        };
        Ok(Inverted { noises, centroid })
    }

    /// A way from the middle towards one of the noises, which and how far at random: two images, and two starts of an image, differ.
    fn draw(&self, job: &Job, index: usize) -> Result<Vec<f32>> {
        const PARTS: usize = 1 << 24;
        let choice = |which: u64, below| sampler::uniform(job.seed, draw::CHOICE + 2 * index as u64 + which, below);
        let (towards, far) = (choice(0, self.noises.len()), choice(1, PARTS) as f64 / PARTS as f64);
        if let Some(centroid) = &self.centroid {
            let path = path::path(centroid, &self.noises[towards], &Settings::default())?;
            return likeliest(&path.at(&path.lengths(), far));
        }
        let noises: Vec<&[f32]> = self.noises.iter().map(|noise| &noise[..]).collect();
        let mut weights = vec![(1.0 - far) / noises.len() as f64; noises.len()];
        weights[towards] += far;
        likeliest(&combine::lol(&noises, &weights))
    }
}

/// Of the likeliest length. Ours: an inverted noise often has another, and so have a path near it and a combination of such noises.
fn likeliest(noise: &[f32]) -> Result<Vec<f32>> {
    Ok(combine::sum(&[noise], &[Chi::new(noise.len())?.mode() / norm(noise)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::seedselect::nao::combine::distance;

    fn noise(seed: u64) -> Vec<f32> {
        let mut noise = vec![0.0; 1024];
        sampler::normal(seed, 0, &mut noise);
        noise
    }

    fn job(seed: u64) -> Job {
        Job { prompt: String::new(), negative: None, seed, draws: vec![] }
    }

    /// Every start is as long as a noise is likely to be, whatever the inverted noises are, none is another's, and all lie among those.
    #[test]
    fn starts_are_likely_and_differ() {
        let noises: Vec<Vec<f32>> = (0..3).map(|seed| noise(seed).iter().map(|x| 0.8 * x).collect()).collect();
        for start in [Start::Nao, Start::Lol] {
            let inverted = Inverted::new(noises.clone(), start).unwrap();
            let mut starts: Vec<Vec<f32>> = (0..6).map(|seed| inverted.draw(&job(seed), 0).unwrap()).collect();
            starts.extend((1..4).map(|index| inverted.draw(&job(0), index).unwrap()));
            for (index, start) in starts.iter().enumerate() {
                assert!((norm(start) - 1023f64.sqrt()).abs() < 1e-3, "{}", norm(start));
                let nearest = noises.iter().map(|noise| distance(noise, start)).fold(f64::INFINITY, f64::min);
                assert!(nearest < 30.0, "{nearest} from any of them; an independent noise is 41 away");
                assert!(starts[..index].iter().all(|other| distance(other, start) > 1e-3));
            }
            assert_eq!(inverted.draw(&job(2), 0).unwrap(), starts[2]);
        }
    }

    /// References that are the same picture have themselves as their middle.
    #[test]
    fn twice_the_same() {
        for start in [Start::Nao, Start::Lol] {
            let inverted = Inverted::new(vec![noise(1), noise(1)], start).unwrap();
            let found = inverted.draw(&job(0), 0).unwrap();
            assert!(found.iter().all(|x| x.is_finite()), "{start:?}");
        }
    }
}
