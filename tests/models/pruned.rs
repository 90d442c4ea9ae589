//! UNets whose blocks differ in depth (`tools/reference/dump_pruned.py`): run whole, or refused.

use crate::common::golden::{data_folder, relative_error};
use crate::common::layouts::rename_tensors;
use rarebit::Result;
use rarebit::exec::cpu::Cpu;
use rarebit::models::config::Middle;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::networks::{Networks, Tensor};
use rarebit::program::DType;
use rarebit::weights::Model;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

const NAMES: [&str; 2] = ["depths", "no-middle"];

fn folder(name: &str) -> PathBuf {
    data_folder("pruned").join(name)
}

fn file(name: &str) -> PathBuf {
    folder(name).join("diffusion_pytorch_model.safetensors")
}

/// The text encoder and VAE of SD 1 in small with these UNets over its own, one after the other.
fn with_unets(unets: &[&Path]) -> Result<Pipeline> {
    let mut model = Model::open(&data_folder("tiny-sd1"))?;
    unets.iter().try_for_each(|unet| model.replace_unet(unet))?;
    Pipeline::open(model, None)
}

/// The distance of a pipeline's prediction from the one diffusers' UNet of that name made.
fn distance(pipeline: &Pipeline, name: &str) -> f64 {
    let bytes = std::fs::read(folder(name).join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |key: &str| {
        let view = golden.tensor(key).unwrap();
        let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Tensor { shape: view.shape().to_vec(), data }
    };
    let mut cpu = Cpu::<f32>::new();
    let mut networks = Networks::new(pipeline, &mut cpu, DType::F32);
    let prediction = networks.unet(&tensor("latents"), 420.0, &tensor("context").data, None).unwrap();
    relative_error(&prediction.data, &tensor("prediction").data)
}

#[test]
fn blocks_of_different_depths_are_run_whole() {
    for name in NAMES {
        let pipeline = with_unets(&[&folder(name)]).unwrap();
        assert!(pipeline.remarks.is_empty(), "{:?}", pipeline.remarks);
        let distance = distance(&pipeline, name);
        assert!(distance < 1e-5, "{name}: {distance}");
    }
    let unet = with_unets(&[&folder("depths")]).unwrap().config.unet;
    assert_eq!(unet.down_transformers, [vec![0, 0], vec![2, 1], vec![1, 2]]);
    assert_eq!(unet.up_transformers, [vec![0, 0, 0], vec![2, 1, 1], vec![1, 2, 1]]);
    assert_eq!(unet.middle, Middle::Resnet);
}

/// A file brings no configuration: its depths are told by its tensors, whatever the UNet had whose place it takes.
#[test]
fn a_file_has_its_own_depths() {
    for (base, name) in [(NAMES[0], NAMES[1]), (NAMES[1], NAMES[0])] {
        let pipeline = with_unets(&[&folder(base), &file(name)]).unwrap();
        let distance = distance(&pipeline, name);
        assert!(distance < 1e-5, "{name} over {base}: {distance}");
    }
}

/// What diffusers saves in one file (`input_blocks.`…) has the same depths.
#[test]
fn compvis_names_have_the_same_depths() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.safetensors");
    rename_tensors(&file("depths"), &path, |key| vec![compvis(key)]);
    let pipeline = with_unets(&[&self::folder("no-middle"), &path]).unwrap();
    let distance = distance(&pipeline, "depths");
    assert!(distance < 1e-5, "{distance}");
}

/// The CompVis name of a tensor of `depths`: three levels of two and of three residual blocks.
fn compvis(key: &str) -> String {
    let resnet = |rest: &str| {
        let names = [
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ];
        let (part, end) = rest.split_once('.').unwrap();
        format!("{}.{end}", names.iter().find(|(ours, _)| *ours == part).unwrap().1)
    };
    let parts: Vec<&str> = key.splitn(5, '.').collect();
    let number = |i: usize| parts[i].parse::<usize>().unwrap();
    match parts[..] {
        ["down_blocks", _, "resnets", _, rest] => {
            format!("input_blocks.{}.0.{}", 1 + 3 * number(1) + number(3), resnet(rest))
        }
        ["down_blocks", _, "attentions", _, rest] => format!("input_blocks.{}.1.{rest}", 1 + 3 * number(1) + number(3)),
        ["down_blocks", _, "downsamplers", _, rest] => {
            format!("input_blocks.{}.0.op.{}", 3 * number(1) + 3, rest.strip_prefix("conv.").unwrap())
        }
        ["up_blocks", _, "resnets", _, rest] => {
            format!("output_blocks.{}.0.{}", 3 * number(1) + number(3), resnet(rest))
        }
        ["up_blocks", _, "attentions", _, rest] => format!("output_blocks.{}.1.{rest}", 3 * number(1) + number(3)),
        // Both levels that end in an upsampler have attention.
        ["up_blocks", _, "upsamplers", _, rest] => format!("output_blocks.{}.2.{rest}", 3 * number(1) + 2),
        ["mid_block", "resnets", "0", ..] => format!("middle_block.0.{}", resnet(&key["mid_block.resnets.0.".len()..])),
        _ => key
            .replace("time_embedding.linear_1", "time_embed.0")
            .replace("time_embedding.linear_2", "time_embed.2")
            .replace("conv_in", "input_blocks.0.0")
            .replace("conv_norm_out", "out.0")
            .replace("conv_out", "out.2"),
    }
}

/// With more inside than would be run, it is another network.
#[test]
fn more_inside_a_unet_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("diffusion_pytorch_model.safetensors");
    std::fs::copy(self::folder("depths").join("config.json"), folder.path().join("config.json")).unwrap();
    const QUERY: &str = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    for (from, to) in [
        (QUERY, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.bias"),
        (QUERY, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.norm_q.weight"),
        (QUERY, "down_blocks.1.attentions.0.transformer_blocks.0.fuser.linear.weight"),
        (QUERY, "down_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight"),
        (QUERY, "down_blocks.0.attentions.0.norm.weight"),
        (QUERY, "position_net.null_positive_feature.weight"),
        ("conv_in.bias", "time_embedding.linear_3.bias"),
    ] {
        let also = |key: &str| if key == from { vec![key.to_string(), to.to_string()] } else { vec![key.to_string()] };
        rename_tensors(&file("depths"), &path, also);
        // By the folder's configuration and by the tensors alone.
        for given in [folder.path(), &path] {
            let error = with_unets(&[&self::folder("depths"), given])
                .err()
                .unwrap_or_else(|| panic!("{to} was accepted"))
                .to_string();
            assert!(error.contains(to) && error.contains("another one") && !error.contains('\n'), "{error}");
        }
    }
    // A configuration that says less than there is.
    let deeper = QUERY.replace("blocks.0.attn1", "blocks.3.attn1");
    rename_tensors(&file("depths"), &path, |key| {
        if key == QUERY { vec![key.to_string(), deeper.clone()] } else { vec![key.to_string()] }
    });
    let error = with_unets(&[folder.path()]).err().unwrap().to_string();
    assert!(error.contains("transformer blocks on the way down is [[0, 0], [2, 1], [1, 2]]"), "{error}");
}
