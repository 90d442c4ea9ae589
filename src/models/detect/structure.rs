//! What the keys and shapes of a checkpoint say about its networks, for files without configs and to check those with.

use crate::models::config::*;
use crate::program::Activation;
use crate::weights::{Component, Model};
use crate::{Error, Result};

/// More levels than any network has; every level halves the image.
const MOST_LEVELS: usize = 12;

/// The tensors of one component.
struct Tensors<'a> {
    model: &'a Model,
    component: Component,
}

impl Tensors<'_> {
    fn has(&self, key: &str) -> bool {
        self.model.shape(self.component, key).is_some()
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
        let number = |key: &str| key.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
        // Nothing has this many blocks; a file that says so lacks most of them.
        let numbers = self.model.keys(self.component).into_iter().filter_map(number).filter(|n| *n < 1000);
        numbers.max().map_or(0, |n| n + 1)
    }

    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::file(self.model.source(self.component), format!("{}: {what}", self.component.name()))
    }
}

/// The UNet by its tensors. Heads, norm and time settings follow the family, which is what the projections and added
/// embeddings tell: 8 heads (SD 1) or heads of 64 channels (SD 2, SDXL), 32 norm groups. `sample_size` is 0.
pub(super) fn unet(model: &Model) -> Result<UnetConfig> {
    let t = Tensors { model, component: Component::Unet };
    foreign(&t)?;
    let [_, in_channels, ..] = t.dims::<4>("conv_in.weight")?;
    let [out_channels, ..] = t.dims::<4>("conv_out.weight")?;
    let levels = t.count("down_blocks.");
    if !(1..=MOST_LEVELS).contains(&levels) || t.count("up_blocks.") != levels {
        return Err(t.error(format!("has {levels} down_blocks and {} up_blocks", t.count("up_blocks."))));
    }
    let layers_per_block = t.count("down_blocks.0.resnets.");
    let mut config = UnetConfig {
        in_channels,
        out_channels,
        channels: Vec::new(),
        layers_per_block,
        down_transformers: Vec::new(),
        up_transformers: Vec::new(),
        mid_transformers: depth(&t, "mid_block"),
        heads: Vec::new(),
        context_width: t.dims::<2>("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")?[1],
        norm_groups: 32,
        norm_eps: 1e-5,
        linear_projection: model
            .shape(t.component, "mid_block.attentions.0.proj_in.weight")
            .is_some_and(|s| s.len() == 2),
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        added: added(&t)?,
        sample_size: 0,
    };
    for i in 0..levels {
        let (down, up) = (format!("down_blocks.{i}"), format!("up_blocks.{}", levels - 1 - i));
        config.channels.push(t.dims::<4>(&format!("{down}.resnets.0.conv1.weight"))?[0]);
        for (block, layers) in [(&down, layers_per_block), (&up, layers_per_block + 1)] {
            let found = t.count(&format!("{block}.resnets."));
            if found != layers {
                return Err(t.error(format!("{block} has {found} residual blocks, expected {layers}")));
            }
        }
        config.down_transformers.push(depth(&t, &down));
        config.up_transformers.push(depth(&t, &up));
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
    let keys = t.model.keys(t.component);
    let found = PARTS.iter().find(|(part, _)| keys.iter().any(|k| k.starts_with(part)));
    found.map_or(Ok(()), |(_, what)| Err(t.error(format!("{what}, which is not supported"))))
}

/// Transformer blocks in the first attention of a block; 0 where there is none.
fn depth(t: &Tensors, block: &str) -> usize {
    t.count(&format!("{block}.attentions.0.transformer_blocks."))
}

/// The added conditions; the width beyond the pooled text of the second tower belongs to six size numbers.
fn added(t: &Tensors) -> Result<Option<AddedConfig>> {
    if !t.has("add_embedding.linear_1.weight") {
        return Ok(None);
    }
    let [_, input_width] = t.dims::<2>("add_embedding.linear_1.weight")?;
    let second = Tensors { model: t.model, component: Component::TextEncoder2 };
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
    let t = Tensors { model, component: Component::Vae };
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
    let t = Tensors { model, component };
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
    let t = Tensors { model, component };
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
    let t = Tensors { model, component: Component::Policy };
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
    let t = Tensors { model, component: Component::Aesthetic };
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
