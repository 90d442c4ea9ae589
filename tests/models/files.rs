//! Models as tools, wrappers and the hub leave them on disk.

use crate::common::golden::data_folder;
use crate::common::layouts::{copy_of, rename_tensors, weights_of, write_single_file};
use rarebit::Result;
use rarebit::pipeline::Pipeline;
use rarebit::weights::{Component, Model};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

fn open(path: &Path) -> Result<Pipeline> {
    Pipeline::open(Model::open(path)?, None)
}

/// The one line that refuses a model.
#[track_caller]
fn refusal(opened: Result<impl Sized>) -> String {
    let error = opened.err().expect("was accepted").to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn over_shapes(unet: &Path) -> Result<Pipeline> {
    let mut model = rarebit::assets::shapes()?;
    model.replace_unet(unet)?;
    Pipeline::open(model, None)
}

/// The file of another UNet for the embedded model, with a prefix before every name.
fn wrapped_unet(folder: &TempDir, prefix: &str) -> std::path::PathBuf {
    let path = folder.path().join("unet.safetensors");
    let from = data_folder("shapes-b").join("unet/diffusion_pytorch_model.safetensors");
    rename_tensors(&from, &path, |key| vec![format!("{prefix}{key}")]);
    path
}

#[test]
fn prefixes_of_wrappers_come_off_unet_files() {
    let folder = TempDir::new().unwrap();
    let keys = |model: &Model| model.keys(Component::Unet).into_iter().map(str::to_string).collect::<Vec<_>>();
    let load = |prefix: &str| {
        let mut model = rarebit::assets::shapes().unwrap();
        model.replace_unet(&wrapped_unet(&folder, prefix)).unwrap();
        model
    };
    let plain = keys(&load(""));
    for prefix in [
        "module.",
        "_orig_mod.",
        "unet.",
        "model.",
        "diffusion_model.",
        "model.diffusion_model.",
        "module._orig_mod.unet.",
    ] {
        assert_eq!(keys(&load(prefix)), plain, "{prefix}");
    }
    // One that nobody knows is not taken off.
    let mut model = rarebit::assets::shapes().unwrap();
    let error = refusal(model.replace_unet(&wrapped_unet(&folder, "mine.")));
    assert!(error.contains("unknown tensor") && error.contains("mine."), "{error}");
    assert!(!error.contains("--unet"), "sends to the flag in use: {error}");
}

#[test]
fn prefixes_of_wrappers_come_off_components_and_checkpoints() {
    let folder = copy_of("tiny-sd1");
    let wrap = |component: &str, file: &str, prefix: &str| {
        let path = folder.path().join(component).join(file);
        rename_tensors(&path, &path, |key| vec![format!("{prefix}{key}")]);
    };
    let plain = open(folder.path()).unwrap();
    wrap("unet", "diffusion_pytorch_model.safetensors", "module.");
    wrap("vae", "diffusion_pytorch_model.safetensors", "first_stage_model.");
    wrap("text_encoder", "model.safetensors", "text_encoder._orig_mod.");
    let wrapped = open(folder.path()).unwrap();
    for c in Component::PIPELINE {
        assert_eq!(plain.model.keys(c), wrapped.model.keys(c));
    }
    assert!(wrapped.remarks.is_empty(), "{:?}", wrapped.remarks);

    let file = folder.path().join("checkpoint.safetensors");
    write_single_file("tiny-sd1", &file);
    let plain = Model::open(&file).unwrap();
    rename_tensors(&file, &file, |key| vec![format!("module.{key}")]);
    let wrapped = Model::open(&file).unwrap();
    for c in Component::PIPELINE {
        assert_eq!(plain.keys(c), wrapped.keys(c));
    }
}

/// Another network in a component's place, in a file and in a folder.
#[test]
fn other_networks_are_named() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file.safetensors");
    let write = |key: &str| {
        let (data, shape) = ([0; 8], vec![2]);
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &data).unwrap();
        fs::write(&file, safetensors::serialize([(key, view)], None).unwrap()).unwrap();
    };
    for (key, kind) in [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias", "a Stable Diffusion 3 model"),
        ("model.diffusion_model.double_blocks.0.img_mod.lin.bias", "a Flux model"),
        ("transformer_blocks.0.norm1.linear.bias", "a diffusion transformer"),
        ("down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
        ("control_model.input_blocks.0.0.bias", "a ControlNet"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("decoder.conv_in.bias", "a VAE alone"),
        ("module.decoder.conv_in.bias", "a VAE alone"),
        ("text_model.final_layer_norm.bias", "a CLIP or its text tower"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
        ("emb_params", "a textual inversion"),
    ] {
        write(key);
        for error in [refusal(Model::open(&file)), refusal(over_shapes(&file))] {
            assert!(error.contains(kind) && !error.contains("--unet") && !error.contains("--model"), "{key}: {error}");
        }
    }
    // Given as the model, a UNet is told where it belongs.
    for key in ["down_blocks.0.resnets.0.conv1.bias", "model.diffusion_model.input_blocks.0.0.bias"] {
        write(key);
        let error = refusal(open(&file));
        assert!(error.contains("a UNet alone") && error.contains("over one with --unet"), "{error}");
    }
    let pipeline = copy_of("tiny-sd1");
    fs::copy(weights_of(&pipeline, "vae"), weights_of(&pipeline, "unet")).unwrap();
    let error = refusal(open(pipeline.path()));
    assert!(error.contains("in the place of the unet: holds a VAE alone"), "{error}");
}

#[test]
fn tensors_that_nothing_reads_are_counted() {
    let folder = copy_of("tiny-sd1");
    let path = folder.path().join("text_encoder/model.safetensors");
    let kept = |key: &str, more: &[&str]| {
        let more = if key.ends_with("final_layer_norm.bias") { more } else { &[] };
        [&[key], more].concat().into_iter().map(str::to_string).collect::<Vec<_>>()
    };
    // Known buffers and training state say nothing.
    let harmless = ["text_model.embeddings.position_ids", "logit_scale", "ema.decay"];
    rename_tensors(&path, &path, |key| kept(key, &harmless));
    assert!(open(folder.path()).unwrap().remarks.is_empty());
    rename_tensors(&path, &path, |key| kept(key, &["vision_model.a", "vision_model.b", "vision_model.c", "extra"]));
    let remarks = open(folder.path()).unwrap().remarks;
    assert_eq!(remarks.len(), 1, "{remarks:?}");
    let words = ["4 tensor(s) that nothing reads", "'extra', 'vision_model.a' and 2 more"];
    assert!(words.iter().all(|word| remarks[0].contains(word)), "{remarks:?}");
    // Inside the tower it is another one's.
    rename_tensors(&path, &path, |key| kept(key, &["text_model.encoder.layers.0.mlp.fc3.bias"]));
    assert!(refusal(open(folder.path())).contains("mlp.fc3.bias': is read by no part of the text_encoder"));

    let file = folder.path().join("checkpoint.safetensors");
    write_single_file("tiny-sd1", &file);
    let is_last = |key: &str| key == "first_stage_model.post_quant_conv.bias";
    let with = |more: &'static str| {
        rename_tensors(&file, &file, move |key| {
            if is_last(key) { vec![key.to_string(), more.to_string()] } else { vec![key.to_string()] }
        });
        Model::open(&file).and_then(|model| {
            let config = rarebit::models::detect::pipeline_config(&model, None)?;
            rarebit::models::unread::of_pipeline(&model, &config)
        })
    };
    assert_eq!(with("first_stage_model.loss.discriminator.main.0.bias").unwrap(), None);
    let line = with("embedding_manager.embedder.weight").unwrap().unwrap();
    assert!(line.contains("1 tensor(s)") && line.contains("'embedding_manager.embedder.weight'"), "{line}");
    // Attention on the way up, as other autoencoders have it.
    let error = refusal(with("first_stage_model.decoder.up.0.attn.0.q.weight"));
    assert!(error.contains("up.0.attn.0.q.weight"), "{error}");
}

/// Published checkpoints, by the names and shapes of their tensors: all of them are read or known.
#[test]
fn published_checkpoints_leave_nothing_unread() {
    use rarebit::models::config::Prediction;
    let folder = TempDir::new().unwrap();
    for name in ["sd15", "sd21", "sdxl"] {
        let layout = fs::read(data_folder("layouts").join(format!("{name}.json"))).unwrap();
        let layout: Vec<(String, String, Vec<usize>)> = serde_json::from_slice(&layout).unwrap();
        let mut header = serde_json::Map::new();
        let mut end = 0;
        for (key, dtype, shape) in layout {
            let bytes = match dtype.as_str() {
                "F16" => 2,
                "F32" => 4,
                "I64" => 8,
                other => panic!("{other}"),
            };
            let start = end;
            end += bytes * shape.iter().product::<usize>();
            header.insert(key, serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
        }
        // Holes, which take no room.
        let path = folder.path().join(format!("{name}.safetensors"));
        let header = serde_json::to_vec(&header).unwrap();
        fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len((8 + header.len() + end) as u64).unwrap();
        let pipeline = Pipeline::open(Model::open(&path).unwrap(), Some(Prediction::Epsilon)).unwrap();
        assert!(pipeline.remarks.is_empty(), "{name}: {:?}", pipeline.remarks);
    }
}

/// The files of a UNet under other names, with or without an index.
#[test]
fn names_of_variants_and_shards() {
    const STEM: &str = "diffusion_pytorch_model";
    let open_with = |files: &[&str], index: Option<&str>| {
        let folder = copy_of("tiny-sd1");
        let whole = weights_of(&folder, "unet");
        let inside = |name: &str| whole.with_file_name(name);
        let mut map = serde_json::Map::new();
        for (n, name) in files.iter().enumerate() {
            rename_tensors(&whole, &inside(&format!("{name}.part")), |key| {
                // Names of even and of odd length.
                if files.len() == 1 || key.len() % 2 == n { vec![key.to_string()] } else { vec![] }
            });
            let bytes = fs::read(inside(&format!("{name}.part"))).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            map.extend(tensors.names().into_iter().map(|key| (key.to_string(), (*name).into())));
        }
        fs::remove_file(&whole).unwrap();
        files.iter().for_each(|name| fs::rename(inside(&format!("{name}.part")), inside(name)).unwrap());
        if let Some(index) = index {
            fs::write(inside(index), serde_json::json!({"weight_map": map}).to_string()).unwrap();
        }
        open(folder.path()).map(|pipeline| (pipeline.model.keys(Component::Unet).len(), pipeline.remarks))
    };
    let all = open(&data_folder("tiny-sd1")).unwrap().model.keys(Component::Unet).len();
    let name = |end: &str| format!("{STEM}{end}");
    for end in [".fp16.safetensors", ".bf16.safetensors", ".non_ema.safetensors"] {
        assert_eq!(open_with(&[&name(end)], None).unwrap(), (all, vec![]), "{end}");
    }
    assert_eq!(open_with(&["pytorch_model.safetensors"], None).unwrap(), (all, vec![]));
    for (first, second, index) in [
        ("-00001-of-00002.safetensors", "-00002-of-00002.safetensors", ".safetensors.index.json"),
        ("-00001-of-00002.fp16.safetensors", "-00002-of-00002.fp16.safetensors", ".safetensors.fp16.index.json"),
        (".fp16-00001-of-00002.safetensors", ".fp16-00002-of-00002.safetensors", ".safetensors.index.fp16.json"),
        (".fp16-00001-of-00002.safetensors", ".fp16-00002-of-00002.safetensors", ".fp16.safetensors.index.json"),
    ] {
        let files = [name(first), name(second)];
        let files = [files[0].as_str(), files[1].as_str()];
        assert_eq!(open_with(&files, Some(&name(index))).unwrap(), (all, vec![]), "{index}");
        assert!(refusal(open_with(&files, None)).contains("there is no index"), "{first}");
    }
    let remarks = open_with(&[&name(".fp16.safetensors"), &name(".non_ema.safetensors")], None).err().is_some();
    assert!(remarks, "half of the tensors are in the other file");
    assert!(refusal(open_with(&["other.safetensors"], None)).contains("call it diffusion_pytorch_model.safetensors"));
}

#[test]
fn a_choice_of_variants_is_said() {
    let folder = copy_of("tiny-sd1");
    let whole = weights_of(&folder, "unet");
    fs::copy(&whole, whole.with_file_name("diffusion_pytorch_model.fp16.safetensors")).unwrap();
    let remarks = open(folder.path()).unwrap().remarks;
    assert_eq!(remarks.len(), 1, "{remarks:?}");
    let said = "diffusion_pytorch_model.safetensors: used, and not diffusion_pytorch_model.fp16.safetensors beside it";
    assert!(remarks[0].ends_with(said), "{remarks:?}");
}

/// The cache of the hub, and folders one level too high or too low.
#[cfg(unix)]
#[test]
fn folders_around_a_model() {
    let outer = TempDir::new().unwrap();
    let cache = outer.path().join("models--org--name");
    let version = |name: &str| {
        let to = cache.join("snapshots").join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(data_folder("tiny-sd1"), &to).unwrap();
    };
    fs::create_dir_all(cache.join("snapshots")).unwrap();
    assert!(refusal(Model::open(&cache)).contains("without a version"));
    version("0a1b");
    assert!(open(&cache).is_ok());
    version("2c3d");
    let error = refusal(Model::open(&cache));
    assert!(error.contains("holds several versions; give one: ") && error.contains("snapshots/2c3d"), "{error}");
    fs::create_dir_all(cache.join("refs")).unwrap();
    fs::write(cache.join("refs/main"), "2c3d\n").unwrap();
    assert!(Model::open(&cache).unwrap().path().ends_with("snapshots/2c3d"));
    for lost in ["4e5f", "../snapshots/0a1b", "", "\u{1b}[31m"] {
        fs::write(cache.join("refs/main"), lost).unwrap();
        assert!(refusal(Model::open(&cache)).contains("not in snapshots/"));
    }
    // The folder around it, a component's own, and one with a single file.
    let error = refusal(Model::open(outer.path()));
    assert!(error.contains("there is a model inside; give ") && error.contains("models--org--name"), "{error}");
    let error = refusal(Model::open(&data_folder("tiny-sd1").join("unet")));
    assert!(error.contains("a UNet's folder") && error.contains("--unet"), "{error}");
    let error = refusal(Model::open(&data_folder("tiny-sd1").join("vae")));
    assert!(error.contains("is for AutoencoderKL alone"), "{error}");
    let single = TempDir::new().unwrap();
    fs::write(single.path().join("checkpoint.safetensors"), "").unwrap();
    let error = refusal(Model::open(single.path()));
    assert!(error.contains("given as that file: ") && error.contains("checkpoint.safetensors"), "{error}");
    // An unfinished download: the link is there, the blob is not.
    let folder = copy_of("tiny-sd1");
    let unet = weights_of(&folder, "unet");
    fs::remove_file(&unet).unwrap();
    std::os::unix::fs::symlink("../../../blobs/0123", &unet).unwrap();
    assert!(refusal(Model::open(folder.path())).contains("diffusion_pytorch_model.safetensors"));
    let config = folder.path().join("scheduler/scheduler_config.json");
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink("../../../blobs/4567", &config).unwrap();
    assert!(refusal(Model::open(folder.path())).contains("scheduler_config.json: is a link to"));
}

#[test]
fn contradictions_between_files_are_said() {
    let folder = copy_of("tiny-sdxl");
    let edit = |name: &str, field: &str, value: serde_json::Value| {
        let path = folder.path().join(name);
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        json[field] = value;
        fs::write(path, json.to_string()).unwrap();
    };
    edit("model_index.json", "scheduler", serde_json::json!(["diffusers", "DDIMScheduler"]));
    let remarks = open(folder.path()).unwrap().remarks;
    assert_eq!(remarks.len(), 1, "{remarks:?}");
    let words =
        ["model_index.json says scheduler is a DDIMScheduler", "says EulerDiscreteScheduler, which is followed"];
    assert!(words.iter().all(|word| remarks[0].contains(word)), "{remarks:?}");
    // CLIP's own vocabulary is larger than the tower's table.
    fs::remove_dir_all(folder.path().join("tokenizer_2")).unwrap();
    assert!(refusal(open(folder.path())).contains("tokenizer_2: has 49408 tokens"));
    // Python's numbers where JSON has none.
    let folder = copy_of("tiny-sd1");
    let path = folder.path().join("scheduler/scheduler_config.json");
    let json = fs::read_to_string(&path).unwrap();
    let json = json.replacen('{', "{\"lambda_min_clipped\": -Infinity, \"sigma_max\": null, \"x\": NaN,", 1);
    fs::write(&path, json).unwrap();
    assert!(open(folder.path()).is_ok());
    let beta = fs::read_to_string(&path).unwrap().replace("0.00085", "Infinity");
    fs::write(&path, beta).unwrap();
    assert!(refusal(open(folder.path())).contains("beta_start is \"Infinity\", needed a number"));
}
