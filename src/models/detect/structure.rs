//! What the keys and shapes of a checkpoint say about its networks, for files without configs and to check those with.

use crate::models::config::*;
use crate::models::parse::MOST_LEVELS;
use crate::program::Activation;
use crate::weights::{Component, Model};
use crate::{Error, Result};

/// The tensors of one component.
struct Tensors<'a> {
    model: &'a Model,
    component: Component,
    /// Sorted.
    keys: Vec<&'a str>,
}

impl<'a> Tensors<'a> {
    fn of(model: &'a Model, component: Component) -> Tensors<'a> {
        Tensors { model, component, keys: model.keys(component) }
    }

    fn has(&self, key: &str) -> bool {
        self.model.shape(self.component, key).is_some()
    }

    /// The keys that begin with `prefix`.
    fn under(&self, prefix: &str) -> impl Iterator<Item = &'a str> {
        let first = self.keys.partition_point(|key| *key < prefix);
        self.keys[first..].iter().copied().take_while(move |key| key.starts_with(prefix))
    }

    /// The shape of a tensor that must be there with `N` dimensions.
    fn dims<const N: usize>(&self, key: &str) -> Result<[usize; N]> {
        let wrong =
            |what| Error::Tensor { path: self.model.source(self.component).to_path_buf(), key: key.to_string(), what };
        let Some(shape) = self.model.shape(self.component, key) else {
            return Err(wrong(format!("is missing from the {}", self.component.name())));
        };
        let got = format!("has shape {shape:?}, needed {N} dimensions, none of them 0");
        let dims = <[usize; N]>::try_from(shape).map_err(|_| wrong(got.clone()))?;
        if dims.contains(&0) { Err(wrong(got)) } else { Ok(dims) }
    }

    /// One more than the largest number that follows `prefix` in a key, so that a gap shows as a missing tensor.
    fn count(&self, prefix: &str) -> usize {
        let number = |key: &str| key[prefix.len()..].split('.').next()?.parse::<usize>().ok();
        // Nothing has this many blocks; a file that says so lacks most of them.
        let numbers = self.under(prefix).filter_map(number).filter(|n| *n < 1000);
        numbers.max().map_or(0, |n| n + 1)
    }

    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::file(self.model.source(self.component), format!("{}: {what}", self.component.name()))
    }
}

/// The UNet by its tensors. Heads, norm and time settings follow the family, which is what the projections and added
/// embeddings tell: 8 heads (SD 1) or heads of 64 channels (SD 2, SDXL), 32 norm groups. `sample_size` is 0.
pub(super) fn unet(model: &Model) -> Result<UnetConfig> {
    let t = Tensors::of(model, Component::Unet);
    foreign(&t)?;
    let [_, in_channels, ..] = t.dims::<4>("conv_in.weight")?;
    let [out_channels, ..] = t.dims::<4>("conv_out.weight")?;
    let levels = t.count("down_blocks.");
    if !(1..=MOST_LEVELS).contains(&levels) || t.count("up_blocks.") != levels {
        return Err(t.error(format!("has {levels} down_blocks and {} up_blocks", t.count("up_blocks."))));
    }
    let (context, projection) = attention(&t)?;
    let mut config = UnetConfig {
        in_channels,
        out_channels,
        channels: Vec::new(),
        down_transformers: Vec::new(),
        up_transformers: Vec::new(),
        middle: middle(&t)?,
        heads: Vec::new(),
        context_width: t.dims::<2>(context)?[1],
        norm_groups: 32,
        norm_eps: 1e-5,
        linear_projection: model.shape(t.component, projection).is_some_and(|s| s.len() == 2),
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        added: added(&t)?,
        sample_size: 0,
    };
    for i in 0..levels {
        let (down, up) = (format!("down_blocks.{i}"), format!("up_blocks.{}", levels - 1 - i));
        config.channels.push(t.dims::<4>(&format!("{down}.resnets.0.conv1.weight"))?[0]);
        let (down_depths, up_depths) = (depths(&t, &down), depths(&t, &up));
        if down_depths.is_empty() || up_depths.len() != down_depths.len() + 1 {
            let (down_layers, up_layers) = (down_depths.len(), up_depths.len());
            return Err(t.error(format!(
                "{down} has {down_layers} residual blocks and {up} {up_layers}, where one more is expected"
            )));
        }
        config.down_transformers.push(down_depths);
        config.up_transformers.push(up_depths);
    }
    let head = |c: &usize| if config.linear_projection { (c / 64).max(1) } else { 8 };
    config.heads = config.channels.iter().map(head).collect();
    Ok(config)
}

