//! The promise: what a model is made of is known by its whole content, and a file that changes while it is read is an error, never
//! wrong weights or the end of the process.

use crate::common::golden::{copied, data_folder};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::networks::Networks;
use rarebit::program::DType;
use rarebit::weights::Model;
use std::fs;
use std::path::Path;
use std::time::Duration;

fn fingerprint(folder: &Path) -> String {
    Model::open(folder).unwrap().fingerprint().unwrap()
}

#[test]
fn fingerprints_are_of_content_and_not_of_places() {
    let (first, second) = (copied("tiny-sd1"), copied("tiny-sd1"));
    let found = fingerprint(first.path());
    assert!(found.len() == 16 && found.chars().all(|c| c.is_ascii_hexdigit()), "{found}");
    assert_eq!(fingerprint(second.path()), found);
    assert_ne!(fingerprint(&data_folder("tiny-sd2")), found);
    // How a configuration is laid out, and what makes no image.
    let index = second.path().join("model_index.json");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    fs::write(&index, json.to_string()).unwrap();
    fs::create_dir(second.path().join("clip")).unwrap();
    fs::copy(data_folder("tiny-clip-l").join("clip/clip.safetensors"), second.path().join("clip/model.safetensors"))
        .unwrap();
    fs::write(second.path().join("recommended.json"), "{}").unwrap();
    fs::write(second.path().join("README.md"), "a model").unwrap();
    assert_eq!(fingerprint(second.path()), found);
}

#[test]
fn every_byte_of_the_weights_makes_another_model() {
    let folder = copied("tiny-sd1");
    let found = fingerprint(folder.path());
    for component in ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"] {
        let path = folder.path().join(format!("{component}.safetensors"));
        let whole = fs::read(&path).unwrap();
        let data = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
        let middle = (data + whole.len()) / 2;
        // First, last, and bytes between 64 evenly spread pages.
        for at in [data, middle, middle + 5000, middle + 70_000, whole.len() - 1] {
            let mut changed = whole.clone();
            let at = at.min(whole.len() - 1);
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            assert_ne!(fingerprint(folder.path()), found, "{component}: byte {at}");
        }
        fs::write(&path, whole).unwrap();
    }
    assert_eq!(fingerprint(folder.path()), found);
}

#[test]
fn configurations_and_tokenizers_make_other_models() {
    let folder = copied("tiny-sd1");
    let mut seen = vec![fingerprint(folder.path())];
    let mut changes = |name: &str, change: &dyn Fn(&str) -> String| {
        let path = folder.path().join(name);
        let text = fs::read_to_string(&path).unwrap_or_default();
        fs::write(&path, change(&text)).unwrap();
        let found = fingerprint(folder.path());
        assert!(!seen.contains(&found), "{name}");
        seen.push(found);
    };
    let entry = |text: &str| text.replacen('{', "{\"another\": 1, ", 1);
    let configs = ["model_index", "scheduler/scheduler_config", "text_encoder/config", "unet/config", "vae/config"];
    configs.iter().for_each(|name| changes(&format!("{name}.json"), &entry));
    changes("tokenizer/tokenizer_config.json", &|text| text.replace("<|endoftext|>", "!"));
    changes("tokenizer/special_tokens_map.json", &|text| text.replace("<|endoftext|>", "!"));
    changes("tokenizer/merges.txt", &|text| text.lines().take(9).map(|line| format!("{line}\n")).collect());
    changes("tokenizer/vocab.json", &|text| text.replace("<|startoftext|>", "<|start|>"));
    changes("tokenizer/added_tokens.json", &|_| "{}".into());
}

#[test]
fn a_fingerprint_is_of_what_was_read_whatever_becomes_of_the_files() {
    let folder = copied("tiny-sd1");
    let model = Model::open(folder.path()).unwrap();
    let found = model.fingerprint().unwrap();
    for name in ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    fs::write(folder.path().join("unet/config.json"), "{}").unwrap();
    assert_eq!(model.fingerprint().unwrap(), found);
    drop(folder);
    assert_eq!(model.fingerprint().unwrap(), found);
}

/// Of another UNet over the same model.
#[test]
fn another_unet_makes_another_fingerprint() {
    let (folder, other) = (copied("tiny-sd1"), copied("tiny-sd1"));
    let mut model = Model::open(folder.path()).unwrap();
    let found = model.fingerprint().unwrap();
    let unet = other.path().join("unet/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&unet).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&unet, bytes).unwrap();
    model.replace_unet(&other.path().join("unet")).unwrap();
    assert_ne!(model.fingerprint().unwrap(), found);
}

fn load_fails(change: impl Fn(&Path), executor: &mut dyn Executor, dtype: DType, words: &str) {
    let folder = copied("tiny-sd1");
    let pipeline = Pipeline::open(Model::open(folder.path()).unwrap(), None).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    change(&folder.path().join("unet/diffusion_pytorch_model.safetensors"));
    let error = Networks::new(&pipeline, executor, dtype)
        .load_unet([1, 4, 8, 8], pipeline.config.unet.context_width, false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("unet/diffusion_pytorch_model.safetensors: ") && error.contains(words), "{error}");
    let error = pipeline.model.fingerprint().unwrap_err().to_string();
    assert!(error.contains(words), "{error}");
}

#[test]
fn files_that_change_while_weights_load_are_an_error() {
    let cut = |path: &Path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(20_000).unwrap();
    let emptied = |path: &Path| fs::write(path, "").unwrap();
    let rewritten = |path: &Path| fs::write(path, fs::read(path).unwrap()).unwrap();
    load_fails(cut, &mut Cpu::<f32>::new(), DType::F32, "was cut off while it was read");
    load_fails(emptied, &mut Cpu::<f64>::new(), DType::F64, "was cut off while it was read");
    load_fails(rewritten, &mut Cpu::<f32>::new(), DType::F32, "changed while it was read");
}
