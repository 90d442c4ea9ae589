//! The flags of SeedSelect, and its options out of them.

use crate::Result;
use crate::cli::flags::method::{Context, MethodFlags};
use crate::cli::flags::references::ReferenceFlags;
use crate::cli::flags::values;
use crate::cli::paths::Paths;
use crate::methods::ImageMethod;
use crate::methods::seedselect::{self, LearningRate, Options, References, SeedSelect};
use crate::optimize::objective::references::View;
use crate::optimize::optimizer::Clip;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Args)]
#[command(next_help_heading = "Optimisation")]
pub struct SeedFlags {
    /// Images of what is to be shown, 3 to 5 are usual: PNG, JPEG or WebP files, or folders of them
    #[arg(
        long,
        required_unless_present = "interpolate",
        value_name = "DIR|FILE",
        num_args = 1..,
        help_heading = "References"
    )]
    pub references: Vec<PathBuf>,
    /// A CLIP with an image tower (a transformers folder or file) that sees the references [default: the model's own]
    #[arg(long, value_name = "DIR|FILE", help_heading = "References")]
    pub clip: Option<PathBuf>,
    /// default returns the best iterate and sees references and images in the same way; released follows the authors' code, its
    /// defaults and quirks
    #[arg(long, value_enum, default_value = "default")]
    pub mode: Mode,
    /// Steps of the optimiser, each a sampling run there and back [default: 6; released 30]
    #[arg(long, value_name = "K", value_parser = values::number_of, allow_negative_numbers = true)]
    iterations: Option<usize>,
    /// Learning rate of the first three iterations [default: 0.03; released 0.1]
    #[arg(long, value_parser = values::amount, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Learning rate from the fourth iteration on [default: --lr; released a tenth of it]
    #[arg(long, value_parser = values::amount, allow_negative_numbers = true)]
    lr_later: Option<f64>,
    /// Decay of AdamW [default: 0; released 0.01]
    #[arg(long, value_parser = values::amount, allow_negative_numbers = true)]
    weight_decay: Option<f64>,
    /// Steps of the sampler while noises are tried and optimised; the image has --steps [default: 8; released --steps]
    #[arg(long, value_name = "N", value_parser = values::count, allow_negative_numbers = true)]
    optimise_steps: Option<usize>,
    /// Starting noises that are tried; the best is optimised [default: 24; released 1]
    #[arg(long, value_name = "N", value_parser = values::count, allow_negative_numbers = true)]
    starts: Option<usize>,
    /// What starting noises are drawn from: noise: the image's seed; nao: the likely paths from the middle of the inverted references
    /// to each (Samuel et al. 2023); lol: combinations of those (Bodin et al. 2024)
    #[arg(long, value_enum, default_value = "noise")]
    pub start: Start,
    /// Steps in which a reference is inverted, without guidance [default: 50]
    #[arg(long, value_name = "N", value_parser = values::count, allow_negative_numbers = true)]
    inversion_steps: Option<usize>,
    /// Stop once the loss has risen more than N times one after the other; none: never [default: 3; released none]
    #[arg(long, value_name = "N|none", value_parser = patience)]
    patience: Option<Patience>,
    /// Many images of one optimisation: one noise for all, and from near it N iterations at --lr-later for every image, towards a random
    /// subset of the references; 5 are usual
    #[arg(long, value_name = "N", value_parser = values::count, allow_negative_numbers = true)]
    pub bootstrap: Option<usize>,
    /// Weight of the distance to the references in CLIP's features [default: 10]
    #[arg(long, value_name = "W", value_parser = values::amount, allow_negative_numbers = true, help_heading = "Loss")]
    semantics: Option<f64>,
    /// Weight of the squared distance to the mean latents of the references [default: 0; released 1]
    #[arg(long, value_name = "W", value_parser = values::amount, allow_negative_numbers = true, help_heading = "Loss")]
    appearance: Option<f64>,
    /// Weight of the distance to the prompt in CLIP's features, relative to that to the references [default: 0.3; released 0]
    #[arg(long, value_name = "W", value_parser = values::amount, allow_negative_numbers = true, help_heading = "Loss")]
    prompt_weight: Option<f64>,
    /// What CLIP is shown of an image: the whole, or that and four parts without a margin [default: parts; released whole]
    #[arg(long, value_enum, help_heading = "Loss")]
    views: Option<Views>,
    /// Weight of how unlikely the length of the noise is (NAO, ReNO) [default: 0]
    #[arg(long, value_name = "W", value_parser = values::amount, allow_negative_numbers = true, help_heading = "Loss")]
    norm_prior: Option<f64>,
    /// Images of another class, which the image is to be less like than the references (an extension); once per class
    #[arg(long, value_name = "DIR|FILE", help_heading = "Extensions")]
    pub other: Vec<PathBuf>,
    /// Weight of the contrast to the classes of --other in CLIP's features, InfoNCE at temperature 0.1 (an extension)
    #[arg(long, value_name = "W", value_parser = values::amount, allow_negative_numbers = true, help_heading = "Extensions")]
    contrast: Option<f64>,
    /// Bring the noise back to the length it began with after every step (an extension, from DOODL)
    #[arg(long, help_heading = "Extensions")]
    renormalise: bool,
    /// Bound on every number of the gradient (an extension, from DOODL, which has 1e-3)
    #[arg(long, value_name = "BOUND", value_parser = values::amount, allow_negative_numbers = true, help_heading = "Extensions")]
    clip_gradient: Option<f64>,
    /// Bound on the length of the gradient (an extension, from ReNO, which has 0.1); needs --batch 1
    #[arg(
        long,
        value_name = "BOUND",
        value_parser = values::amount,
        allow_negative_numbers = true,
        conflicts_with = "clip_gradient",
        help_heading = "Extensions"
    )]
    clip_norm: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Views {
    Whole,
    Parts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Default,
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Start {
    Noise,
    Nao,
    Lol,
}

impl From<Start> for seedselect::Start {
    fn from(start: Start) -> seedselect::Start {
        match start {
            Start::Noise => seedselect::Start::Noise,
            Start::Nao => seedselect::Start::Nao,
            Start::Lol => seedselect::Start::Lol,
        }
    }
}

/// `None`: never stop early.
#[derive(Clone, Copy, Debug)]
struct Patience(Option<usize>);

fn patience(text: &str) -> Result<Patience, String> {
    match (text, values::number_of(text)) {
        ("none", _) => Ok(Patience(None)),
        (_, Ok(rises)) => Ok(Patience(Some(rises))),
        (_, Err(_)) => Err("write a number of rises, or none".into()),
    }
}

impl SeedFlags {
    pub fn options(&self) -> Options {
        let usual = match self.mode {
            Mode::Default => Options::DEFAULT,
            Mode::Released => Options::RELEASED,
        };
        let first = self.lr.unwrap_or(usual.lr.first);
        let later = match (self.lr_later, self.lr) {
            (Some(later), _) => later,
            (None, Some(lr)) if self.mode == Mode::Released => lr / 10.0,
            (None, Some(lr)) => lr,
            (None, None) => usual.lr.later,
        };
        let clip = self.clip_gradient.map(Clip::Value).or(self.clip_norm.map(Clip::GlobalNorm));
        Options {
            iterations: self.iterations.unwrap_or(usual.iterations),
            lr: LearningRate { first, later, ..usual.lr },
            weight_decay: self.weight_decay.unwrap_or(usual.weight_decay),
            starts: self.starts.unwrap_or(usual.starts),
            start: self.start.into(),
            inversion_steps: self.inversion_steps.unwrap_or(usual.inversion_steps),
            bootstrap: self.bootstrap,
            patience: self.patience.map_or(usual.patience, |patience| patience.0),
            semantics: self.semantics.unwrap_or(usual.semantics),
            appearance: self.appearance.unwrap_or(usual.appearance),
            norm_prior: self.norm_prior.unwrap_or(usual.norm_prior),
            prompt: self.prompt_weight.unwrap_or(usual.prompt),
            views: match self.views {
                None => usual.views,
                Some(Views::Whole) => View::WHOLE,
                Some(Views::Parts) => View::ALL,
            },
            steps: self.optimise_steps.or(usual.steps),
            contrast: self.contrast.unwrap_or(usual.contrast),
            renormalise: self.renormalise,
            clip,
            ..usual
        }
    }

    /// The references, and those of every other class; with `strict` one that cannot be read is an error.
    pub fn read(&self, strict: bool) -> Result<(References, Vec<References>)> {
        let read = |paths: &[PathBuf]| {
            let references = References::read(paths)?;
            if strict { references.whole() } else { Ok(references) }
        };
        let others = self.other.iter().map(|path| read(std::slice::from_ref(path)));
        Ok((read(&self.references)?, others.collect::<Result<_>>()?))
    }

    /// The method on references that were read.
    pub fn seed_select(&self, (references, others): (References, Vec<References>), seed: u64) -> SeedSelect {
        let others = others.into_iter().map(Arc::new).collect();
        SeedSelect { others, ..SeedSelect::new(self.options(), Arc::new(references), seed) }
    }

    /// What the user may not expect of the options.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let options = self.options();
        if self.clip.is_some() && options.semantics == 0.0 && options.contrast == 0.0 {
            remarks.push("--clip: nothing is seen by it at --semantics 0".to_string());
        }
        if self.inversion_steps.is_some() && self.start == Start::Noise {
            remarks.push("--inversion-steps: nothing is inverted at --start noise".to_string());
        }
        if options.iterations == 0 && self.lr.is_some() {
            remarks.push("--lr: does nothing at --iterations 0".to_string());
        }
        remarks
    }
}

