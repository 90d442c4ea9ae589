//! The programs of SeedSelect: the run as a function of its noise with the terms of the loss, the optimizer, the decoder, the encoders,
//! the inversion.

use super::held_out::{HeldOut, PlannedHeldOut};
use super::options::{Convention, Options, TEMPERATURE};
use super::prompt::Prompt;
use super::references::{Encoders, Wanted, tower};
use super::start::{self, Start};
use super::watch::Watch;
use crate::Result;
use crate::exec::Executor;
use crate::methods::Request;
use crate::optimize::chain::{self, Chain, Storage, Term};
use crate::optimize::objective::references::{Tower, appearance, contrast, norm_prior, semantics};
use crate::optimize::objective::{Nfe, loss_scale};
use crate::optimize::optimizer::PlannedOptimizer;
use crate::optimize::variable::Entry;
use crate::pipeline::inversion::Inversion;
use crate::pipeline::programs::{self, Sizes};
use crate::pipeline::{Pipeline, generate};
use crate::plan::{Footprint, Planned, plan};
use crate::program::DType;
use crate::sampler;
use crate::weights::Component;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

/// A term of the loss, as the trace calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TermName {
    /// At the state after so many steps.
    Semantics {
        after: usize,
    },
    Contrast {
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
            TermName::Contrast { after } => write!(f, "contrast.{after}"),
            TermName::Appearance => f.write_str("appearance"),
            TermName::NormPrior => f.write_str("norm_prior"),
            TermName::HeldOut(_) => f.write_str("held_out"),
        }
    }
}

/// What is planned.
pub struct Spec<'a> {
    pub options: &'a Options,
    /// How many there are.
    pub references: usize,
    /// Other classes.
    pub others: usize,
    pub watch: &'a Watch,
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
    pub(super) prompt: Option<Prompt>,
    pub(super) judge: Option<PlannedHeldOut>,
    pub(super) inversion: Option<Inversion<'p>>,
    references: usize,
    fresh: Fresh,
    pub(super) watch: Watch,
    pub(super) channels: usize,
    pub(super) len: usize,
}

impl<'p> Programs<'p> {
    /// Plans the fastest way that fits the memory; where none does, the one that needs least.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        spec: &Spec<'_>,
        request: &Request<'_>,
    ) -> Result<Programs<'p>> {
        let within = |budget| Programs::within(pipeline, executor, spec, request, budget);
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
        &Spec { options, references, others, watch }: &Spec<'_>,
        request: &Request<'_>,
        budget: Option<usize>,
    ) -> Result<Programs<'p>> {
        let (images, batch) = (request.settings, request.batch);
        let (height, width) = pipeline.latent_size(images.width, images.height)?;
        programs::check_pixels(images.width, images.height, batch)?;
        let sizes = Sizes { batch, height, width, tokens: pipeline.tokens() };
        let tower = options.has_features().then(|| tower(pipeline, Component::Clip, options.views)).transpose()?;
        let seen = tower.clone().map(|tower| seen(tower, options.convention));
        let (run, image_steps) = run(pipeline, options, images)?;
        let schedule = sampler::schedule(&pipeline.config.scheduler, &run)?;
        let point = (schedule.steps.len(), schedule.initial_scale);
        let judge = watch.judge.map(|judge| judge.plan(pipeline, executor, images)).transpose()?;
        let mut terms = terms((options, others), images.dtype, seen.as_ref(), point);
        terms.extend(judge.iter().map(|judge| ((TermName::HeldOut(judge.kind()), 1.0), judge.term())));
        let (names, terms) = terms.into_iter().unzip();
        let chain_options = chain::Options {
            width: images.width,
            height: images.height,
            batch,
            dtype: images.dtype,
            sampler: run,
            image_steps,
            budget,
        };
        let chain = Chain::plan(pipeline, executor, &chain_options, &[Entry::Latents], terms)?;
        let parameter = chain.noise_parameter();
        let channels = pipeline.config.unet.in_channels;
        let inverts = options.start != Start::Noise;
        let wanted = Wanted { tower: tower.as_ref(), latents: options.appearance != 0.0, means: inverts };
        let how = (options.convention, [images.width, images.height]);
        let encoders = Encoders::plan(pipeline, executor, images.dtype, wanted, how)?;
        let reads_prompt = options.semantics != 0.0 && options.prompt != 0.0;
        let prompt = reads_prompt.then(|| Prompt::plan(pipeline, executor, images.dtype, batch));
        let inversion = || start::plan(pipeline, executor, images, options.inversion_steps);
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
            prompt: prompt.transpose()?,
            judge,
            inversion: inverts.then(inversion).transpose()?,
            references,
            fresh: Fresh::of(request),
            watch: watch.clone(),
            channels,
            len: channels * height * width,
        })
    }

    pub fn all(&self) -> Vec<&Planned> {
        let mut all = self.chain.programs();
        all.extend(self.optimizer.all());
        all.push(&self.decode);
        all.extend(self.encoders.programs());
        all.extend(self.prompt.iter().map(Prompt::program));
        all.extend(self.judge.iter().flat_map(PlannedHeldOut::programs));
        all.extend(self.inversion.iter().flat_map(Inversion::programs));
        all
    }

    fn footprint(&self) -> Footprint {
        Footprint::of(&self.all())
    }

    /// Of a batch.
    fn runs(&self) -> Runs {
        let first = self.options.iterations;
        let optimised = match self.options.bootstrap {
            None => self.optimisation(),
            Some(iterations) => self.phase(first..first + iterations),
        };
        Runs { images: optimised.images + 1, ..optimised }
    }

    /// Of what is shared: the noise of bootstrapped images, for every batch with a prompt that the batch before has not.
    fn shared_runs(&self) -> Runs {
        let Runs { there_and_back, plain, images } = self.optimisation();
        let batches = if self.options.bootstrap.is_some() { self.fresh.batches } else { 0 };
        Runs { there_and_back: batches * there_and_back, plain: batches * plain, images: batches * images }
    }

    /// From the starting noises to the last iterate.
    fn optimisation(&self) -> Runs {
        let starts = if self.options.starts > 1 { self.options.starts } else { 0 };
        let phase = self.phase(0..self.options.iterations);
        Runs { plain: starts + phase.plain, ..phase }
    }

    /// These iterations, their previews, and where the last iterate is looked at, that.
    fn phase(&self, iterations: Range<usize>) -> Runs {
        let previews = self.watch.previews(iterations.end) - self.watch.previews(iterations.start);
        let last = usize::from(self.options.convention == Convention::Default);
        Runs { there_and_back: iterations.len(), plain: last, images: previews }
    }

    /// Of all batches, each reference under each prompt.
    fn inversions(&self) -> usize {
        self.references * self.fresh.prompts
    }

    pub fn progress_units(&self) -> usize {
        self.runs().progress_units(&self.chain)
    }

    pub fn shared_units(&self) -> usize {
        let inversion = self.inversion.as_ref().map_or(0, Inversion::calls);
        self.inversions() * inversion + self.shared_runs().progress_units(&self.chain)
    }

    pub fn nfe(&self) -> Nfe {
        self.runs().nfe(&self.chain)
    }

    pub fn shared_nfe(&self) -> Nfe {
        let inversion = self.inversion.as_ref().map_or(0, Inversion::nfe);
        let Nfe { forward, backward } = self.shared_runs().nfe(&self.chain);
        Nfe { forward: self.inversions() * inversion + forward, backward }
    }
}

