//! What a set of tensors is, told by their names: a part of a model, another family's, an adapter; and which tensors nobody misses.

use super::Component;

/// What a file without a known prefix seems to hold.
pub(super) struct Kind<'a> {
    /// With its article.
    pub name: &'static str,
    /// What to do with it, where there is something.
    advice: &'static str,
    /// What it can be used as.
    components: &'static [Component],
    /// A tensor that tells.
    key: &'a str,
}

impl Kind<'_> {
    pub fn is(&self, c: Component) -> bool {
        self.components.contains(&c)
    }
}

impl std::fmt::Display for Kind<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Kind { name, key, advice, .. } = self;
        write!(f, "holds {name} (tensor '{key}')")?;
        if advice.is_empty() { Ok(()) } else { write!(f, ": {advice}") }
    }
}

/// Where in a key a mark must be.
enum At {
    Start,
    Anywhere,
}

type Known = (At, &'static str, &'static str, &'static str, &'static [Component]);

const MERGE: &str = "merge it into a checkpoint first, it is not read";
const OTHER: &str = "models of that family are not built here; Stable Diffusion 1, 2 and XL are";
/// Where a UNet that was given as a model belongs.
pub const NEEDS_BASE: &str = "it needs a base model; a Stable Diffusion 1, 2 or XL UNet goes over one with --unet";
const ALONE: &str = "give the whole model";
const TEXT: &[Component] = &[Component::TextEncoder, Component::TextEncoder2, Component::Clip, Component::HeldOutClip];
const IMAGE: &[Component] = &[Component::Clip, Component::HeldOutClip];

/// Marks, what they are of, and what to do; the first that is found says it. Adapters come first: their names contain those of what
/// they adapt.
const KINDS: [Known; 41] = [
    (At::Anywhere, "lora_", "a LoRA", MERGE, &[]),
    (At::Anywhere, ".lora", "a LoRA", MERGE, &[]),
    (At::Anywhere, "_lora.", "a LoRA", MERGE, &[]),
    (At::Anywhere, ".hada_w1", "a LoHa adapter", MERGE, &[]),
    (At::Anywhere, ".lokr_w", "a LoKr adapter", MERGE, &[]),
    (At::Anywhere, ".oft_", "an OFT adapter", MERGE, &[]),
    (At::Anywhere, "motion_modules.", "an AnimateDiff motion module", "video is not made here", &[]),
    (At::Start, "control_model.", "a ControlNet", "it is not read; give the model without it", &[]),
    (At::Anywhere, "controlnet_cond_embedding.", "a ControlNet", "it is not read", &[]),
    (At::Anywhere, "controlnet_down_blocks.", "a ControlNet", "it is not read", &[]),
    (At::Start, "input_hint_block.", "a ControlNet", "it is not read", &[]),
    (At::Start, "adapter.body.", "a T2I-Adapter", "it is not read", &[]),
    (At::Start, "ip_adapter.", "an IP-Adapter", "it is not read", &[]),
    (At::Start, "image_proj.", "an IP-Adapter", "it is not read", &[]),
    (At::Anywhere, ".to_k_ip.", "an IP-Adapter", "it is not read", &[]),
    (At::Start, "emb_params", "a textual inversion", "give it with --token", &[]),
    (At::Start, "string_to_param", "a textual inversion", "give it with --token", &[]),
    (At::Anywhere, "joint_blocks.", "a Stable Diffusion 3 model", OTHER, &[]),
    (At::Anywhere, "double_blocks.", "a Flux model", OTHER, &[]),
    (At::Anywhere, "single_transformer_blocks.", "a Flux model", OTHER, &[]),
    (At::Anywhere, "clip_txt_", "a Stable Cascade stage", OTHER, &[]),
    (At::Anywhere, "effnet_mapper.", "a Stable Cascade stage", OTHER, &[]),
    (At::Anywhere, "adaln_single.", "a PixArt model", OTHER, &[]),
    (At::Anywhere, "context_embedder.", "a Stable Diffusion 3 model", OTHER, &[]),
    (At::Start, "transformer_blocks.", "a diffusion transformer", OTHER, &[]),
    (At::Start, "blocks.", "a diffusion transformer", OTHER, &[Component::Reader]),
    (At::Start, "RRDB_trunk.", "an image upscaler", "it is not read", &[]),
    (At::Anywhere, ".rdb1.", "an image upscaler", "it is not read", &[]),
    (At::Start, "input_blocks.", "a UNet alone", NEEDS_BASE, &[Component::Unet]),
    (At::Start, "down_blocks.", "a UNet alone", NEEDS_BASE, &[Component::Unet]),
    (At::Start, "decoder.conv_in.", "a VAE alone", ALONE, &[Component::Vae]),
    (At::Start, "decoder.layers.", "a tiny autoencoder (TAESD)", "it is not read", &[]),
    (At::Start, "text_model.", "a CLIP or its text tower", ALONE, TEXT),
    (At::Start, "encoder.layers.", "a CLIP or its text tower", ALONE, TEXT),
    (At::Start, "vision_model.", "a CLIP's image tower", ALONE, IMAGE),
    (At::Start, "visual.", "an OpenCLIP model in its own names", "give the one transformers has saved", &[]),
    (At::Start, "transformer.resblocks.", "a text tower in OpenCLIP's names", ALONE, &[]),
    (At::Start, "encoder.block.", "a T5 text encoder", OTHER, &[]),
    (At::Anywhere, "h.0.attn.c_attn.", "a GPT-2", "", &[Component::Policy]),
    (At::Start, "layers.0.self_attn.", "a language model", OTHER, &[]),
    (At::Start, "layers.0.", "a head of linear layers", "", &[Component::Aesthetic]),
];

