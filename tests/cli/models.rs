//! What the program says of a model when it opens one.

use crate::common::command::{fails, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use crate::common::layouts::{copy_of, rename_tensors};
use std::fs;
use tempfile::TempDir;

/// Every command says once, in one line, what it leaves out; one that is quiet too.
#[test]
fn what_nothing_reads_is_said_once() {
    let (model, out) = (copy_of("tiny-sd1"), TempDir::new().unwrap());
    let tower = model.path().join("text_encoder/model.safetensors");
    rename_tensors(&tower, &tower, |key| match key.ends_with("final_layer_norm.bias") {
        true => vec![key.to_string(), "vision_model.a".to_string()],
        false => vec![key.to_string()],
    });
    let (folder, image) = (model.path().display().to_string(), path(&out, "image.png"));
    let make = ["--steps", "1", "--quiet", "--model", &folder, "--out", &image];
    for args in [
        [&["generate", "a red star"][..], &make].concat(),
        [&["minority", "a red star"][..], &make].concat(),
        [&["compare", "a red star", "--methods", "ddim", "--count", "1"][..], &make].concat(),
        vec!["inspect", "--json", &folder],
    ] {
        let output = rarebit(&args);
        let stderr = text(&output.stderr);
        assert!(output.status.success(), "{args:?}: {stderr}");
        assert_eq!(stderr.matches("1 tensor(s) that nothing reads: 'vision_model.a'").count(), 1, "{args:?}: {stderr}");
    }
}

/// Choosing a sampler does not help where the network was trained on other noise; it does where only the sampler is not here.
#[test]
fn samplers_and_what_a_model_was_trained_on() {
    let (model, out) = (copy_of("tiny-sd1"), TempDir::new().unwrap());
    let scheduler = model.path().join("scheduler/scheduler_config.json");
    let original: serde_json::Value = serde_json::from_slice(&fs::read(&scheduler).unwrap()).unwrap();
    let set = |fields: &[(&str, serde_json::Value)]| {
        let mut json = original.clone();
        fields.iter().for_each(|(field, value)| json[*field] = value.clone());
        fs::write(&scheduler, json.to_string()).unwrap();
    };
    let (folder, image) = (model.path().display().to_string(), path(&out, "image.png"));
    let args = ["generate", "a red star", "--steps", "2", "--quiet", "--model", &folder, "--out", &image];
    let with = |sampler: &'static str| [&args[..], &["--sampler", sampler]].concat();

    set(&[("use_flow_sigmas", true.into())]);
    for args in [args.to_vec(), with("ddim"), with("dpmpp-2m")] {
        fails(&args, 1, &["scheduler_config.json", "flow matching", "no sampler here can follow"]);
    }
    set(&[("thresholding", true.into())]);
    fails(&args, 2, &["thresholding is true", "choose a sampler with --sampler"]);
    let output = rarebit(&with("pndm"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("--sampler pndm does without it"), "{}", text(&output.stderr));
    set(&[("lambda_min_clipped", f64::MIN.into())]);
    succeeds(&with("euler"));
}

/// A part of a model in the place of one is told where it goes, never to the flag it was given with.
#[test]
fn parts_of_a_model_are_sent_elsewhere() {
    let data = data_folder("tiny-sd1");
    let part = |name: &str| data.join(name).display().to_string();
    let unet = part("unet/diffusion_pytorch_model.safetensors");
    fails(&["inspect", &unet], 1, &["a UNet alone", "over one with --unet"]);
    fails(&["inspect", &part("unet")], 1, &["a UNet's folder", "--unet"]);
    for vae in [part("vae/diffusion_pytorch_model.safetensors"), part("vae")] {
        let output = rarebit(&["inspect", "--unet", &vae]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("a VAE alone") && !stderr.contains("--unet"), "{stderr}");
    }
}