/// Runs of the sampler from start to end.
struct Runs {
    there_and_back: usize,
    /// Without a gradient: trying starts, the last iterate.
    plain: usize,
    /// With as many steps as images have: previews, the image.
    images: usize,
}

impl Runs {
    fn progress_units(&self, chain: &Chain<'_>) -> usize {
        let steps = chain.steps();
        self.there_and_back * (1 + 2 * steps) + self.plain * steps + self.images * chain.image_steps()
    }

    /// Where each step is computed again on the way back, that is a forward too.
    fn nfe(&self, chain: &Chain<'_>) -> Nfe {
        let (calls, again) = (chain.calls(), usize::from(matches!(chain.storage(), Storage::Latents(_))));
        let optimising = calls * (self.plain + self.there_and_back * (1 + again));
        Nfe { forward: optimising + chain.image_calls() * self.images, backward: calls * self.there_and_back }
    }
}

/// What batches have that the one before has not.
struct Fresh {
    prompts: usize,
    /// Batches with such a prompt.
    batches: usize,
}

impl Fresh {
    fn of(request: &Request<'_>) -> Fresh {
        let (mut fresh, mut before) = (Fresh { prompts: 0, batches: 0 }, HashSet::new());
        for batch in request.prompts.chunks(request.batch.max(1)) {
            let prompts: HashSet<&str> = batch.iter().copied().collect();
            let new = prompts.difference(&before).count();
            fresh.prompts += new;
            fresh.batches += usize::from(new > 0);
            before = prompts;
        }
        fresh
    }
}

/// A tower as generated images are seen by it.
pub(super) fn seen(tower: Tower, convention: Convention) -> Tower {
    match convention {
        Convention::Default => tower,
        Convention::Released => Tower { preprocess: tower.preprocess.seed_select(), ..tower },
    }
}

/// The sampler of the run that is optimised, and the steps of the images where those are more.
fn run(
    pipeline: &Pipeline,
    options: &Options,
    images: &generate::Settings,
) -> Result<(sampler::Settings, Option<usize>)> {
    let all = images.sampler;
    let adds_noise = sampler::schedule(&pipeline.config.scheduler, &all)?.needs.noise;
    Ok(match options.steps.filter(|steps| *steps < all.steps && !adds_noise) {
        Some(steps) => (sampler::Settings { steps, ..all }, Some(all.steps)),
        None => (all, None),
    })
}

/// The terms that count, each with its name and what it is multiplied with, with so many other classes, for a run of so many steps
/// and the scale of the noise that it starts from.
fn terms<'a>(
    (options, others): (&Options, usize),
    dtype: DType,
    tower: Option<&'a Tower>,
    (steps, scale): (usize, f64),
) -> Vec<((TermName, f64), Term<'a>)> {
    let loss_scale = loss_scale(dtype);
    let mut terms = Vec::new();
    if let Some(tower) = tower {
        for (after, fraction) in Options::states(steps) {
            let [weight, apart] = [options.semantics, options.contrast].map(|weight| weight * fraction);
            if weight != 0.0 {
                let term = Term::after(after, semantics(tower, options.prompt, loss_scale * weight));
                terms.push(((TermName::Semantics { after }, weight), term));
            }
            if apart != 0.0 {
                let term = Term::after(after, contrast(tower, others, TEMPERATURE, loss_scale * apart));
                terms.push(((TermName::Contrast { after }, apart), term));
            }
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