/// Refuses UNets with inputs that no supported pipeline has.
fn foreign(t: &Tensors) -> Result<()> {
    const PARTS: [(&str, &str); 5] = [
        ("time_embedding.cond_proj.", "takes the guidance scale as an input (a distilled LCM UNet)"),
        ("class_embedding.", "takes a class or image embedding (unCLIP)"),
        ("encoder_hid_proj.", "projects its context (IP-Adapter or Kandinsky)"),
        ("add_embedding.linear_3.", "has an unknown added embedding"),
        ("controlnet_cond_embedding.", "is a ControlNet"),
    ];
    let found = PARTS.iter().find(|(part, _)| t.under(part).next().is_some());
    found.map_or(Ok(()), |(_, what)| Err(t.error(format!("{what}, which is not supported"))))
}

/// Transformer blocks after each residual block of a block; 0 where there are none.
fn depths(t: &Tensors, block: &str) -> Vec<usize> {
    let depth = |j| t.count(&format!("{block}.attentions.{j}.transformer_blocks."));
    (0..t.count(&format!("{block}.resnets."))).map(depth).collect()
}

fn middle(t: &Tensors) -> Result<Middle> {
    match (t.count("mid_block.resnets."), &depths(t, "mid_block")[..]) {
        (0, _) => Ok(Middle::Absent),
        (1, [0]) => Ok(Middle::Resnet),
        (2, [depth, 0]) if *depth > 0 => Ok(Middle::Transformer(*depth)),
        (resnets, depths) => {
            Err(t.error(format!("mid_block has {resnets} residual blocks and transformers of {depths:?} blocks")))
        }
    }
}

/// The keys that tell the width of the context and the kind of projection: those of any cross-attention.
fn attention<'a>(t: &Tensors<'a>) -> Result<(&'a str, &'a str)> {
    let find = |end: &str| t.keys.iter().copied().find(|key| key.ends_with(end));
    match (find(".attn2.to_k.weight"), find(".proj_in.weight")) {
        (Some(context), Some(projection)) => Ok((context, projection)),
        _ => Err(t.error("has no cross-attention: it cannot be told what to draw")),
    }
}

/// The added conditions; the width beyond the pooled text of the second tower belongs to six size numbers.
fn added(t: &Tensors) -> Result<Option<AddedConfig>> {
    if !t.has("add_embedding.linear_1.weight") {
        return Ok(None);
    }
    let [_, input_width] = t.dims::<2>("add_embedding.linear_1.weight")?;
    let second = Tensors::of(t.model, Component::TextEncoder2);
    if !t.model.has(Component::TextEncoder2) {
        return Err(t.error("has an added embedding but there is no second text encoder (unCLIP?); not supported"));
    }
    let [pooled, _] = second.dims::<2>("text_projection.weight")?;
    match input_width.checked_sub(pooled) {
        Some(sizes) if sizes > 0 && sizes % 12 == 0 => Ok(Some(AddedConfig { time_dim: sizes / 6, input_width })),
        _ => Err(
            t.error(format!("its added embedding takes {input_width} numbers, not {pooled} + 6 sinusoidal embeddings"))
        ),
    }
}

/// The autoencoder by the tensors of its decoder; 32 norm groups, the scaling factor of SD 1 and 2. That of SDXL needs more than f16.
pub(super) fn vae(model: &Model) -> Result<VaeConfig> {
    let t = Tensors::of(model, Component::Vae);
    let levels = t.count("decoder.up_blocks.");
    if !(1..=MOST_LEVELS).contains(&levels) {
        return Err(t.error(format!("has {levels} decoder.up_blocks")));
    }
    let channels =
        (0..levels).rev().map(|i| Ok(t.dims::<4>(&format!("decoder.up_blocks.{i}.resnets.0.conv1.weight"))?[0]));
    let resnets = t.count("decoder.up_blocks.0.resnets.");
    Ok(VaeConfig {
        image_channels: t.dims::<4>("decoder.conv_out.weight")?[0],
        latent_channels: t.dims::<4>("decoder.conv_in.weight")?[1],
        channels: channels.collect::<Result<_>>()?,
        layers_per_block: resnets.saturating_sub(1),
        norm_groups: 32,
        scaling_factor: 0.18215,
        shift_factor: 0.0,
        mid_attention: t.has("decoder.mid_block.attentions.0.to_q.weight"),
        quant_conv: t.has("quant_conv.weight"),
        post_quant_conv: t.has("post_quant_conv.weight"),
        force_upcast: model.has(Component::TextEncoder2),
    })
}

