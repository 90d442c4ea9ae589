//! Tensors that no program of a network reads. Inside the network's own modules they are another architecture's and are refused;
//! elsewhere they are named.

use super::clip_text::ClipText;
use super::config::{ClipConfig, ClipTextConfig, PipelineConfig, UnetConfig, VaeConfig};
use super::unet::{Added, Unet};
use super::{clip_image, vae};
use crate::program::{Builder, DType, Program};
use crate::weights::{Component, Model, is_harmless};
use crate::{Error, Result};
use std::collections::BTreeSet;

/// Names of tensors that are shown; the rest are counted.
const SHOWN: usize = 2;

/// One line about the tensors of a pipeline that nothing reads, if there are any. `Error::Tensor` where the UNet or the decoder lacks
/// one, and where a network of another architecture had them: what is run without them is not that network.
pub fn of_pipeline(model: &Model, config: &PipelineConfig) -> Result<Option<String>> {
    let needed = [unet(&config.unet)?, decoder(&config.vae)?];
    // A tensor that lacks is told first: it often has another name.
    needed.iter().flat_map(Program::weights).try_for_each(|(_, weight)| model.rows(weight).map(drop))?;
    let [unet, decoder] = needed;
    let ignored = model.ignored().iter().filter(|key| !is_harmless(key)).cloned();
    let mut unread: Vec<String> = ignored.collect();
    unread.extend(check(model, Component::Unet, &[unet])?);
    unread.extend(check(model, Component::Vae, &[decoder, encoder(&config.vae)?])?);
    for (component, tower) in [Component::TextEncoder, Component::TextEncoder2].into_iter().zip(&config.text) {
        unread.extend(check(model, component, &[text(component, tower)?])?);
    }
    let shown: Vec<String> = unread.iter().take(SHOWN).map(|key| format!("'{key}'")).collect();
    let more = unread.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let line = || {
        let (path, shown) = (model.path().display(), shown.join(", "));
        format!("{path}: {} tensor(s) that nothing reads: {shown}{more}", unread.len())
    };
    Ok((!unread.is_empty()).then(line))
}

/// Refuses a CLIP that has more inside than its towers read.
pub fn check_clip(model: &Model, component: Component, config: &ClipConfig) -> Result<()> {
    let mut b = Builder::new("image", DType::F32);
    let side = config.image.image_size;
    let image = b.input("image", &[1, side, side, 3]);
    let features = clip_image::features(&mut b, &config.image, component, image);
    b.output("features", features);
    let mut programs = vec![b.finish()?];
    if let Some(tower) = &config.text {
        programs.push(text(component, tower)?);
    }
    check(model, component, &programs).map(drop)
}

/// The tensors of a component that none of its programs reads and that are missed by somebody.
fn check(model: &Model, component: Component, programs: &[Program]) -> Result<Vec<String>> {
    let weights = programs.iter().flat_map(Program::weights);
    let read: BTreeSet<&str> = weights.flat_map(|(_, weight)| weight.keys.iter().map(String::as_str)).collect();
    let module = |key: &str| key.split_once('.').map(|(module, _)| module.to_string());
    let modules: BTreeSet<String> = read.iter().filter_map(|key| module(key)).collect();
    // Whatever a UNet has besides reaches its prediction; others keep company (a discriminator, the other tower of a pair).
    let inside =
        |key: &str| module(key).is_some_and(|module| component == Component::Unet || modules.contains(&module));
    let unread: Vec<&str> =
        model.keys(component).into_iter().filter(|key| !read.contains(key) && !is_harmless(key)).collect();
    let Some(key) = unread.iter().find(|key| inside(key)) else {
        return Ok(unread.into_iter().map(str::to_string).collect());
    };
    let others = unread.iter().filter(|key| inside(key)).count() - 1;
    let others = if others > 0 { format!(" (and {others} more)") } else { String::new() };
    let name = component.name();
    Err(Error::Tensor {
        path: model.source(component).to_path_buf(),
        key: key.to_string(),
        what: format!("is read by no part of the {name} as it would be run{others}: its architecture is another one"),
    })
}

/// A text tower whole: a pipeline may use less of it.
fn text(component: Component, config: &ClipTextConfig) -> Result<Program> {
    let mut b = Builder::new("text", DType::F32);
    let ids = b.input_i32("ids", &[1, 1]);
    let eos = b.input_i32("eos", &[1]);
    let mut tower = ClipText::new(&mut b, config, component);
    let x = tower.embed(ids);
    let states = match config.projection {
        Some(_) => tower.features(x, eos),
        None => {
            let x = tower.layers(x, 0, config.layers);
            tower.final_norm(x)
        }
    };
    b.output("states", states);
    b.finish()
}

/// Latent side of programs that are only looked at.
const SIDE: usize = 8;

fn unet(config: &UnetConfig) -> Result<Program> {
    let network = Unet::new(config);
    let mut b = Builder::new("unet", DType::F32);
    let latents = b.input("latents", &[1, SIDE, SIDE, config.in_channels]);
    let context = b.input("context", &[1, 1, config.context_width]);
    let timesteps = b.accumulator_input("timesteps", &[1]);
    let index = b.input_i32("index", &[1]);
    let added = config.added.as_ref().map(|added| Added {
        pooled: b.input("pooled", &[1, added.input_width.saturating_sub(6 * added.time_dim)]),
        size_ids: b.accumulator_input("size_ids", &[1, 6]),
    });
    let kv = network.context_kv(&mut b, context);
    let time = network.time(&mut b, timesteps, added);
    let time = b.select(time, index);
    let prediction = network.forward(&mut b, latents, kv, time);
    b.output("prediction", prediction);
    b.finish()
}

fn decoder(config: &VaeConfig) -> Result<Program> {
    let mut b = Builder::new("decode", DType::F32);
    let latents = b.input("latents", &[1, SIDE, SIDE, config.latent_channels]);
    let image = vae::decode(&mut b, config, latents);
    b.output("image", image);
    b.finish()
}

fn encoder(config: &VaeConfig) -> Result<Program> {
    let mut b = Builder::new("encode", DType::F32);
    let side = SIDE * config.factor();
    let image = b.input("image", &[1, side, side, config.image_channels]);
    let moments = vae::encode(&mut b, config, image);
    b.output("moments", moments);
    b.finish()
}
