//! Names of CLIP and GPT-2: transformers with or without prefix, and OpenCLIP text towers with their fused projections.

use std::ops::Range;

/// The canonical name of a transformers key; `None` for the position buffer of old checkpoints.
///
/// `CLIPTextModel` is saved with or without `text_model.` depending on the version of transformers; we keep the prefix.
pub(super) fn from_transformers(key: &str) -> Option<String> {
    if key.ends_with("position_ids") {
        return None;
    }
    let bare = ["embeddings.", "encoder.", "final_layer_norm."].iter().any(|p| key.starts_with(p));
    Some(if bare { format!("text_model.{key}") } else { key.to_string() })
}

/// The canonical name of a key of `CLIPModel` or its image tower; a bare `CLIPVisionModel` gets its prefix.
pub(super) fn from_clip(key: &str) -> Option<String> {
    if key.ends_with("position_ids") {
        return None;
    }
    let bare = ["embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."].iter().any(|p| key.starts_with(p));
    Some(if bare { format!("vision_model.{key}") } else { key.to_string() })
}

/// The canonical name of a key of `GPT2LMHeadModel`, which may lack its prefix; `None` for the causal masks of old checkpoints
/// and for a copy of the tied head.
pub(super) fn from_gpt2(key: &str) -> Option<String> {
    if key.ends_with(".attn.bias") || key.ends_with(".attn.masked_bias") || key == "lm_head.weight" {
        return None;
    }
    Some(if key.starts_with("transformer.") { key.to_string() } else { format!("transformer.{key}") })
}

/// Part of an OpenCLIP tensor under its transformers name.
#[derive(Debug, PartialEq)]
pub(super) struct Part {
    pub name: String,
    /// Which of how many equal slices of the first dimension; `0..1` is the whole tensor.
    pub slice: Range<usize>,
    pub of: usize,
    /// Stored `[in, out]`, where transformers has `[out, in]`.
    pub transposed: bool,
}

/// What an OpenCLIP key (without the checkpoint's prefix) holds; empty for what transformers does not have.
///
/// `layers` is how many layers to keep: SD 2 files carry one more than the pipeline uses.
pub(super) fn from_openclip(key: &str, layers: usize) -> Vec<Part> {
    let whole = |name: String| vec![Part { name, slice: 0..1, of: 1, transposed: false }];
    match key {
        "token_embedding.weight" => return whole("text_model.embeddings.token_embedding.weight".into()),
        "positional_embedding" => return whole("text_model.embeddings.position_embedding.weight".into()),
        "text_projection" => {
            return vec![Part { name: "text_projection.weight".into(), slice: 0..1, of: 1, transposed: true }];
        }
        _ => {}
    }
    if let Some(rest) = key.strip_prefix("ln_final.") {
        return whole(format!("text_model.final_layer_norm.{rest}"));
    }
    let Some((layer, rest)) = layer_key(key).filter(|(layer, _)| *layer < layers) else { return Vec::new() };
    let base = format!("text_model.encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        let part = |i, p| Part {
            name: format!("{base}.self_attn.{p}_proj.{kind}"),
            slice: i..i + 1,
            of: 3,
            transposed: false,
        };
        return vec![part(0, "q"), part(1, "k"), part(2, "v")];
    }
    let names = [
        ("ln_1.", "layer_norm1."),
        ("ln_2.", "layer_norm2."),
        ("attn.out_proj.", "self_attn.out_proj."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    ];
    match names.iter().find_map(|(theirs, ours)| Some(format!("{base}.{ours}{}", rest.strip_prefix(theirs)?))) {
        Some(name) => whole(name),
        None => Vec::new(),
    }
}

/// Whether a key is one of the layers from number `layers` on.
pub(super) fn is_beyond(key: &str, layers: usize) -> bool {
    layer_key(key).is_some_and(|(layer, _)| layer >= layers)
}

/// The layers an OpenCLIP tower has.
pub(super) fn openclip_layers<'a>(keys: impl Iterator<Item = &'a str>) -> usize {
    keys.filter_map(layer_key).map(|(layer, _)| layer.saturating_add(1)).max().unwrap_or(0)
}

fn layer_key(key: &str) -> Option<(usize, &str)> {
    let (layer, rest) = key.strip_prefix("transformer.resblocks.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transformers_names_get_their_prefix() {
        let layer = "encoder.layers.3.self_attn.q_proj.weight";
        assert_eq!(from_transformers(layer), Some(format!("text_model.{layer}")));
        assert_eq!(
            from_transformers("text_model.final_layer_norm.bias"),
            Some("text_model.final_layer_norm.bias".into())
        );
        assert_eq!(from_transformers("text_projection.weight"), Some("text_projection.weight".into()));
        assert_eq!(from_transformers("text_model.embeddings.position_ids"), None);
    }

    #[test]
    fn clip_and_gpt2_names() {
        assert_eq!(from_clip("pre_layrnorm.bias"), Some("vision_model.pre_layrnorm.bias".into()));
        assert_eq!(from_clip("text_model.embeddings.position_ids"), None);
        assert_eq!(from_clip("logit_scale"), Some("logit_scale".into()));
        assert_eq!(from_gpt2("h.0.attn.c_attn.bias"), Some("transformer.h.0.attn.c_attn.bias".into()));
        assert_eq!(from_gpt2("transformer.wte.weight"), Some("transformer.wte.weight".into()));
        assert_eq!(
            ["h.0.attn.bias", "transformer.h.0.attn.masked_bias", "lm_head.weight"].map(from_gpt2),
            [None, None, None]
        );
    }

    #[test]
    fn openclip_names() {
        let parts = from_openclip("transformer.resblocks.7.attn.in_proj_bias", 8);
        assert_eq!(parts.len(), 3);
        assert_eq!(parts[2].name, "text_model.encoder.layers.7.self_attn.v_proj.bias");
        assert_eq!((parts[2].slice.clone(), parts[2].of), (2..3, 3));
        assert!(from_openclip("transformer.resblocks.7.attn.in_proj_bias", 7).is_empty());
        assert!(from_openclip("text_projection", 1)[0].transposed);
        let one = |key: &str| from_openclip(key, 8).remove(0).name;
        assert_eq!(one("transformer.resblocks.0.mlp.c_proj.weight"), "text_model.encoder.layers.0.mlp.fc2.weight");
        assert_eq!(one("ln_final.bias"), "text_model.final_layer_norm.bias");
        assert!(from_openclip("logit_scale", 8).is_empty());
        assert!(from_openclip("transformer.resblocks.x.ln_1.bias", 8).is_empty());
    }
}