/// SeedSelect beside other methods: with its defaults but for how much it may cost.
#[derive(Args)]
pub struct ComparedSeedFlags {
    #[command(flatten)]
    references: ReferenceFlags,
    /// SeedSelect, from whatever noise: steps of the optimiser
    #[arg(long, value_name = "K", value_parser = values::number_of, default_value_t = Options::DEFAULT.iterations)]
    seed_iterations: usize,
}

impl ComparedSeedFlags {
    fn seed_select(&self, whom: &str, seed: u64, options: Options) -> Result<Box<dyn ImageMethod>> {
        let references = self.references.read(whom)?;
        let options = Options { iterations: self.seed_iterations, ..options };
        Ok(Box::new(SeedSelect::new(options, references, seed)))
    }
}

impl MethodFlags for ComparedSeedFlags {
    fn inputs(&self, paths: &mut Paths) {
        self.references.inputs(paths);
    }

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        self.seed_select("--methods seed", context.seed, Options::DEFAULT)
    }
}

/// The same from the inverted references.
#[derive(Args)]
pub struct ComparedNaoFlags {
    #[command(flatten)]
    seed: ComparedSeedFlags,
    /// NAO: steps in which a reference is inverted
    #[arg(long, value_name = "N", value_parser = values::count, default_value_t = Options::DEFAULT.inversion_steps)]
    inversion_steps: usize,
}

impl MethodFlags for ComparedNaoFlags {
    fn inputs(&self, paths: &mut Paths) {
        self.seed.inputs(paths);
    }

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        let options =
            Options { start: seedselect::Start::Nao, inversion_steps: self.inversion_steps, ..Options::DEFAULT };
        self.seed.seed_select("--methods nao", context.seed, options)
    }
}