/// A text tower by its tensors. Heads of 64 channels; OpenCLIP's activation is the exact GELU, OpenAI's the quick one.
pub(super) fn text(model: &Model, component: Component) -> Result<ClipTextConfig> {
    let t = Tensors::of(model, component);
    let [vocab_size, width] = t.dims("text_model.embeddings.token_embedding.weight")?;
    let [max_positions, _] = t.dims::<2>("text_model.embeddings.position_embedding.weight")?;
    let [mlp_width, _] = t.dims::<2>("text_model.encoder.layers.0.mlp.fc1.weight")?;
    let projection = match t.has("text_projection.weight") {
        true => Some(t.dims::<2>("text_projection.weight")?[0]),
        false => None,
    };
    Ok(ClipTextConfig {
        vocab_size,
        width,
        layers: t.count("text_model.encoder.layers."),
        heads: (width / 64).max(1),
        mlp_width,
        max_positions,
        activation: if model.is_open_clip(component) { Activation::Gelu } else { Activation::QuickGelu },
        layer_norm_eps: 1e-5,
        projection,
    })
}

/// A CLIP image tower by its tensors. Published towers from width 1024 on have 16 heads; those up to 1024 are OpenAI's, with the
/// quick GELU, wider ones OpenCLIP's, with the exact one.
pub(super) fn clip_image(model: &Model, component: Component) -> Result<ClipImageConfig> {
    let t = Tensors::of(model, component);
    let [width, _, patch_size, _] = t.dims("vision_model.embeddings.patch_embedding.weight")?;
    let [positions, _] = t.dims::<2>("vision_model.embeddings.position_embedding.weight")?;
    let [mlp_width, _] = t.dims::<2>("vision_model.encoder.layers.0.mlp.fc1.weight")?;
    let [projection, _] = t.dims::<2>("visual_projection.weight")?;
    let patches = (positions - 1).isqrt();
    if patches == 0 || patches * patches + 1 != positions {
        return Err(t.error(format!("{positions} positions are not those of a class and a square of patches")));
    }
    let heads = if width >= 1024 { 16 } else { (width / 64).max(1) };
    if width % heads != 0 {
        return Err(t.error(format!("cannot tell the heads of width {width}")));
    }
    Ok(ClipImageConfig {
        image_size: patches * patch_size,
        patch_size,
        width,
        layers: t.count("vision_model.encoder.layers."),
        heads,
        mlp_width,
        activation: if width > 1024 { Activation::Gelu } else { Activation::QuickGelu },
        layer_norm_eps: 1e-5,
        projection,
    })
}

/// GPT-2 by its tensors: heads of 64 channels.
pub(super) fn gpt2(model: &Model) -> Result<Gpt2Config> {
    let t = Tensors::of(model, Component::Policy);
    let [vocab_size, width] = t.dims("transformer.wte.weight")?;
    let [max_positions, _] = t.dims::<2>("transformer.wpe.weight")?;
    let [_, mlp_width] = t.dims::<2>("transformer.h.0.mlp.c_fc.weight")?;
    let heads = (width / 64).max(1);
    if width % heads != 0 {
        return Err(t.error(format!("cannot tell the heads of width {width}")));
    }
    let layers = t.count("transformer.h.");
    Ok(Gpt2Config { vocab_size, width, layers, heads, mlp_width, max_positions, layer_norm_eps: 1e-5 })
}

/// A chain of linear layers by its tensors, without activations.
pub(super) fn head(model: &Model) -> Result<HeadConfig> {
    let t = Tensors::of(model, Component::Aesthetic);
    let keys = 0..t.count("layers.");
    let mut config = HeadConfig { input: 0, layers: Vec::new(), relu: false };
    for key in keys.filter(|key| t.has(&format!("layers.{key}.weight"))) {
        let [width, input] = t.dims(&format!("layers.{key}.weight"))?;
        match config.layers.last() {
            None => config.input = input,
            Some(before) if before.width == input => {}
            Some(before) => {
                return Err(t.error(format!("layers.{key} takes {input} numbers, those before give {}", before.width)));
            }
        }
        config.layers.push(HeadLayer { key, width });
    }
    match config.layers.is_empty() {
        true => Err(t.error("has no layers.0.weight")),
        false => Ok(config),
    }
}
