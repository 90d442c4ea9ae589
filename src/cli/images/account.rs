//! What a run took and what came of every iteration, for `--report`: gathered while images are made.

use crate::cli::images::ledger::BACKWARD;
use crate::cli::images::stopwatch::{Timed, Times};
use crate::cli::images::targets::Target;
use crate::cli::machine;
use crate::optimize::objective::Nfe;
use crate::pipeline::Iteration;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[derive(Default)]
pub struct Account {
    pub times: Times,
    pub load_seconds: f64,
    /// Of the batches, without loading.
    pub seconds: f64,
    pub planned_bytes: usize,
    /// By the numbers of their targets.
    pub images: BTreeMap<usize, ImageAccount>,
    /// Raised by Ctrl-C.
    pub interrupt: Arc<AtomicBool>,
}

/// One image.
#[derive(Default)]
pub struct ImageAccount {
    pub path: String,
    pub seed: u64,
    /// A value per iteration.
    pub iterations: Vec<Value>,
    /// What it was made from, `[C, h, w]`; where it is made.
    pub noise: Option<Vec<f32>>,
}

/// What the programs are for, by how their names begin: the split of the time.
const STAGES: [(&str, &str); 8] = [
    ("step backward", "unet_recompute_and_backward"),
    ("step", "unet_forward"),
    ("run", "unet_all_steps_in_one"),
    ("objective", "decoder_and_clip"),
    ("decode", "decode"),
    ("optimizer", "optimizer"),
    ("reference", "references"),
    ("", "other"),
];

impl Account {
    pub fn iteration(&mut self, targets: &[Target], report: &Iteration) {
        for (row, target) in targets.iter().enumerate() {
            let terms: BTreeMap<&String, f64> = report.terms.iter().map(|(name, values)| (name, values[row])).collect();
            self.image(target).iterations.push(json!({
                "iteration": report.iteration, "rate": report.lr, "loss": report.score[row], "terms": terms,
                "gradient": report.gradient[row], "moved": report.moved[row]
            }));
        }
    }

    pub fn image(&mut self, target: &Target) -> &mut ImageAccount {
        let new = || ImageAccount { path: target.path.display().to_string(), seed: target.seed, ..Default::default() };
        self.images.entry(target.index).or_insert_with(new)
    }

    /// UNet calls that were made: a program with a gradient runs its forward too.
    pub fn counted(&self) -> Nfe {
        let sum = |of: fn(&Timed) -> bool| {
            self.times.borrow().iter().filter(|timed| of(timed)).map(|timed| timed.runs * timed.calls).sum()
        };
        Nfe { forward: sum(|_| true), backward: sum(|timed| timed.name.ends_with("gradient")) }
    }

    /// The same in forwards, per image.
    pub fn equivalents(&self) -> f64 {
        let Nfe { forward, backward } = self.counted();
        (forward + BACKWARD * backward) as f64 / self.images.len().max(1) as f64
    }

    pub fn json(&self) -> Value {
        let times = self.times.borrow();
        let mut stages: Map<String, Value> = Map::new();
        for (_, stage) in STAGES {
            let of = |timed: &&Timed| {
                STAGES.iter().find(|(start, _)| timed.name.starts_with(start)).is_some_and(|(_, own)| *own == stage)
            };
            let sum = |value: fn(&Timed) -> f64| times.iter().filter(of).map(value).sum::<f64>();
            let runs: usize = times.iter().filter(of).map(|timed| timed.runs).sum();
            if runs > 0 {
                let (seconds, flops) =
                    (sum(|timed| timed.seconds), sum(|timed| timed.runs as f64 * timed.flops as f64));
                stages.insert(stage.into(), json!({"runs": runs, "seconds": seconds, "flops": flops}));
            }
        }
        let images = self.images.values().map(|image| {
            json!({"path": image.path, "seed": image.seed, "made": image.noise.is_some(), "iterations": image.iterations})
        });
        let Nfe { forward, backward } = self.counted();
        json!({
            "version": env!("CARGO_PKG_VERSION"), "load_seconds": self.load_seconds, "seconds": self.seconds,
            "stages": stages, "planned_bytes": self.planned_bytes, "peak_bytes": machine::peak_bytes(),
            "unet_calls": {"forwards": forward, "backwards": backward, "forward_equivalents_per_image": self.equivalents()},
            "images": images.collect::<Vec<_>>()
        })
    }
}
