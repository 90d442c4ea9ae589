//! The state of a run between two iterations as bytes: a run that goes on from them is the same, bit for bit.

use super::options::Patience;
use super::seed::{Best, Seed};
use super::{Loaded, Phase};
use crate::optimize::optimizer::OptimizerState;
use crate::pipeline::generate::Job;
use crate::weights::fingerprint;
use crate::{Error, Result};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Where the states of batches are kept; whoever keeps them knows when a batch is done.
pub trait Checkpoints {
    /// What an earlier run of these jobs left; `None`: nothing, or it is to begin anew.
    fn read(&self, jobs: &[Job]) -> Result<Option<Vec<u8>>>;

    /// In the place of what is there.
    fn write(&self, jobs: &[Job], state: &[u8]) -> Result<()>;
}

/// A batch between two iterations.
pub(super) struct State {
    /// The next one.
    pub iteration: usize,
    /// All rows.
    pub noise: Vec<f32>,
    /// What all images share, all rows; empty before it is found, and where nothing is shared.
    pub shared: Vec<f32>,
    pub seeds: Vec<Seed>,
    pub optimizer: OptimizerState,
}

/// What is no tensor.
#[derive(Serialize, Deserialize)]
struct Numbers {
    /// Of everything that decides the images.
    key: String,
    iteration: usize,
    /// Steps of the optimizer.
    taken: usize,
    seeds: Vec<SeedNumbers>,
}

#[derive(Serialize, Deserialize)]
struct SeedNumbers {
    /// Bits: JSON has no infinity.
    loss: u64,
    iteration: usize,
    patience: Patience,
    stopped: bool,
}

const NUMBERS: &str = "numbers";
const SHARED: &str = "shared";

fn moment(index: usize) -> String {
    format!("moment.{index}")
}

impl State {
    /// `key` is of everything that decides the images.
    pub fn to_bytes(&self, key: &str) -> Result<Vec<u8>> {
        let rows = |row: fn(&Seed) -> &Vec<f32>| self.seeds.iter().flat_map(|seed| row(seed).iter().copied()).collect();
        let mut tensors: Vec<(String, Vec<f32>)> = vec![
            ("noise".into(), self.noise.clone()),
            ("first".into(), rows(|seed| &seed.first)),
            ("best".into(), rows(|seed| &seed.best.noise)),
        ];
        if !self.shared.is_empty() {
            tensors.push((SHARED.into(), self.shared.clone()));
        }
        let moments = self.optimizer.moments.iter().enumerate();
        tensors.extend(moments.map(|(index, values)| (moment(index), values.clone())));
        let seeds = self.seeds.iter().map(|seed| SeedNumbers {
            loss: seed.best.loss.to_bits(),
            iteration: seed.best.iteration,
            patience: seed.patience,
            stopped: seed.stopped,
        });
        let numbers =
            Numbers { key: key.into(), iteration: self.iteration, taken: self.optimizer.taken, seeds: seeds.collect() };
        let invalid = |error: String| Error::Usage(format!("the state of the run: {error}"));
        let numbers = serde_json::to_string(&numbers).map_err(|error| invalid(error.to_string()))?;
        let bytes: Vec<(String, Vec<u8>)> = tensors
            .into_iter()
            .map(|(name, values)| (name, values.iter().flat_map(|x| x.to_le_bytes()).collect()))
            .collect();
        let views = bytes.iter().map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
            view.map(|view| (name.as_str(), view))
        });
        let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(|error| invalid(error.to_string()))?;
        let metadata = HashMap::from([(NUMBERS.to_string(), numbers)]);
        safetensors::serialize(views, Some(metadata)).map_err(|error| invalid(error.to_string()))
    }

    /// Of a batch of so many images, each of `len` numbers. `Error::Usage` where the bytes are not that, or have another key.
    pub fn parse(bytes: &[u8], key: &str, sizes: (usize, usize)) -> Result<State> {
        let wrong = |what: &str| {
            Error::Usage(format!("--resume: what is kept of the run is {what}; leave it out to begin anew"))
        };
        let (found, state) = State::parsed(bytes, sizes).ok_or_else(|| wrong("damaged"))?;
        if found == key { Ok(state) } else { Err(wrong("of other settings")) }
    }

    /// With its key.
    fn parsed(bytes: &[u8], (batch, len): (usize, usize)) -> Option<(String, State)> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).ok()?;
        let numbers: Numbers = serde_json::from_str(metadata.metadata().as_ref()?.get(NUMBERS)?).ok()?;
        let file = SafeTensors::deserialize(bytes).ok()?;
        let tensor = |name: &str| -> Option<Vec<f32>> {
            let tensor = file.tensor(name).ok().filter(|tensor| tensor.dtype() == Dtype::F32)?;
            let numbers = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            Some(numbers.collect::<Vec<f32>>()).filter(|values| values.len() == batch * len)
        };
        let (noise, first, best) = (tensor("noise")?, tensor("first")?, tensor("best")?);
        let shared = if file.tensor(SHARED).is_ok() { tensor(SHARED)? } else { vec![] };
        let moments = (0..).map_while(|index| tensor(&moment(index))).collect();
        if numbers.seeds.len() != batch {
            return None;
        }
        let seeds = numbers.seeds.iter().zip(first.chunks(len)).zip(best.chunks(len)).map(|((seed, first), best)| {
            let best = Best { noise: best.to_vec(), loss: f64::from_bits(seed.loss), iteration: seed.iteration };
            Seed { first: first.to_vec(), best, patience: seed.patience, stopped: seed.stopped, is_unlikely: false }
        });
        let optimizer = OptimizerState { taken: numbers.taken, moments };
        let state = State { iteration: numbers.iteration, noise, shared, seeds: seeds.collect(), optimizer };
        Some((numbers.key, state))
    }
}

