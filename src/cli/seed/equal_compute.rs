//! `--equal-compute`: every image once more as the best of as many seeds as cost the same, by the same loss of the final image.

use crate::cli::flags::images::{ImageFlags, Noise};
use crate::cli::images::account::Account;
use crate::cli::images::targets::{Selection, Targets};
use crate::cli::images::work::{self, Work};
use crate::cli::progress::Reporter;
use crate::exec::Executor;
use crate::methods::Chosen;
use crate::methods::baselines::search::Searched;
use crate::methods::seedselect::{Likeness, SeedSelect};
use crate::optimize::search::ladder::Search;
use crate::pipeline::{Pipeline, Progress};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A run's images, made again.
pub struct Again<'a> {
    pub args: &'a ImageFlags,
    pub pipeline: &'a Pipeline,
    pub method: &'a SeedSelect,
    pub targets: &'a Targets,
    pub account: &'a Account,
}

impl Again<'_> {
    /// What was chosen, beside the loss of what was optimised.
    pub fn run(&self) -> Result<Value> {
        let mut made = Selection::none_of(self.targets);
        let with_noise =
            || self.account.images.iter().filter_map(|(index, image)| Some((*index, image.noise.as_ref()?)));
        with_noise().for_each(|(index, _)| made.add(index, true));
        if made.is_empty() {
            return Ok(Value::Null);
        }
        let mut noises = vec![vec![]; self.targets.len()];
        with_noise().for_each(|(index, noise)| noises[index].clone_from(noise));
        let mut executor = self.args.run.device.executor(self.args.run.check_finite)?;
        let (own, calls, _) = self.best_of(1, Some(noises), &made, &mut *executor)?;
        let n = ((self.account.equivalents() / calls as f64).round() as usize).max(1);
        let (best, calls, seconds) = self.best_of(n, None, &made, &mut *executor)?;
        let images = with_noise().zip(own.iter().zip(&best)).map(|((index, _), (own, best))| {
            let target = self.targets.get(index);
            json!({
                "seed": target.seed, "optimised": {"loss": -own.score},
                "best_of": {"loss": -best.score, "candidate": best.candidate, "seed": best.seed}
            })
        });
        let images: Vec<Value> = images.collect();
        let means = ["optimised", "best_of"].map(|arm| {
            images.iter().filter_map(|image| image[arm]["loss"].as_f64()).sum::<f64>() / images.len() as f64
        });
        Ok(json!({
            "n": n, "forwards_per_image": calls, "seconds": seconds, "images": images,
            "mean_loss": {"optimised": means[0], "best_of": means[1]}
        }))
    }

    /// The best of `n` seeds per image, or of one the image of its noise; UNet forwards per image, and seconds.
    fn best_of(
        &self,
        n: usize,
        noises: Noise,
        made: &Selection<'_>,
        executor: &mut dyn Executor,
    ) -> Result<(Vec<Chosen>, usize, f64)> {
        let Again { args, pipeline, method, account, .. } = self;
        let likeness = Likeness { references: method.references.clone(), options: method.options, seed: method.seed };
        let searched = Searched { search: Search::BestOf, n, by: Box::new(likeness) };
        let settings = args.run.settings(pipeline)?;
        let work = Work { pipeline, settings: &settings, method: &searched };
        // Not before the optimised images: what optimises them takes more memory than this.
        let parts = work.plan(&args.run.device, executor, made, args.run.batch)?;
        let mut reporter = Reporter::new(args.run.json, args.run.quiet);
        reporter.start("step", parts.iter().map(work::Part::progress_units).fold(0, usize::saturating_add));
        let negative = args.run.sampling.negative.as_deref();
        let (mut chosen, mut forwards, started) = (vec![], 0, Instant::now());
        for part in parts {
            executor.clear();
            forwards += part.nfe().forward;
            let work::Part { planned, batches } = part;
            let mut loaded = planned.load(executor)?;
            for positions in batches.iter() {
                let jobs: Vec<_> =
                    made.targets(positions).iter().map(|target| work::job(target, negative, &noises)).collect();
                loaded.run_checked(&jobs, &mut |progress| {
                    if let Progress::Step { .. } = progress {
                        reporter.step();
                    }
                    if account.interrupt.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
                })?;
                chosen.extend((0..jobs.len()).filter_map(|index| loaded.chosen(index)));
            }
        }
        reporter.finish();
        Ok((chosen, forwards / made.len(), started.elapsed().as_secs_f64()))
    }
}
