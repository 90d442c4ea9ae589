//! Single-file checkpoints: which component each CompVis / SGM key belongs to, and views of their fused tensors.

use super::file::File;
use super::{Component, Model, Tensor, keys_text, keys_unet, keys_vae};
use crate::{Error, Result};
use safetensors::tensor::TensorInfo;
use std::collections::BTreeMap;

/// The names below a component's prefix.
#[derive(Clone, Copy, PartialEq)]
enum Naming {
    Unet,
    Vae,
    Transformers,
    OpenClip,
}

/// Prefixes of the components: SD 1, SD 2, then SDXL.
const PREFIXES: [(&str, Component, Naming); 7] = [
    ("model.diffusion_model.", Component::Unet, Naming::Unet),
    ("first_stage_model.", Component::Vae, Naming::Vae),
    ("vae.", Component::Vae, Naming::Vae),
    ("cond_stage_model.transformer.", Component::TextEncoder, Naming::Transformers),
    ("cond_stage_model.model.", Component::TextEncoder, Naming::OpenClip),
    ("conditioner.embedders.0.transformer.", Component::TextEncoder, Naming::Transformers),
    ("conditioner.embedders.1.model.", Component::TextEncoder2, Naming::OpenClip),
];

/// Layers of OpenCLIP-H that SD 2 uses, of 24.
const SD2_LAYERS: usize = 23;

/// The only text tower of the SDXL refiner.
const REFINER: &str = "conditioner.embedders.0.model.";

/// The tensors below one prefix, by the rest of their names.
type Group<'a> = BTreeMap<&'a str, &'a TensorInfo>;

/// Loads a whole checkpoint.
pub(super) fn load(model: &mut Model, file: File) -> Result<()> {
    let number = model.files.len();
    let tensors = &file.header().tensors;
    if !tensors.keys().any(|k| PREFIXES.iter().any(|(prefix, ..)| k.starts_with(prefix))) {
        let what =
            format!("{}; expected a Stable Diffusion checkpoint (model.diffusion_model.*, ...)", describe(&file));
        return Err(Error::file(file.path(), what));
    }
    if tensors.keys().any(|k| k.starts_with(REFINER)) {
        return Err(Error::file(file.path(), "is an SDXL refiner; give the SDXL base model"));
    }
    let mut found = Vec::new();
    for (prefix, component, naming) in PREFIXES {
        let group: Group = tensors.iter().filter_map(|(k, info)| Some((k.strip_prefix(prefix)?, info))).collect();
        model.open_clip[component as usize] |= naming == Naming::OpenClip && !group.is_empty();
        found.extend(named(&group, number, component, naming).map(|(name, tensor)| (component, name, tensor)));
    }
    let outside = |key: &&String| !PREFIXES.iter().any(|(prefix, ..)| key.starts_with(prefix));
    model.ignored = tensors.keys().filter(outside).cloned().collect();
    model.metadata = file.header().metadata.clone().into_iter().collect();
    model.files.push(file);
    found.into_iter().try_for_each(|(component, name, tensor)| model.insert(component, name, tensor))
}

/// Loads only the UNet: of a whole checkpoint, or of a file that holds nothing else.
pub(super) fn load_unet(model: &mut Model, file: File) -> Result<()> {
    let number = model.files.len();
    let tensors = &file.header().tensors;
    let (prefix, ..) = PREFIXES[0];
    let prefix = if tensors.keys().any(|k| k.starts_with(prefix)) { prefix } else { "" };
    let group: Group = tensors.iter().filter_map(|(k, info)| Some((k.strip_prefix(prefix)?, info))).collect();
    if !group.keys().any(|k| k.starts_with("input_blocks.") || k.starts_with("down_blocks.")) || is_adapter(&file) {
        return Err(Error::file(file.path(), format!("{}; expected the weights of a UNet", describe(&file))));
    }
    let found: Vec<_> = named(&group, number, Component::Unet, Naming::Unet).collect();
    // What this file says of its UNet counts, not what the base model's file said of the one that is replaced.
    model.metadata = file.header().metadata.clone().into_iter().collect();
    model.ignored = tensors.keys().filter(|k| !k.contains('.')).cloned().collect();
    model.files.push(file);
    found.into_iter().try_for_each(|(name, tensor)| model.insert(Component::Unet, name, tensor))
}