impl Loaded<'_, '_> {
    /// What is kept of an earlier run of the jobs that was cut short.
    pub(super) fn kept(&self, jobs: &[Job]) -> Result<Option<State>> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(None) };
        let bytes = checkpoints.read(jobs)?;
        bytes.map(|bytes| State::parse(&bytes, &self.key(jobs), (jobs.len(), self.len))).transpose()
    }

    /// Goes on there: the seeds, and how many iterations they have behind them.
    pub(super) fn restore(&mut self, jobs: &[Job], state: State) -> Result<(Vec<Seed>, usize)> {
        // Draws of the sampler are those of the jobs.
        self.draw(jobs)?;
        self.chain.set_noise(&state.noise)?;
        self.optimizer.restore(self.chain.executor(), &state.optimizer)?;
        Ok((state.seeds, state.iteration))
    }

    /// Of everything that decides the images of these jobs.
    pub(super) fn key(&self, jobs: &[Job]) -> String {
        format!("{:016x}", fingerprint(format!("{} {jobs:?}", self.settings).into_bytes()))
    }

    /// Keeps where the run is, before `iteration`.
    pub(super) fn checkpoint(&mut self, phase: &Phase<'_>, seeds: Vec<Seed>, iteration: usize) -> Result<Vec<Seed>> {
        let Some(checkpoints) = self.checkpoints.clone() else { return Ok(seeds) };
        let (noise, optimizer) = (self.chain.noise()?, self.optimizer.state(self.chain.executor())?);
        let state = State { iteration, noise, shared: phase.shared.to_vec(), seeds, optimizer };
        checkpoints.write(phase.batch, &state.to_bytes(&self.key(phase.batch))?)?;
        Ok(state.seeds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let mut patience = Patience::default();
        patience.stops(0.1 + 0.2, Some(3));
        let seed = |x: f32| Seed {
            first: vec![x, f32::MIN_POSITIVE],
            best: Best { noise: vec![-x, 0.1], loss: f64::from(x) / 3.0, iteration: 2 },
            patience,
            stopped: x > 1.0,
            is_unlikely: false,
        };
        let optimizer = OptimizerState { taken: 7, moments: vec![vec![0.5; 4], vec![1e-30; 4]] };
        let (noise, shared) = (vec![1.0, 2.0, 3.0, 4.0], vec![5.0; 4]);
        let state = State { iteration: 7, noise, shared, seeds: vec![seed(1.0), seed(2.0)], optimizer };
        let bytes = state.to_bytes("k").unwrap();
        let found = State::parse(&bytes, "k", (2, 2)).unwrap();
        assert_eq!((found.iteration, &found.noise, &found.optimizer), (7, &state.noise, &state.optimizer));
        assert_eq!(found.shared, state.shared);
        for (found, state) in found.seeds.iter().zip(&state.seeds) {
            assert_eq!((&found.first, &found.best.noise), (&state.first, &state.best.noise));
            assert_eq!((found.best.loss, found.best.iteration), (state.best.loss, 2));
            assert_eq!((found.patience, found.stopped), (state.patience, state.stopped));
        }
        let refused = |bytes: &[u8], key: &str, sizes| State::parse(bytes, key, sizes).err().unwrap().to_string();
        assert!(refused(&bytes, "other", (2, 2)).contains("other settings"));
        assert!(refused(&bytes, "k", (1, 4)).contains("damaged") && refused(&bytes, "k", (2, 3)).contains("damaged"));
        for length in 0..bytes.len() {
            assert!(refused(&bytes[..length], "k", (2, 2)).contains("damaged"), "{length}");
        }
    }
}
