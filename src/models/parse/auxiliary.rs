//! Configurations of the auxiliary networks: CLIP, GPT-2, heads.

use super::Fields;
use crate::models::config::*;
use crate::models::preprocess::{Fit, Preprocess};
use crate::program::{Filter, Interpolation};
use crate::{Error, Result};
use serde_json::{Value, json};

/// The two halves of a CLIP configuration, text first; there is no text half in a `CLIPVisionModelWithProjection`'s.
pub fn clip<'a>(f: Fields<'a>) -> Result<(Option<Fields<'a>>, Fields<'a>)> {
    match f.text("model_type", "clip")? {
        "clip_vision_model" => Ok((None, f)),
        "clip" => Ok((Some(f.object("text_config")?), f.object("vision_config")?)),
        _ => Err(f.wrong("model_type", "\"clip\" or \"clip_vision_model\"")),
    }
}

/// `CLIPVisionConfig`; the width of the projection is for the weights to say.
pub fn clip_image(f: &Fields) -> Result<ClipImageConfig> {
    f.only("model_type", json!("clip_vision_model"))?;
    f.only("num_channels", json!(3))?;
    let config = ClipImageConfig {
        image_size: f.count("image_size", 224, 1)?,
        patch_size: f.count("patch_size", 32, 1)?,
        width: f.count("hidden_size", 768, 1)?,
        layers: f.count("num_hidden_layers", 12, 1)?,
        heads: f.count("num_attention_heads", 12, 1)?,
        mlp_width: f.count("intermediate_size", 3072, 1)?,
        activation: super::gelu(f)?,
        layer_norm_eps: f.number("layer_norm_eps", 1e-5)?,
        projection: 0,
    };
    if config.patch_size > config.image_size {
        return Err(f.wrong("patch_size", "no more than image_size"));
    }
    match config.width % config.heads {
        0 => Ok(config),
        _ => Err(f.error(format!("hidden_size {} does not divide by {} heads", config.width, config.heads))),
    }
}

/// `preprocessor_config.json` (`CLIPImageProcessor`) of a tower that takes `side` pixels.
pub fn preprocess(f: &Fields, side: usize) -> Result<Preprocess> {
    let clip = Preprocess::clip(side);
    f.only("do_resize", json!(true))?;
    f.only("do_normalize", json!(true))?;
    let filter = match f.count("resample", 3, 0)? {
        2 => Filter::Bilinear,
        3 => Filter::Bicubic,
        _ => return Err(f.wrong("resample", "2 (bilinear) or 3 (bicubic)")),
    };
    let (resized, keeps_aspect) = size(f, "size", side)?;
    let fit = if keeps_aspect { Fit::Crop { short_side: resized } } else { Fit::Squash };
    let left = match f.flag("do_center_crop", true)? {
        true => size(f, "crop_size", side)?.0,
        false if keeps_aspect => return Err(f.wrong("do_center_crop", "true where the aspect is kept")),
        false => resized,
    };
    if left != side || resized < side || (fit == Fit::Squash && resized != side) {
        return Err(f.error(format!("size {resized} and crop_size {left} do not make the tower's {side} pixels")));
    }
    let preprocess = Preprocess {
        fit,
        // Pillow, which this configures, always has it.
        how: Interpolation { filter, antialias: true },
        mean: channels(f, "image_mean", clip.mean)?,
        std: channels(f, "image_std", clip.std)?,
        ..clip
    };
    match preprocess.std.iter().all(|std| *std > 0.0) {
        true => Ok(preprocess),
        false => Err(f.wrong("image_std", "numbers above 0")),
    }
}

/// A size given as a number, as that of the short side, or as equal height and width; and whether it keeps the aspect.
fn size(f: &Fields, field: &str, default: usize) -> Result<(usize, bool)> {
    let wrong = || f.wrong(field, "a side, a shortest_edge, or equal height and width");
    let part = |v: &Value, name: &str| v.get(name).map(|n| f.as_count(field, n, 1)).transpose();
    match f.get(field) {
        None => Ok((default, true)),
        Some(v) if v.is_number() => Ok((f.as_count(field, v, 1)?, true)),
        Some(v) => match (part(v, "shortest_edge")?, part(v, "height")?, part(v, "width")?) {
            (Some(side), None, None) => Ok((side, true)),
            (None, Some(height), Some(width)) if height == width => Ok((height, false)),
            _ => Err(wrong()),
        },
    }
}

/// A number per colour.
fn channels(f: &Fields, field: &str, default: [f64; 3]) -> Result<[f64; 3]> {
    let Some(v) = f.get(field) else { return Ok(default) };
    let numbers: Option<Vec<f64>> = v.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
    numbers.and_then(|list| list.try_into().ok()).ok_or_else(|| f.wrong(field, "three numbers"))
}

