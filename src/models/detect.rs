//! The configuration of a whole pipeline: from its JSON files where there are any, always checked against the tensors.

mod auxiliary;
mod structure;
#[cfg(test)]
mod tests;

pub use auxiliary::{clip_config, head_config, policy_config};

use super::config::*;
use super::parse::{self, Fields};
use crate::weights::{Component, Model, NEEDS_BASE};
use crate::{Error, Result};
use std::fmt::Debug;
use std::path::Path;

/// Pipelines that share the networks we build.
const PIPELINES: [&str; 4] = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
];

/// Finds out what pipeline `model` is and how it is built.
///
/// A folder's configs are read with the defaults of diffusers and compared with the shapes of the weights. A single
/// file is recognised by its tensors and gets the settings diffusers' `from_single_file` gives it: `PNDMScheduler`
/// for SD 1, `DDIMScheduler` for SD 2, `EulerDiscreteScheduler` for SDXL. `prediction` overrides what the checkpoint
/// says; SD 2 single files that say nothing need it ([`Error::Usage`]).
///
/// Everything else that is missing, contradictory or not supported is an error that names the file and the field or
/// tensor.
pub fn pipeline_config(model: &Model, prediction: Option<Prediction>) -> Result<PipelineConfig> {
    check_complete(model)?;
    let unet = unet_config(model)?;
    let vae = vae_config(model)?;
    let mut text = vec![text_config(model, Component::TextEncoder)?];
    if model.has(Component::TextEncoder2) {
        text.push(text_config(model, Component::TextEncoder2)?);
    }
    let family = match (text.len(), unet.linear_projection) {
        (2, _) => Family::Sdxl,
        (_, true) => Family::Sd2,
        (_, false) => Family::Sd1,
    };
    let scheduler = scheduler_config(model, family, prediction)?;
    let mut config = PipelineConfig {
        family,
        text,
        unet,
        vae,
        zero_empty_negative: zero_empty_negative(model, family)?,
        image_size: 0,
        scheduler,
    };
    if model.config("vae").is_none() && family == Family::Sdxl {
        config.vae.scaling_factor = 0.13025;
    }
    if config.unet.sample_size == 0 {
        config.unet.sample_size = match (family, config.scheduler.prediction, model.is_single_file()) {
            (Family::Sdxl, ..) => 128,
            (Family::Sd2, Prediction::V, true) => 96,
            _ => 64,
        };
    }
    config.image_size = config.unet.sample_size * config.vae.factor();
    check_fit(model, &config)?;
    Ok(config)
}

/// The UNet's configuration: `unet/config.json`, checked against the weights, or else the weights alone (then
/// `sample_size` may be 0, which means not known).
pub fn unet_config(model: &Model) -> Result<UnetConfig> {
    let seen = structure::unet(model)?;
    let Some(fields) = fields(model, "unet")? else {
        let wide = seen.channels.iter().find(|c| *c % seen.norm_groups != 0);
        let uneven = seen.channels.iter().zip(&seen.heads).find(|(c, h)| *c % *h != 0).map(|(c, _)| c);
        return match wide.or(uneven) {
            Some(c) => {
                Err(Error::file(model.path(), format!("unet: cannot tell the heads and groups of {c} channels")))
            }
            None => Ok(seen),
        };
    };
    let mut config = parse::unet(&fields)?;
    if model.keeps_config_of_another(Component::Unet) {
        // Of the UNet that was replaced; this one's depths are its own.
        let UnetConfig { down_transformers, up_transformers, middle, .. } = seen.clone();
        config = UnetConfig { down_transformers, up_transformers, middle, ..config };
    }
    let check = Check { fields, weights: model.source(Component::Unet) };
    let added = |c: &UnetConfig| c.added.as_ref().map_or(0, |a| a.input_width);
    check.same("in_channels", &config.in_channels, &seen.in_channels)?;
    check.same("out_channels", &config.out_channels, &seen.out_channels)?;
    check.same("block_out_channels", &config.channels, &seen.channels)?;
    let layers = |c: &UnetConfig| c.down_transformers.iter().map(Vec::len).collect::<Vec<_>>();
    check.same("layers_per_block", &layers(&config), &layers(&seen))?;
    check.same("transformer blocks on the way down", &config.down_transformers, &seen.down_transformers)?;
    check.same("transformer blocks on the way up", &config.up_transformers, &seen.up_transformers)?;
    check.same("mid_block_type", &config.middle, &seen.middle)?;
    check.same("cross_attention_dim", &config.context_width, &seen.context_width)?;
    check.same("use_linear_projection", &config.linear_projection, &seen.linear_projection)?;
    check.same("projection_class_embeddings_input_dim", &added(&config), &added(&seen))?;
    Ok(config)
}

