//! What every command that makes images takes: model, device, sampling, seeds and batches.

use crate::Result;
use crate::cli::flags::device::DeviceFlags;
use crate::cli::flags::model::ModelFlags;
use crate::cli::flags::output::OutputFlags;
use crate::cli::flags::sampling::SamplingFlags;
use crate::cli::flags::values;
use crate::cli::paths::Paths;
use crate::cli::{machine, tensors};
use crate::data::textual_inversion;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Settings;
use clap::Args;
use std::path::PathBuf;

/// Starting noise from a file, a row per image.
pub type Noise = Option<Vec<Vec<f32>>>;

/// Prompts, how their images are made, and where they go.
#[derive(Args)]
pub struct ImageFlags {
    /// What the image should show
    #[arg(required_unless_present = "prompts", conflicts_with = "prompts")]
    pub prompt: Option<String>,
    /// Prompts from a file, one per line; images that are already in --out are not made again
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    #[command(flatten)]
    pub run: RunFlags,
    #[command(flatten)]
    pub output: OutputFlags,
}

impl ImageFlags {
    /// Images that are already there are not made again.
    pub fn resumes(&self) -> bool {
        self.prompts.is_some() && !self.output.overwrite
    }

    /// Every file that is read.
    pub fn inputs(&self, paths: &mut Paths) {
        self.prompts.iter().for_each(|path| paths.input("--prompts", path));
        self.run.inputs(paths);
    }
}

/// How images are made.
#[derive(Args)]
pub struct RunFlags {
    #[command(flatten)]
    pub model: ModelFlags,
    #[command(flatten)]
    pub device: DeviceFlags,
    #[command(flatten)]
    pub sampling: SamplingFlags,
    /// A learned token (textual inversion): safetensors; prompts name it by the word in the file, else by the file's name, as it is
    /// or in angle brackets
    #[arg(long, value_name = "FILE")]
    pub token: Vec<PathBuf>,
    /// Starting noise: safetensors, tensor `noise`, f32 [B, C, H/f, W/f], unit variance, one row per image
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,
    /// Images per prompt [default: 1; of a comparison 4]
    #[arg(long, allow_negative_numbers = true, value_parser = values::count)]
    pub count: Option<usize>,
    /// Images sampled together
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = values::count)]
    pub batch: usize,
    /// Stop at the first op whose output is not finite; without, final latents and pixels are looked at, and what made such is
    /// repeated to name the op
    #[arg(long)]
    pub check_finite: bool,
    /// Worker threads, at most 1024 [default: one per core]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// No progress; warnings stay
    #[arg(long)]
    pub quiet: bool,
    /// Events as JSON lines on stdout
    #[arg(long)]
    pub json: bool,
}

impl RunFlags {
    pub fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }

    /// The model, with its learned tokens.
    pub fn open(&self) -> Result<Pipeline> {
        let mut pipeline = self.model.open()?;
        for path in &self.token {
            pipeline.learn(textual_inversion::read(path)?)?;
        }
        Ok(pipeline)
    }

    /// Every file that is read.
    pub fn inputs(&self, paths: &mut Paths) {
        self.model.inputs(paths);
        self.token.iter().for_each(|path| paths.input("--token", path));
        self.noise.iter().for_each(|path| paths.input("--noise", path));
    }

    /// What the user may not expect of these flags with this model, for so many images.
    pub fn remarks(&self, pipeline: &Pipeline, images: usize) -> Vec<String> {
        let mut remarks = self.sampling.remarks(pipeline);
        if self.batch > images {
            remarks.push(format!("--batch {}: there are only {images} images", self.batch));
        }
        if self.noise.is_some() && self.sampling.seed.is_some() {
            remarks.push(
                "--noise is what the images begin as; --seed is only for their names and for what is drawn later"
                    .into(),
            );
        }
        remarks
    }

    pub fn settings(&self, pipeline: &Pipeline) -> Result<Settings> {
        self.sampling.settings(pipeline, self.device.program_dtype()?)
    }

    /// Rows of `--noise`, one per image.
    pub fn noise(&self, pipeline: &Pipeline, settings: &Settings, images: usize) -> Result<Noise> {
        let Some(path) = &self.noise else { return Ok(None) };
        let (height, width) = pipeline.latent_size(settings.width, settings.height)?;
        let shape = [images, pipeline.config.unet.in_channels, height, width];
        // The file's bytes and its numbers.
        let bytes = shape.iter().try_fold(2 * size_of::<f32>(), |product, side| product.checked_mul(*side));
        machine::check_host_memory(self.device.memory_limit, bytes, "--noise")?;
        tensors::read_noise(path, shape).map(Some)
    }
}
