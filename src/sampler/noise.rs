//! Initial and ancestral noise of one image, from a generator that is the same everywhere or from one that matches torch.

use super::torch::{TorchCpu, TorchCuda};
use crate::exec::philox;
use crate::{Error, Result};

/// Which generator; `Display` and `FromStr` use the names of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rng {
    /// Our own: the same bits on every device and in every batch.
    Philox,
    /// `torch.randn` with a CPU generator.
    TorchCpu,
    /// `torch.randn` with a CUDA generator.
    TorchCuda,
}

impl Rng {
    pub const ALL: [Rng; 3] = [Rng::Philox, Rng::TorchCpu, Rng::TorchCuda];

    pub fn name(self) -> &'static str {
        match self {
            Rng::Philox => "philox",
            Rng::TorchCpu => "torch-cpu",
            Rng::TorchCuda => "torch-cuda",
        }
    }
}

impl std::fmt::Display for Rng {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Rng {
    type Err = Error;

    fn from_str(name: &str) -> Result<Rng> {
        Rng::ALL.into_iter().find(|r| r.name() == name).ok_or_else(|| {
            let names = Rng::ALL.map(Rng::name).join(", ");
            Error::Usage(format!("unknown generator '{name}' (one of {names})"))
        })
    }
}

/// Numbers of draws: each use of a seed begins at one of these, far from the others.
pub mod draw {
    /// Starting latents, and one draw per sampler step.
    pub const SAMPLER: u64 = 0;
    /// Fresh noise of objectives, one draw per evaluation.
    pub const LOOK: u64 = 1 << 63;
    /// First embeddings of learnable tokens.
    pub const TOKEN: u64 = LOOK + (1 << 60);
    /// Noise on the text states, one draw per sampler step.
    pub const TEXT: u64 = LOOK + (2 << 60);
    /// Samples of what reference images are encoded to, one draw per image.
    pub const REFERENCE: u64 = LOOK + (7 << 60);
    /// Fresh noise of scores.
    pub const SCORE: u64 = LOOK + (3 << 60);
    /// Fresh noise of searches, one draw per candidate.
    pub const SEARCH: u64 = LOOK + (4 << 60);
    /// What searches choose at random.
    pub const CHOICE: u64 = LOOK + (5 << 60);
    /// Where the points of paths between noises start, one draw per number.
    pub const JITTER: u64 = LOOK + (6 << 60);
}

/// Draw `draw` under a seed, of our own generator.
pub fn normal(seed: u64, draw: u64, out: &mut [f32]) {
    philox::normal(philox::halves(seed), draw, out);
}

/// A whole number below `below`, a pure function of seed and draw.
pub fn uniform(seed: u64, draw: u64, below: usize) -> usize {
    let [low, high] = philox::halves(draw);
    let word = philox::philox([0, 0, low, high], philox::halves(seed))[0];
    ((u128::from(word) * below as u128) >> 32) as usize
}

/// What [`crate::program::Update::Noise`] reads to make a draw under each seed.
pub fn counters(seeds: &[u64], draw: u64) -> Vec<i32> {
    let words = |v: u64| philox::halves(v).map(|word| word as i32);
    seeds.iter().flat_map(|seed| [words(*seed), words(draw)]).flatten().collect()
}

/// The noise of one image, drawn in order: draw 0 is the initial latents, draw `k + 1` belongs to sampler step `k`.
pub struct Noise(Source);

enum Source {
    Philox { key: [u32; 2], draw: u64 },
    TorchCpu(Box<TorchCpu>),
    TorchCuda(TorchCuda),
}

impl Noise {
    pub fn new(rng: Rng, seed: u64) -> Noise {
        Noise(match rng {
            Rng::Philox => Source::Philox { key: philox::halves(seed), draw: draw::SAMPLER },
            Rng::TorchCpu => Source::TorchCpu(Box::new(TorchCpu::new(seed))),
            Rng::TorchCuda => Source::TorchCuda(TorchCuda::new(seed)),
        })
    }

    /// The next draw: fills `out` with standard normal numbers, in `[C, H, W]` order where they are latents.
    pub fn normal(&mut self, out: &mut [f32]) {
        match &mut self.0 {
            Source::Philox { key, draw } => {
                philox::normal(*key, *draw, out);
                *draw += 1;
            }
            Source::TorchCpu(torch) => torch.normal(out),
            Source::TorchCuda(torch) => torch.normal(out),
        }
    }
}