/// The autoencoder's configuration: `vae/config.json`, checked against the weights, or else the weights alone.
pub fn vae_config(model: &Model) -> Result<VaeConfig> {
    let seen = structure::vae(model)?;
    let Some(fields) = fields(model, "vae")? else {
        return match seen.channels.iter().find(|c| *c % seen.norm_groups != 0) {
            Some(c) => Err(Error::file(model.path(), format!("vae: {c} channels do not divide by 32 norm groups"))),
            None => Ok(seen),
        };
    };
    let config = parse::vae(&fields, seen.force_upcast)?;
    let check = Check { fields, weights: model.source(Component::Vae) };
    check.same("out_channels", &config.image_channels, &seen.image_channels)?;
    check.same("latent_channels", &config.latent_channels, &seen.latent_channels)?;
    check.same("block_out_channels", &config.channels, &seen.channels)?;
    check.same("layers_per_block", &config.layers_per_block, &seen.layers_per_block)?;
    check.same("mid_block_add_attention", &config.mid_attention, &seen.mid_attention)?;
    check.same("use_post_quant_conv", &config.post_quant_conv, &seen.post_quant_conv)?;
    Ok(config)
}

/// A text tower's configuration: `text_encoder*/config.json`, checked against the weights, or else the weights alone.
pub fn text_config(model: &Model, c: Component) -> Result<ClipTextConfig> {
    checked_text(model, c, fields(model, c.name())?)
}

fn checked_text(model: &Model, c: Component, fields: Option<Fields>) -> Result<ClipTextConfig> {
    let seen = structure::text(model, c)?;
    let Some(fields) = fields else {
        return match seen.width % seen.heads {
            0 => Ok(seen),
            _ => Err(Error::file(model.path(), format!("{}: cannot tell the heads of width {}", c.name(), seen.width))),
        };
    };
    let mut config = parse::text(&fields)?;
    config.projection = seen.projection;
    let check = Check { fields, weights: model.source(c) };
    check.same("vocab_size", &config.vocab_size, &seen.vocab_size)?;
    check.same("hidden_size", &config.width, &seen.width)?;
    check.same("num_hidden_layers", &config.layers, &seen.layers)?;
    check.same("intermediate_size", &config.mlp_width, &seen.mlp_width)?;
    check.same("max_position_embeddings", &config.max_positions, &seen.max_positions)?;
    Ok(config)
}

/// The attribute reader's configuration: `reader/config.json`, and from the weights how many values each head tells apart.
pub fn reader_config(model: &Model) -> Result<ReaderConfig> {
    let Some(fields) = fields(model, "reader")? else {
        return Err(Error::file(model.path(), "has no reader/config.json"));
    };
    let values = |attribute: &str| {
        let key = format!("heads.{attribute}.bias");
        match model.shape(Component::Reader, &key).as_deref() {
            Some(&[n]) if n > 0 => Ok(n),
            Some(_) | None => Err(fields.error(format!("attribute '{attribute}' has no head '{key}' in the weights"))),
        }
    };
    parse::reader(&fields, values)
}

/// A configuration of the model, where it has it.
fn fields<'a>(model: &'a Model, name: &str) -> Result<Option<Fields<'a>>> {
    let found = model.config_path(name).zip(model.config(name));
    found.map(|(path, json)| Fields::new(path.to_path_buf(), json)).transpose()
}

/// A config must say what the weights show.
struct Check<'a> {
    fields: Fields<'a>,
    weights: &'a Path,
}

impl Check<'_> {
    fn same<T: PartialEq + Debug>(&self, field: &str, said: &T, seen: &T) -> Result<()> {
        match said == seen {
            true => Ok(()),
            false => {
                Err(self.fields.error(format!("{field} is {said:?}, but {} has {seen:?}", self.weights.display())))
            }
        }
    }
}

/// Refuses models that lack a part, and pipelines of another kind.
fn check_complete(model: &Model) -> Result<()> {
    if let Some(fields) = fields(model, "model_index")? {
        let class = fields.text("_class_name", PIPELINES[0])?;
        if !PIPELINES.contains(&class) {
            return Err(fields.error(format!("a {class} is not supported; Stable Diffusion 1, 2 and XL pipelines are")));
        }
    }
    // Marks of models that run on continuous noise levels.
    for (mark, name) in [("edm_mean", "a Playground v2.5 (EDM)"), ("edm_vpred.sigma_max", "a CosXL (EDM)")] {
        if model.ignored().iter().any(|key| key == mark) {
            return Err(Error::file(model.path(), format!("is {name} checkpoint, which is not supported")));
        }
    }
    if model.is_single_file()
        && ![Component::Vae, Component::TextEncoder, Component::TextEncoder2].iter().any(|c| model.has(*c))
    {
        return Err(Error::file(model.path(), format!("holds a UNet alone: {NEEDS_BASE}")));
    }
    let needed = [Component::Unet, Component::Vae, Component::TextEncoder];
    match needed.into_iter().find(|c| !model.has(*c)) {
        None => Ok(()),
        Some(Component::TextEncoder) if model.has(Component::TextEncoder2) => {
            Err(Error::file(model.path(), "has only the second text encoder: an SDXL refiner? give the base model"))
        }
        Some(Component::Vae) if model.is_single_file() => {
            Err(Error::file(model.path(), "has no VAE; give a checkpoint with its VAE baked in, or a diffusers folder"))
        }
        Some(c) => Err(Error::file(model.path(), format!("has no {}", c.name()))),
    }
}