/// What tensors of these names, without a wrapper's prefix, seem to be.
pub(super) fn kind<'a>(keys: impl Iterator<Item = &'a str> + Clone) -> Option<Kind<'a>> {
    let find = |(at, mark, name, advice, components): &Known| {
        let key = keys.clone().find(|key| match at {
            At::Start => key.starts_with(mark),
            At::Anywhere => key.contains(mark),
        })?;
        Some(Kind { name, advice, components, key })
    };
    KINDS.iter().find_map(find)
}

/// [`kind`] as text, also where it is not known.
pub(super) fn describe<'a>(keys: impl Iterator<Item = &'a str> + Clone) -> String {
    match kind(keys.clone()) {
        Some(kind) => kind.to_string(),
        None => match keys.clone().next() {
            Some(key) => format!("holds {} unknown tensor(s), the first '{key}'", keys.count()),
            None => "holds no tensors".to_string(),
        },
    }
}

/// Whether a tensor that no network reads can be left out without a word: buffers that are computed, copies, training state, marks
/// that were read, and the scale of CLIP's training.
pub fn is_harmless(key: &str) -> bool {
    const NAMES: [&str; 10] = [
        "betas",
        "logvar",
        "lvlb_weights",
        "scale_factor",
        "global_step",
        "v_pred",
        "ztsnr",
        "denoiser.sigmas",
        "log_one_minus_alphas_cumprod",
        "scaled_fp8",
    ];
    const STARTS: [&str; 9] = [
        "model_ema.",
        "ema.",
        "alphas_cumprod",
        "sqrt_",
        "posterior_",
        "safety_checker.",
        "loss.",
        "first_stage_model.loss.",
        "first_stage_model.model_ema.",
    ];
    const ENDS: [&str; 4] = ["position_ids", "num_batches_tracked", "logit_scale", "attn_mask"];
    NAMES.contains(&key)
        || STARTS.iter().any(|start| key.starts_with(start))
        || ENDS.iter().any(|end| key.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_by_their_tensors() {
        for (key, name) in [
            ("lora_unet_mid_block.lora_up.weight", "a LoRA"),
            ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
            ("down_blocks.0.attentions.0.processor.to_q_lora.down.weight", "a LoRA"),
            ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
            ("joint_blocks.0.context_block.attn.proj.bias", "a Stable Diffusion 3 model"),
            ("double_blocks.0.img_attn.proj.bias", "a Flux model"),
            ("single_transformer_blocks.3.norm.linear.bias", "a Flux model"),
            ("clip_txt_mapper.weight", "a Stable Cascade stage"),
            ("adaln_single.linear.bias", "a PixArt model"),
            ("body.0.rdb1.conv1.weight", "an image upscaler"),
            ("down_blocks.0.attentions.0.transformer_blocks.0.norm1.bias", "a UNet alone"),
            ("decoder.conv_in.bias", "a VAE alone"),
            ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
            ("layers.0.self_attn.q_proj.weight", "a language model"),
        ] {
            assert_eq!(kind([key].into_iter()).map(|kind| kind.name), Some(name), "{key}");
        }
        assert!(kind(["abc"].into_iter()).is_none());
        // No message sends to the place the file may be in; a UNet's is where it is not one.
        assert!(!kind(["down_blocks.0.a"].into_iter()).unwrap().to_string().contains("(--unet FILE"));
    }

    #[test]
    fn what_nobody_misses() {
        for key in ["model_ema.decay", "alphas_cumprod_prev", "posterior_mean_coef1", "first_stage_model.loss.logvar"] {
            assert!(is_harmless(key), "{key}");
        }
        for key in ["down_blocks.0.resnets.0.conv1.weight", "decoder.up.0.attn.0.q.weight", "losses", "embedding"] {
            assert!(!is_harmless(key), "{key}");
        }
    }
}
