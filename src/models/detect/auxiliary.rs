//! The configurations of the auxiliary networks: CLIP, GPT-2, heads.

use super::{Check, checked_text, fields, structure};
use crate::models::config::*;
use crate::models::parse::auxiliary as parse;
use crate::models::preprocess::Preprocess;
use crate::models::unread;
use crate::weights::{Component, Model, Pack, Weight};
use crate::{Error, Result};

/// A CLIP's configuration (of [`Component::Clip`] or [`Component::HeldOutClip`]): `config.json` and `preprocessor_config.json` of its
/// folder, checked against the weights, or else the weights alone. Where the weights are alone, activation and heads are those of
/// the published tower of that width.
pub fn clip_config(model: &Model, c: Component) -> Result<ClipConfig> {
    let (text_fields, image_fields) = match fields(model, c.name())? {
        Some(fields) => {
            let (text, image) = parse::clip(fields)?;
            (text, Some(image))
        }
        None => (None, None),
    };
    let seen = structure::clip_image(model, c)?;
    let image = match image_fields {
        None => seen,
        Some(fields) => {
            let config = ClipImageConfig { projection: seen.projection, ..parse::clip_image(&fields)? };
            let check = Check { fields, weights: model.source(c) };
            check.same("patch_size", &config.patch_size, &seen.patch_size)?;
            check.same("hidden_size", &config.width, &seen.width)?;
            check.same("num_hidden_layers", &config.layers, &seen.layers)?;
            check.same("intermediate_size", &config.mlp_width, &seen.mlp_width)?;
            check.same("image_size / patch_size", &config.positions(), &seen.positions())?;
            config
        }
    };
    let text = match model.shape(c, "text_model.embeddings.token_embedding.weight") {
        None => None,
        Some(_) => {
            let activation = image.activation;
            let configured = text_fields.is_some();
            let config = checked_text(model, c, text_fields)?;
            Some(if configured { config } else { ClipTextConfig { activation, ..config } })
        }
    };
    if let Some(text) = &text
        && text.projection != Some(image.projection)
    {
        let what = format!("the towers project to {:?} and {} numbers", text.projection, image.projection);
        return Err(Error::file(model.source(c), what));
    }
    let preprocess = match fields(model, &format!("{}_preprocessor", c.name()))? {
        Some(fields) => parse::preprocess(&fields, image.image_size)?,
        None => Preprocess::clip(image.image_size),
    };
    let config = ClipConfig { logit_scale: logit_scale(model, c)?, image, text, preprocess };
    unread::check_clip(model, c, &config)?;
    Ok(config)
}

fn logit_scale(model: &Model, component: Component) -> Result<Option<f64>> {
    const KEY: &str = "logit_scale";
    if model.shape(component, KEY).is_none() {
        return Ok(None);
    }
    let weight = Weight { component, keys: vec![KEY.to_string()], pack: Pack::Vector, shape: vec![1] };
    Ok(model.value(&weight)?.first().map(|&scale| f64::from(scale)))
}

/// The prompt policy's configuration: `prompt_policy/config.json`, checked against the weights, or else the weights alone.
pub fn policy_config(model: &Model) -> Result<Gpt2Config> {
    let seen = structure::gpt2(model)?;
    let Some(fields) = fields(model, Component::Policy.name())? else { return Ok(seen) };
    let config = parse::gpt2(&fields)?;
    let check = Check { fields, weights: model.source(Component::Policy) };
    check.same("vocab_size", &config.vocab_size, &seen.vocab_size)?;
    check.same("n_embd", &config.width, &seen.width)?;
    check.same("n_layer", &config.layers, &seen.layers)?;
    check.same("n_inner", &config.mlp_width, &seen.mlp_width)?;
    check.same("n_positions", &config.max_positions, &seen.max_positions)?;
    Ok(config)
}

/// The aesthetic head by its weights; `aesthetic/config.json` says whether there is a ReLU between its layers. Without one there is
/// none, as in the LAION predictor.
pub fn head_config(model: &Model) -> Result<HeadConfig> {
    let seen = structure::head(model)?;
    let Some(fields) = fields(model, Component::Aesthetic.name())? else { return Ok(seen) };
    let (sizes, relu) = parse::head(&fields)?;
    let check = Check { fields, weights: model.source(Component::Aesthetic) };
    let seen_sizes = [seen.input].into_iter().chain(seen.layers.iter().map(|layer| layer.width)).collect();
    check.same("sizes", &sizes, &seen_sizes)?;
    Ok(HeadConfig { relu, ..seen })
}