/// Checks the widths at which the networks meet.
fn check_fit(model: &Model, config: &PipelineConfig) -> Result<()> {
    let wrong = |what: String| Err(Error::file(model.path(), what));
    let PipelineConfig { unet, vae, text, .. } = config;
    match unet.in_channels {
        n if n == vae.latent_channels => {}
        9 => return wrong("is an inpainting model (its UNet takes 9 channels); give a text-to-image model".into()),
        8 => {
            return wrong("is an InstructPix2Pix model (its UNet takes 8 channels); give a text-to-image model".into());
        }
        7 => return wrong("is an upscaler (its UNet takes 7 channels); give a text-to-image model".into()),
        n => return wrong(format!("the UNet takes {n} channels, the VAE has {} latent channels", vae.latent_channels)),
    }
    if unet.out_channels != vae.latent_channels {
        return wrong(format!("the UNet gives {} channels, the VAE has {}", unet.out_channels, vae.latent_channels));
    }
    let width: usize = text.iter().map(|t| t.width).sum();
    if width != unet.context_width {
        return wrong(format!(
            "the UNet needs a context of width {}, the text encoders give {width}",
            unet.context_width
        ));
    }
    match (&unet.added, text.get(1).map(|t| t.projection)) {
        (None, None) => Ok(()),
        (Some(added), Some(Some(pooled))) if added.input_width == pooled + 6 * added.time_dim => Ok(()),
        (Some(added), Some(Some(pooled))) => wrong(format!(
            "the UNet's added embedding takes {} numbers, not {pooled} + 6 x {}",
            added.input_width, added.time_dim
        )),
        (Some(_), Some(None)) => wrong("text_encoder_2 has no text_projection".into()),
        (Some(_), None) => wrong("the UNet needs a second text encoder, which is missing".into()),
        (None, Some(_)) => wrong("there are two text encoders, but the UNet takes no pooled text".into()),
    }
}

/// The scheduler of the folder, or the one diffusers gives a single file of this family.
fn scheduler_config(model: &Model, family: Family, prediction: Option<Prediction>) -> Result<SchedulerConfig> {
    let fields = fields(model, "scheduler")?;
    let mut config = match &fields {
        Some(fields) => parse::scheduler(fields, family != Family::Sdxl)?,
        None => single_file_scheduler(family),
    };
    // A file says it of the UNet in use; a folder's field, of the UNet the folder came with.
    config.prediction = match prediction.or(stated_prediction(model)) {
        Some(prediction) => prediction,
        None if fields.is_some() => config.prediction,
        None => usual_prediction(model, family)?,
    };
    // Trainers mark models with a zero terminal signal-to-noise ratio by an empty tensor of this name.
    config.rescale_zero_snr |= model.ignored().iter().any(|key| key == "ztsnr");
    Ok(config)
}

fn single_file_scheduler(family: Family) -> SchedulerConfig {
    let class = match family {
        Family::Sd1 => "PNDMScheduler",
        Family::Sd2 => "DDIMScheduler",
        Family::Sdxl => "EulerDiscreteScheduler",
    };
    SchedulerConfig {
        class: class.to_string(),
        train_timesteps: 1000,
        beta_start: 0.00085,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        prediction: Prediction::Epsilon,
        spacing: (family == Family::Sdxl).then_some(Spacing::Leading),
        steps_offset: 1,
        set_alpha_to_one: false,
        rescale_zero_snr: false,
        karras: false,
        unsupported: None,
    }
}

/// What a file says its UNet predicts: in its metadata (`modelspec.prediction_type`, ComfyUI's `modelspec.predict_key`) or by
/// a mark tensor.
fn stated_prediction(model: &Model) -> Option<Prediction> {
    let marked = model.ignored().iter().any(|key| key == "v_pred");
    let said = model.metadata("modelspec.prediction_type").or_else(|| model.metadata("modelspec.predict_key"));
    match said {
        Some("epsilon") => Some(Prediction::Epsilon),
        Some("v" | "v_prediction" | "v-prediction") => Some(Prediction::V),
        Some(_) | None => marked.then_some(Prediction::V),
    }
}

/// What the UNets of a family predict, where that is one thing.
fn usual_prediction(model: &Model, family: Family) -> Result<Prediction> {
    match family {
        Family::Sd1 | Family::Sdxl => Ok(Prediction::Epsilon),
        Family::Sd2 => Err(Error::Usage(format!(
            "{}: an SD 2 checkpoint does not say what it predicts; \
             give --prediction v (768 models) or --prediction epsilon (512 base)",
            model.path().display()
        ))),
    }
}

/// `StableDiffusionXLPipeline` zeroes the context of an absent negative prompt unless configured otherwise; the older one
/// never does.
fn zero_empty_negative(model: &Model, family: Family) -> Result<bool> {
    match fields(model, "model_index")? {
        _ if family != Family::Sdxl => Ok(false),
        Some(fields) => fields.flag("force_zeros_for_empty_prompt", true),
        None => Ok(true),
    }
}