/// The tensors of one component under their diffusers names.
fn named<'a>(
    group: &'a Group<'a>,
    file: usize,
    component: Component,
    naming: Naming,
) -> Box<dyn Iterator<Item = (String, Tensor)> + 'a> {
    let keys = || group.keys().copied();
    let all = group.iter();
    match naming {
        Naming::Unet if keys().any(|k| k.starts_with("input_blocks.")) => {
            let levels = keys_unet::Levels::find(keys());
            Box::new(all.filter_map(move |(key, info)| Some((levels.name(key)?, Tensor::whole(file, info)))))
        }
        Naming::Unet => Box::new(all.map(move |(key, info)| (key.to_string(), Tensor::whole(file, info)))),
        Naming::Vae => {
            let levels = keys_vae::levels(keys());
            Box::new(all.filter_map(move |(key, info)| {
                let name = keys_vae::from_compvis(key, levels)?;
                let mut tensor = Tensor::whole(file, info);
                if keys_vae::is_linear(&name) && tensor.shape[..].ends_with(&[1, 1]) && tensor.shape.len() == 4 {
                    tensor.shape.truncate(2);
                }
                Some((name, tensor))
            }))
        }
        Naming::Transformers => Box::new(
            all.filter_map(move |(key, info)| Some((keys_text::from_transformers(key)?, Tensor::whole(file, info)))),
        ),
        Naming::OpenClip => {
            // SD 2 was trained on the last layer but one, so its pipeline has neither the last layer nor the
            // projection. Files converted back from a pipeline do not have that layer to begin with.
            let only = component == Component::TextEncoder;
            let layers = keys_text::openclip_layers(keys());
            let layers = if only && layers != SD2_LAYERS { layers.saturating_sub(1) } else { layers };
            let used = move |key: &str| !(only && key == "text_projection");
            Box::new(all.filter(move |(key, _)| used(key)).flat_map(move |(key, info)| {
                let parts = keys_text::from_openclip(key, layers).into_iter();
                parts.map(move |part| (part.name.clone(), view(file, info, &part)))
            }))
        }
    }
}

/// The view of an OpenCLIP tensor that `part` describes.
fn view(file: usize, info: &TensorInfo, part: &keys_text::Part) -> Tensor {
    let mut tensor = Tensor::whole(file, info);
    // A tensor that cannot be cut evenly stays whole; its shape is then refused where it is used.
    if part.of > 1 && tensor.shape.first().is_some_and(|rows| rows % part.of == 0) {
        tensor.shape[0] /= part.of;
        let size = tensor.range.len() / part.of;
        tensor.range = tensor.range.start + part.slice.start * size..tensor.range.start + part.slice.end * size;
    }
    if part.transposed && tensor.shape.len() == 2 {
        tensor.shape.reverse();
        tensor.transposed = true;
    }
    tensor
}

/// Weights that modify a model instead of being one.
fn is_adapter(file: &File) -> bool {
    file.header().tensors.keys().any(|k| k.contains("lora_") || k.contains(".lora") || k.contains("motion_modules."))
}

