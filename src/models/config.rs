//! Configurations of the networks and the scheduler, as read from diffusers JSON or detected from a checkpoint's keys.

use super::preprocess::Preprocess;
use crate::program::{Activation, DType};
use crate::{Error, Result};

/// CLIP text tower (`CLIPTextModel`, `CLIPTextModelWithProjection`).
#[derive(Clone, Debug, PartialEq)]
pub struct ClipTextConfig {
    pub vocab_size: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub mlp_width: usize,
    pub max_positions: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
    /// Width of `text_projection`, where the tower has one (SDXL's second encoder).
    pub projection: Option<usize>,
}

/// CLIP image tower (`CLIPVisionModelWithProjection`).
#[derive(Clone, Debug, PartialEq)]
pub struct ClipImageConfig {
    /// Image side in pixels.
    pub image_size: usize,
    pub patch_size: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub mlp_width: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
    pub projection: usize,
}

impl ClipImageConfig {
    /// Patches and the class row.
    pub fn positions(&self) -> usize {
        (self.image_size / self.patch_size).pow(2) + 1
    }
}

/// `CLIPModel`, or its image tower alone.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    pub image: ClipImageConfig,
    pub text: Option<ClipTextConfig>,
    /// Logarithm of what cosines are multiplied by before the softmax of CLIP's training.
    pub logit_scale: Option<f64>,
    /// What the image tower was trained to be shown.
    pub preprocess: Preprocess,
}

/// `GPT2LMHeadModel`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    pub vocab_size: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub mlp_width: usize,
    pub max_positions: usize,
    pub layer_norm_eps: f64,
}

/// A chain of linear layers on a feature.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadConfig {
    /// Width of the feature.
    pub input: usize,
    pub layers: Vec<HeadLayer>,
    /// ReLU between the layers; nothing otherwise.
    pub relu: bool,
}

/// One linear layer.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadLayer {
    /// Its number in the checkpoint's keys (`layers.2.weight`); dropout and activations have numbers too.
    pub key: usize,
    pub width: usize,
}

/// SDXL's added conditions: pooled text and six size numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct AddedConfig {
    /// Width of the sinusoidal embedding of each size number.
    pub time_dim: usize,
    /// Width of the concatenation pooled text + size embeddings.
    pub input_width: usize,
}

/// `UNet2DConditionModel`. Per-level vectors run from the highest resolution down.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub channels: Vec<usize>,
    /// Transformer blocks after each residual block of each level on the way down; 0 where it has no attention.
    pub down_transformers: Vec<Vec<usize>>,
    /// The same on the way up, still from the highest resolution down; one residual block more per level.
    pub up_transformers: Vec<Vec<usize>>,
    pub middle: Middle,
    /// Attention heads of each level.
    pub heads: Vec<usize>,
    pub context_width: usize,
    pub norm_groups: usize,
    pub norm_eps: f64,
    /// Token projection in and out of a transformer is a linear layer, not a 1x1 convolution (SD 2, SDXL).
    pub linear_projection: bool,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub added: Option<AddedConfig>,
    /// Latent side the model was trained at (`sample_size`).
    pub sample_size: usize,
}

/// What lies between the way down and the way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub enum Middle {
    /// Nothing (BK-SDM's small models).
    Absent,
    /// One residual block (`UNetMidBlock2D` as diffusers' UNet makes it).
    Resnet,
    /// Transformer blocks, at least one, between two residual blocks (`UNetMidBlock2DCrossAttn`).
    Transformer(usize),
}

/// `AutoencoderKL`. `channels` from full resolution down.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    pub image_channels: usize,
    pub latent_channels: usize,
    pub channels: Vec<usize>,
    pub layers_per_block: usize,
    pub norm_groups: usize,
    pub scaling_factor: f64,
    pub shift_factor: f64,
    pub mid_attention: bool,
    pub quant_conv: bool,
    pub post_quant_conv: bool,
    /// Its activations leave the range of f16, as those of SDXL's do.
    pub force_upcast: bool,
}

impl VaeConfig {
    /// The type it computes in where the model computes in `dtype`. bf16 has the range of f32 at the peak rates of f16, and moves a
    /// pixel by two of 255 levels at most (`tests/cuda/upcast.rs`); those who want f32 can have the whole model in it.
    pub fn dtype(&self, dtype: DType) -> DType {
        if self.force_upcast && dtype == DType::F16 { DType::BF16 } else { dtype }
    }

    /// Image pixels per latent pixel along one side.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }
}

/// `AttributeReader`, ours: what an image of the `shapes` world shows. `channels` from full resolution down.
#[derive(Clone, Debug, PartialEq)]
pub struct ReaderConfig {
    /// Image side in pixels.
    pub sample_size: usize,
    pub image_channels: usize,
    pub channels: Vec<usize>,
    pub norm_groups: usize,
    pub squeeze_channels: usize,
    pub hidden_size: usize,
    /// Attributes and the number of values each can take, in the order of the logits.
    pub heads: Vec<(String, usize)>,
}

impl ReaderConfig {
    /// Side of the last feature map, which the hidden layer sees whole.
    pub fn last_side(&self) -> usize {
        self.sample_size >> (self.channels.len() - 1)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaSchedule {
    Linear,
    ScaledLinear,
    SquaredCosCapV2,
}

/// What the UNet predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    Epsilon,
    V,
    Sample,
}

/// How timesteps are spread; `Display` and `FromStr` use the names of diffusers, which are also those of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    Leading,
    Linspace,
    Trailing,
}

impl Spacing {
    pub const ALL: [Spacing; 3] = [Spacing::Leading, Spacing::Linspace, Spacing::Trailing];

    pub fn name(self) -> &'static str {
        match self {
            Spacing::Leading => "leading",
            Spacing::Linspace => "linspace",
            Spacing::Trailing => "trailing",
        }
    }
}

impl std::fmt::Display for Spacing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Spacing {
    type Err = Error;

    fn from_str(name: &str) -> Result<Spacing> {
        Spacing::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            let names = Spacing::ALL.map(Spacing::name).join(", ");
            Error::Usage(format!("unknown spacing '{name}' (one of {names})"))
        })
    }
}

/// The fields of `scheduler_config.json` that change what a sampler does; defaults are those of the diffusers class named in it.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// diffusers class, e.g. `PNDMScheduler`; decides the default sampler.
    pub class: String,
    pub train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    pub prediction: Prediction,
    /// `None` where the file does not say: every sampler then has its own, as the diffusers classes do.
    pub spacing: Option<Spacing>,
    pub steps_offset: usize,
    pub set_alpha_to_one: bool,
    pub rescale_zero_snr: bool,
    pub karras: bool,
    /// Why the class named here cannot be followed; other samplers can still be chosen.
    pub unsupported: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Sd1,
    Sd2,
    Sdxl,
}

/// A whole pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineConfig {
    pub family: Family,
    /// One tower, or two for SDXL.
    pub text: Vec<ClipTextConfig>,
    pub unet: UnetConfig,
    pub vae: VaeConfig,
    pub scheduler: SchedulerConfig,
    /// SDXL base: an empty negative prompt is a zero context, not the encoding of "".
    pub zero_empty_negative: bool,
    /// Default image side in pixels.
    pub image_size: usize,
}
