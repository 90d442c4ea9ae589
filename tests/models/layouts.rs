//! The single-file form of a pipeline gives the same bits as its folder.

use crate::common::golden::Golden;
use rarebit::exec::cpu::Cpu;
use rarebit::models::config::Prediction;
use rarebit::models::detect;
use rarebit::pipeline::Pipeline;
use rarebit::weights::{Component, Model};

fn single_file(name: &str) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("{name}.safetensors"));
    crate::common::layouts::write_single_file(name, &path);
    // The opened file outlives the folder.
    Model::open(&path).unwrap()
}

#[test]
fn single_file_and_folder_give_identical_images() {
    for name in ["tiny-sd1", "tiny-sd2", "tiny-sdxl"] {
        let golden = Golden::open(name);
        let folder = golden.pipeline();
        let file = single_file(name);
        assert!(file.is_single_file());
        let prediction = if name == "tiny-sd2" { Some(Prediction::V) } else { None };
        let config = detect::pipeline_config(&file, prediction).unwrap();
        for component in Component::ALL {
            assert_eq!(file.parameters(component) > 0, folder.model.parameters(component) > 0, "{name} {component:?}");
        }
        assert_eq!(config.text, folder.config.text, "{name}");
        assert_eq!(config.unet.channels, folder.config.unet.channels, "{name}");
        assert_eq!(config.scheduler.prediction, folder.config.scheduler.prediction, "{name}");
        assert_eq!(config.vae.force_upcast, name == "tiny-sdxl", "a file does not say, SDXL's needs it");

        // A single file brings no tokenizer, and CLIP's own is too large for a tiny text tower: the folder's are used.
        let tokenizers = golden.pipeline().tokenizers;
        let file = Pipeline { model: file, config, tokenizers, learned: vec![], remarks: vec![] };
        let case = golden.cases("sample/ddim-leading").next().unwrap();
        let from_folder = golden.sample(&folder, &case, Cpu::<f32>::new());
        let from_file = golden.sample(&file, &case, Cpu::<f32>::new());
        assert_eq!(from_folder.latents, from_file.latents, "{name}");
        assert_eq!(from_folder.rgb, from_file.rgb, "{name}");
    }
}

#[test]
fn ambiguous_prediction_asks_for_a_flag() {
    let error = detect::pipeline_config(&single_file("tiny-sd2"), None).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("--prediction"), "{error}");
}

#[test]
fn a_vocabulary_larger_than_the_embedding_is_refused() {
    let error = Pipeline::open(single_file("tiny-sd1"), None).err().unwrap().to_string();
    assert!(error.contains("49408") && error.contains("819"), "{error}");
}

/// What a UNet file says of itself counts, whatever the base model's scheduler config says of the UNet it replaces.
#[test]
fn a_unet_file_says_what_it_predicts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.safetensors");
    let bytes = crate::common::layouts::reversed_unet("tiny-sdxl");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let said = std::collections::HashMap::from([("modelspec.predict_key".to_string(), "v".to_string())]);
    std::fs::write(&path, safetensors::serialize(file.tensors(), Some(said)).unwrap()).unwrap();
    let base = crate::common::golden::data_folder("tiny-sdxl");
    let predicts = |model: &Model, flag| detect::pipeline_config(model, flag).unwrap().scheduler.prediction;
    assert_eq!(predicts(&Model::open(&base).unwrap(), None), Prediction::Epsilon);
    let mut replaced = Model::open(&base).unwrap();
    replaced.replace_unet(&path).unwrap();
    assert_eq!(predicts(&replaced, None), Prediction::V);
    assert_eq!(predicts(&replaced, Some(Prediction::Epsilon)), Prediction::Epsilon);
}