/// Says what a file that is not a checkpoint seems to hold.
fn describe(file: &File) -> String {
    const KINDS: [(&str, &str); 16] = [
        ("lora", "a LoRA"),
        ("hada_w1", "a LoHa adapter"),
        ("lokr_w", "a LoKr adapter"),
        ("motion_modules.", "an AnimateDiff motion module"),
        ("control_model.", "a ControlNet"),
        ("controlnet_cond_embedding.", "a ControlNet"),
        ("ip_adapter", "an IP-Adapter"),
        ("emb_params", "a textual inversion"),
        ("joint_blocks.", "an SD 3 model"),
        ("double_blocks.", "a Flux model"),
        ("input_blocks.", "a UNet alone (--unet FILE puts it over a base model)"),
        ("down_blocks.0.attentions", "a UNet alone (--unet FILE puts it over a base model)"),
        ("transformer_blocks.0.", "a diffusion transformer"),
        ("decoder.conv_in.", "a VAE alone"),
        ("text_model.encoder.", "a text encoder alone"),
        ("transformer.resblocks.", "an OpenCLIP model alone"),
    ];
    let keys = &file.header().tensors;
    match KINDS.iter().find_map(|(part, kind)| Some((kind, keys.keys().find(|k| k.contains(part))?))) {
        Some((kind, key)) => format!("holds {kind} (tensor '{key}')"),
        None => match keys.keys().next() {
            Some(key) => format!("holds {} unknown tensor(s), the first '{key}'", keys.len()),
            None => "holds no tensors".to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::file;
    use super::super::{Pack, Weight};
    use super::*;
    use std::path::PathBuf;

    fn open(bytes: &'static [u8]) -> Result<Model> {
        let mut model = Model::empty(PathBuf::from("x"));
        load(&mut model, File::embedded(PathBuf::from("x"), bytes)?)?;
        Ok(model)
    }

    fn rows(model: &Model, component: Component, key: &str, shape: [usize; 2]) -> Vec<Vec<f32>> {
        let weight = Weight { component, keys: vec![key.to_string()], pack: Pack::Linear, shape: shape.to_vec() };
        let rows = model.rows(&weight).unwrap();
        let read = |n| {
            let mut row = vec![0.0; rows.columns()];
            rows.read_f32(n, &mut row).unwrap();
            row
        };
        (0..rows.rows()).map(read).collect()
    }

    #[test]
    fn fused_and_transposed_tensors_are_seen_as_transformers_has_them() {
        let tower = "conditioner.embedders.1.model.";
        let layer = format!("{tower}transformer.resblocks.0.attn.in_proj_weight");
        let projection = format!("{tower}text_projection");
        let model = open(file(&[(&layer, &[6, 2]), (&projection, &[2, 3])])).unwrap();
        let c = Component::TextEncoder2;
        let key = "text_model.encoder.layers.0.self_attn.k_proj.weight";
        assert_eq!(rows(&model, c, key, [2, 2]), [[4.0, 5.0], [6.0, 7.0]]);
        assert_eq!(model.shape(c, "text_projection.weight"), Some(vec![3, 2]));
        assert_eq!(rows(&model, c, "text_projection.weight", [2, 3]), [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]);
        assert!(model.is_open_clip(c) && !model.is_open_clip(Component::TextEncoder));
    }

    #[test]
    fn sd2_towers_lose_the_layer_their_pipeline_does_not_use() {
        let key = |i| format!("cond_stage_model.model.transformer.resblocks.{i}.ln_1.bias");
        let model =
            open(file(&[(&key(0), &[2]), (&key(1), &[2]), ("cond_stage_model.model.text_projection", &[2, 2])]));
        assert_eq!(model.unwrap().keys(Component::TextEncoder), ["text_model.encoder.layers.0.layer_norm1.bias"]);
    }

    #[test]
    fn sd2_towers_that_lack_that_layer_lose_none() {
        let keys: Vec<String> =
            (0..SD2_LAYERS).map(|i| format!("cond_stage_model.model.transformer.resblocks.{i}.ln_1.bias")).collect();
        let tensors: Vec<(&str, &[usize])> = keys.iter().map(|key| (key.as_str(), &[2][..])).collect();
        assert_eq!(open(file(&tensors)).unwrap().keys(Component::TextEncoder).len(), SD2_LAYERS);
    }

    #[test]
    fn attention_convolutions_of_the_vae_become_linear() {
        let model = open(file(&[("first_stage_model.decoder.mid.attn_1.q.weight", &[2, 2, 1, 1])])).unwrap();
        assert_eq!(model.shape(Component::Vae, "decoder.mid_block.attentions.0.to_q.weight"), Some(vec![2, 2]));
    }

    #[test]
    fn training_state_is_ignored_and_other_files_are_named() {
        let model = open(file(&[
            ("model.diffusion_model.input_blocks.0.0.bias", &[4]),
            ("model_ema.decay", &[1]),
            ("betas", &[2]),
        ]));
        let model = model.unwrap();
        assert_eq!(model.keys(Component::Unet), ["conv_in.bias"]);
        assert_eq!(model.ignored(), ["betas", "model_ema.decay"]);
        for (key, kind) in [
            ("lora_unet_mid.lora_up.weight", "a LoRA"),
            ("control_model.time_embed.0.bias", "a ControlNet"),
            ("input_blocks.0.0.bias", "a UNet alone"),
            ("abc", "1 unknown tensor(s), the first 'abc'"),
        ] {
            let e = open(file(&[(key, &[1])])).err().unwrap().to_string();
            assert!(e.contains(kind) && e.contains(key), "{e}");
        }
        let e = open(file(&[("conditioner.embedders.0.model.ln_final.bias", &[1]), ("vae.quant_conv.bias", &[1])]));
        assert!(e.err().unwrap().to_string().contains("refiner"));
    }

    #[test]
    fn unet_files_of_both_namings_replace_the_unet() {
        let load = |key: &str| {
            let mut model = Model::empty(PathBuf::from("x"));
            load_unet(&mut model, File::embedded(PathBuf::from("u"), file(&[(key, &[1])]))?)?;
            Ok::<_, Error>(model.keys(Component::Unet).concat())
        };
        for key in ["model.diffusion_model.input_blocks.1.0.in_layers.0.bias", "input_blocks.1.0.in_layers.0.bias"] {
            assert_eq!(load(key).unwrap(), "down_blocks.0.resnets.0.norm1.bias");
        }
        assert_eq!(load("down_blocks.0.resnets.0.norm1.bias").unwrap(), "down_blocks.0.resnets.0.norm1.bias");
        assert!(load("lora_unet_down_blocks.0.alpha").is_err());
        assert!(load("decoder.conv_in.bias").is_err());
    }
}
