//! The programs of SeedSelect: the run as a function of its noise with the terms of the loss, the optimizer, the decoder, the encoders.

use super::held_out::{HeldOut, PlannedHeldOut};
use super::options::{Convention, Options};
use super::references::{Encoders, tower};
use super::watch::Watch;
use crate::Result;
use crate::exec::Executor;
use crate::methods::Request;
use crate::optimize::chain::{self, Chain, Storage, Term};
use crate::optimize::objective::references::{Tower, appearance, norm_prior, semantics};
use crate::optimize::objective::{Nfe, loss_scale};
use crate::optimize::optimizer::PlannedOptimizer;
use crate::optimize::variable::Entry;
use crate::pipeline::programs::{self, Sizes};
use crate::pipeline::{Pipeline, generate};
use crate::plan::{Footprint, Planned, plan};
use crate::sampler;
use crate::weights::Component;
use std::fmt;

/// A term of the loss, as the trace calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TermName {
    /// At the state after so many steps.
    Semantics {
        after: usize,
    },
    Appearance,
    NormPrior,
    /// No part of the loss.
    HeldOut(HeldOut),
}

impl fmt::Display for TermName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TermName::Semantics { after } => write!(f, "semantics.{after}"),
            TermName::Appearance => f.write_str("appearance"),
            TermName::NormPrior => f.write_str("norm_prior"),
            TermName::HeldOut(_) => f.write_str("held_out"),
        }
    }
}

/// SeedSelect, planned but not loaded.
pub struct Programs<'p> {
    pub(super) pipeline: &'p Pipeline,
    pub(super) options: Options,
    pub(super) images: generate::Settings,
    pub(super) terms: Vec<(TermName, f64)>,
    pub(super) chain: Chain<'p>,
    pub(super) optimizer: PlannedOptimizer,
    pub(super) decode: Planned,
    pub(super) encoders: Encoders,
    pub(super) judge: Option<PlannedHeldOut>,
    previews: usize,
    pub(super) channels: usize,
    pub(super) len: usize,
}

impl<'p> Programs<'p> {
    /// Plans the fastest way that fits the memory; where none does, the one that needs least.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        options: &Options,
        watch: &Watch,
        request: &Request<'_>,
    ) -> Result<Programs<'p>> {
        let within = |budget| Programs::within(pipeline, executor, (options, watch), request, budget);
        let frugal = within(None)?;
        let footprint = frugal.footprint();
        let rest = footprint.total() - footprint.arena_bytes;
        match request.memory.and_then(|memory| memory.checked_sub(rest)) {
            Some(budget) => Ok(within(Some(budget)).unwrap_or(frugal)),
            None => Ok(frugal),
        }
    }

    fn within(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        (options, watch): (&Options, &Watch),
        request: &Request<'_>,
        budget: Option<usize>,
    ) -> Result<Programs<'p>> {
        let (images, batch) = (request.settings, request.batch);
        let (height, width) = pipeline.latent_size(images.width, images.height)?;
        programs::check_pixels(images.width, images.height, batch)?;
        let sizes = Sizes { batch, height, width, tokens: pipeline.tokens() };
        let tower = (options.semantics != 0.0).then(|| tower(pipeline, Component::Clip)).transpose()?;
        let seen = tower.clone().map(|tower| seen(tower, options.convention));
        let scale = sampler::schedule(&pipeline.config.scheduler, &images.sampler)?.initial_scale;
        let judge = watch.judge.map(|judge| judge.plan(pipeline, executor, images)).transpose()?;
        let mut terms = terms(options, images, seen.as_ref(), scale);
        terms.extend(judge.iter().map(|judge| ((TermName::HeldOut(judge.kind()), 1.0), judge.term())));
        let (names, terms) = terms.into_iter().unzip();
        let chain_options = chain::Options {
            width: images.width,
            height: images.height,
            batch,
            dtype: images.dtype,
            sampler: images.sampler,
            budget,
        };
        let chain = Chain::plan(pipeline, executor, &chain_options, &[Entry::Latents], terms)?;
        let parameter = chain.noise_parameter();
        let channels = pipeline.config.unet.in_channels;
        let how = (options.convention, [images.width, images.height]);
        let encoders =
            Encoders::plan(pipeline, executor, images.dtype, tower.as_ref(), options.appearance != 0.0, how)?;
        Ok(Programs {
            pipeline,
            options: *options,
            images: images.clone(),
            terms: names,
            optimizer: options.optimizer().plan(executor, images.dtype, &[parameter], loss_scale(images.dtype))?,
            chain,
            decode: plan(programs::decode(pipeline, images.dtype, sizes)?, |program, node| {
                executor.workspace(program, node)
            }),
            encoders,
            judge,
            previews: watch.previews(options.iterations),
            channels,
            len: channels * height * width,
        })
    }

    pub fn all(&self) -> Vec<&Planned> {
        let mut all = self.chain.programs();
        all.extend(self.optimizer.all());
        all.push(&self.decode);
        all.extend(self.encoders.programs());
        all.extend(self.judge.iter().flat_map(PlannedHeldOut::programs));
        all
    }

    fn footprint(&self) -> Footprint {
        Footprint::of(&self.all())
    }

    /// Runs of the sampler from start to end without a gradient: trying starts, previews, the last iterate, the image.
    fn plain_runs(&self) -> usize {
        let starts = if self.options.starts > 1 { self.options.starts } else { 0 };
        starts + self.previews + usize::from(self.options.convention == Convention::Default) + 1
    }

    pub fn progress_units(&self) -> usize {
        let Options { iterations, .. } = self.options;
        iterations * (1 + 2 * self.images.sampler.steps) + self.plain_runs() * self.images.sampler.steps
    }

    /// Where each step is computed again on the way back, that is a forward too.
    pub fn nfe(&self) -> Nfe {
        let calls = self.chain.calls();
        let again = usize::from(matches!(self.chain.storage(), Storage::Latents(_)));
        let Options { iterations, .. } = self.options;
        Nfe { forward: calls * (self.plain_runs() + iterations * (1 + again)), backward: calls * iterations }
    }
}

/// A tower as generated images are seen by it.
pub(super) fn seen(tower: Tower, convention: Convention) -> Tower {
    match convention {
        Convention::Default => tower,
        Convention::Released => Tower { preprocess: tower.preprocess.seed_select(), ..tower },
    }
}

/// The terms that count, each with its name and what it is multiplied with; `scale` is that of the noise a run starts from.
fn terms<'a>(
    options: &Options,
    images: &generate::Settings,
    tower: Option<&'a Tower>,
    scale: f64,
) -> Vec<((TermName, f64), Term<'a>)> {
    let steps = images.sampler.steps;
    let loss_scale = loss_scale(images.dtype);
    let mut terms = Vec::new();
    if let Some(tower) = tower {
        for (after, fraction) in Options::states(steps) {
            let weight = options.semantics * fraction;
            let term = Term::after(after, semantics(tower, loss_scale * weight));
            terms.push(((TermName::Semantics { after }, weight), term));
        }
    }
    if options.appearance != 0.0 {
        let term = Term::at_end(appearance(loss_scale * options.appearance));
        terms.push(((TermName::Appearance, options.appearance), term));
    }
    if options.norm_prior != 0.0 {
        let term = Term::after(0, norm_prior(loss_scale * options.norm_prior, scale));
        terms.push(((TermName::NormPrior, options.norm_prior), term));
    }
    terms
}