/// `GPT2LMHeadModel`.
pub fn gpt2(f: &Fields) -> Result<Gpt2Config> {
    f.only("model_type", json!("gpt2"))?;
    f.only("scale_attn_weights", json!(true))?;
    f.only("tie_word_embeddings", json!(true))?;
    for field in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
        f.only(field, json!(false))?;
    }
    if !matches!(f.text("activation_function", "gelu_new")?, "gelu_new" | "gelu_pytorch_tanh") {
        return Err(f.wrong("activation_function", "\"gelu_new\"; others are not supported"));
    }
    let width = f.count("n_embd", 768, 1)?;
    let config = Gpt2Config {
        vocab_size: f.count("vocab_size", 50257, 1)?,
        width,
        layers: f.count("n_layer", 12, 1)?,
        heads: f.count("n_head", 12, 1)?,
        mlp_width: f.count("n_inner", 4 * width, 1)?,
        max_positions: f.count("n_positions", 1024, 1)?,
        layer_norm_eps: f.number("layer_norm_epsilon", 1e-5)?,
    };
    match config.width % config.heads {
        0 => Ok(config),
        _ => Err(f.error(format!("n_embd {} does not divide by {} heads", config.width, config.heads))),
    }
}

/// `AestheticHead`, ours: its sizes, and whether there is a ReLU between its layers.
pub fn head(f: &Fields) -> Result<(Vec<usize>, bool)> {
    f.only("_class_name", json!("AestheticHead"))?;
    let sizes = f.sizes("sizes", &[])?;
    match f.text("activation", "none")? {
        "none" => Ok((sizes, false)),
        "relu" => Ok((sizes, true)),
        _ => Err(f.wrong("activation", "\"relu\" or \"none\"")),
    }
}

impl<'a> Fields<'a> {
    /// The configuration inside a field.
    fn object(&self, field: &'static str) -> Result<Fields<'a>> {
        match self.get(field).and_then(Value::as_object) {
            Some(map) => Ok(Fields { file: self.file.clone(), inside: field, map }),
            None => Err(Error::file(&self.file, format!("has no {field}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn parse(json: Value) -> Result<Preprocess> {
        preprocess(&Fields::new(PathBuf::from("preprocessor_config.json"), &json)?, 224)
    }

    #[test]
    fn preprocessor_configs() {
        assert_eq!(parse(json!({})).unwrap(), Preprocess::clip(224));
        // As OpenAI published it, and as transformers has written it since.
        let old = json!({"size": 224, "crop_size": 224, "resample": 3, "do_center_crop": true});
        let new = json!({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}});
        assert_eq!((parse(old).unwrap(), parse(new).unwrap()), (Preprocess::clip(224), Preprocess::clip(224)));
        let larger = parse(json!({"size": 256, "crop_size": 224, "resample": 2})).unwrap();
        assert_eq!((larger.fit, larger.how.filter), (Fit::Crop { short_side: 256 }, Filter::Bilinear));
        let square = json!({"size": {"height": 224, "width": 224}, "do_center_crop": false, "image_std": [1, 2, 3]});
        let square = parse(square).unwrap();
        assert_eq!((square.fit, square.std), (Fit::Squash, [1.0, 2.0, 3.0]));
        for (field, json) in [
            ("size 336", json!({"size": 336, "crop_size": 336})),
            ("size 128", json!({"size": 128})),
            ("crop_size", json!({"crop_size": {"height": 224, "width": 448}})),
            ("do_center_crop", json!({"do_center_crop": false})),
            ("resample", json!({"resample": 1})),
            ("image_mean", json!({"image_mean": [0.5]})),
            ("image_std", json!({"image_std": [0.5, 0, 0.5]})),
            ("do_resize", json!({"do_resize": false})),
        ] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains("preprocessor_config.json"), "{error}");
        }
    }

    #[test]
    fn halves_of_a_clip_configuration_are_named() {
        let json = json!({"model_type": "clip", "text_config": {}, "vision_config": {"hidden_act": "relu"}});
        let (_, image) = clip(Fields::new(PathBuf::from("config.json"), &json).unwrap()).unwrap();
        let error = clip_image(&image).unwrap_err().to_string();
        assert!(error.contains("config.json: vision_config: hidden_act"), "{error}");
        let json = json!({"model_type": "clip", "text_config": {}});
        let error = clip(Fields::new(PathBuf::from("config.json"), &json).unwrap()).err().unwrap();
        assert!(error.to_string().contains("has no vision_config"));
    }
}
