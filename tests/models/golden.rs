//! The tiny pipelines of `tests/data` against what diffusers computed with them (`tools/reference/dump.py`).

use crate::common::golden::{Case, Golden, relative_error};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::networks::{AddedConditions, Networks, Tensor};
use rarebit::program::DType;
use rarebit::weights::Model;

const MODELS: [&str; 3] = ["tiny-sd1", "tiny-sd2", "tiny-sdxl"];
const LIMIT: f64 = 2e-5;

fn cpu() -> Box<dyn Executor> {
    Box::new(Cpu::<f32>::new())
}

/// The added conditions of a UNet case, where the model has them.
fn added(golden: &Golden, rows: usize) -> Option<AddedConditions> {
    let rows_of = |name: &str| golden.tensor(name).map(|t| t.data[..t.data.len() / t.shape[0] * rows].to_vec());
    Some(AddedConditions { pooled: rows_of("unet/pooled")?, size_ids: rows_of("unet/time_ids")? })
}

#[test]
fn tokens_and_text_states() {
    for name in MODELS {
        let golden = Golden::open(name);
        let pipeline = golden.pipeline();
        let mut cpu = cpu();
        let mut networks = Networks::new(&pipeline, &mut *cpu, DType::F32);
        let mut states = 0;
        for case in golden.cases("ids/") {
            let prompt = case.text("text");
            let encoded = pipeline.tokenize(&prompt).unwrap();
            for (tower, tokens) in encoded.iter().enumerate() {
                let stored = golden.ints(&case.name.replace("ids/", ["ids/", "ids_2/"][tower]));
                assert_eq!(tokens.ids, stored, "{name} {}", case.name);
            }
            let context = case.name.replace("ids/", "context/");
            let Some(expected) = golden.tensor(&context) else { continue };
            let ids: Vec<&[i32]> = encoded.iter().map(|tokens| &tokens.ids[..]).collect();
            let (got, pooled) = networks.text(&ids, encoded.last().unwrap().eos).unwrap();
            let error = relative_error(&got, &expected.data);
            println!("{name:10} {context:20} {error:.2e}");
            assert!(error <= LIMIT, "{name} {context}: {error:e}");
            if let Some(pooled) = pooled {
                let expected = golden.tensor(&case.name.replace("ids/", "pooled/")).unwrap();
                assert!(relative_error(&pooled, &expected.data) <= LIMIT, "{name} pooled");
            }
            states += 1;
        }
        assert!(states >= 3, "{name}: {states} text states compared");
    }
}

#[test]
fn unet_predictions() {
    for name in MODELS {
        let golden = Golden::open(name);
        let pipeline = golden.pipeline();
        let mut cpu = cpu();
        let mut networks = Networks::new(&pipeline, &mut *cpu, DType::F32);
        let mut compared = 0;
        for case in golden.cases("unet").filter(|case| case.name.contains("/out_t") && !case.name.ends_with("_f64")) {
            let latents = golden.tensor(&format!("{}/latents", case.name.split('/').next().unwrap())).unwrap();
            let context = golden.tensor("unet/context").unwrap();
            let rows = latents.shape[0];
            let context = &context.data[..context.data.len() / context.shape[0] * rows];
            let got = networks.unet(&latents, case.number("timestep"), context, added(&golden, rows).as_ref()).unwrap();
            let expected = golden.tensor(&case.name).unwrap();
            assert_eq!(got.shape, expected.shape);
            let error = relative_error(&got.data, &expected.data);
            println!("{name:10} {:20} {error:.2e}", case.name);
            assert!(error <= LIMIT, "{name} {}: {error:e}", case.name);
            compared += 1;
        }
        assert!(compared >= 4, "{name}: {compared} predictions compared");
    }
}

/// The oracle: the same program in f64 against diffusers in f64.
#[test]
fn unet_in_f64() {
    for name in MODELS {
        let golden = Golden::open(name);
        let pipeline = golden.pipeline();
        let mut cpu = Cpu::<f64>::new();
        let mut networks = Networks::new(&pipeline, &mut cpu, DType::F64);
        let latents = golden.tensor("unet/latents").unwrap();
        let context = golden.tensor("unet/context").unwrap();
        let got = networks.unet(&latents, 999.0, &context.data, added(&golden, latents.shape[0]).as_ref()).unwrap();
        let expected = golden.doubles("unet/out_t999_f64");
        // What is left is the rounding of the output to f32 and of diffusers' time embedding, which is f32 in any case.
        let error = relative_error(&got.data, &expected);
        println!("{name:10} {error:.2e}");
        assert!(error <= 2e-6, "{name}: {error:e}");
    }
}

#[test]
fn vae_both_ways() {
    for name in MODELS {
        let golden = Golden::open(name);
        let pipeline = golden.pipeline();
        let mut cpu = cpu();
        let mut networks = Networks::new(&pipeline, &mut *cpu, DType::F32);
        for size in ["vae", "vae_wide"] {
            let tensor = |field: &str| golden.tensor(&format!("{size}/{field}")).unwrap();
            let image = networks.decode(&tensor("latents")).unwrap();
            let (mean, logvar) = networks.encode(&tensor("input")).unwrap();
            for (field, got) in [("image", image), ("mean", mean), ("logvar", logvar)] {
                let expected: Tensor = tensor(field);
                assert_eq!(got.shape, expected.shape);
                let error = relative_error(&got.data, &expected.data);
                println!("{name:10} {size}/{field:10} {error:.2e}");
                assert!(error <= LIMIT, "{name} {size}/{field}: {error:e}");
            }
        }
    }
}

/// Compares every stored run whose UNet is the pipeline's own; returns how many there were.
fn compare_runs(name: &str, golden: &Golden, pipeline: &Pipeline) -> usize {
    let cases = golden.cases("sample/").filter(|case| case.has("sampler") && !case.has("unet"));
    cases.map(|case| compare_run(name, golden, pipeline, &case)).count()
}

fn compare_run(name: &str, golden: &Golden, pipeline: &Pipeline, case: &Case) {
    let expected = golden.tensor(&case.name).unwrap();
    let error = relative_error(&golden.sample(pipeline, case, Cpu::<f32>::new()).latents, &expected.data);
    println!("{name:10} {:32} {error:.2e}", case.name);
    assert!(error <= 1e-3, "{name} {}: {error:e}", case.name);
}

#[test]
fn every_sampler_and_spacing() {
    for name in MODELS {
        let golden = Golden::open(name);
        let compared = compare_runs(name, &golden, &golden.pipeline());
        assert!(compared >= 21, "{name}: {compared} runs compared");
    }
}

/// Whole runs with the arena poisoned and checked after every op: no op writes outside its regions or reads what is dead.
#[test]
fn guarded_runs_give_the_same_bits() {
    for name in MODELS {
        let golden = Golden::open(name);
        let pipeline = golden.pipeline();
        for case in golden.cases("sample/").filter(|case| case.name.ends_with("-leading")) {
            let plain = golden.sample(&pipeline, &case, Cpu::<f32>::new());
            let guarded = golden.sample(&pipeline, &case, Cpu::<f32>::new().with_guards(true));
            assert_eq!(plain.latents, guarded.latents, "{name} {}", case.name);
            assert_eq!(plain.rgb, guarded.rgb, "{name} {}", case.name);
        }
    }
}

/// The embedded model: runs, and the image of one of them.
#[test]
fn embedded_model() {
    let golden = Golden::open("shapes");
    let pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    assert!(compare_runs("shapes", &golden, &pipeline) >= 21);
    let case = golden.cases("sample/ddim-10").next().unwrap();
    let image = golden.sample(&pipeline, &case, Cpu::<f32>::new());
    let expected = golden.tensor("sample/ddim-10-image").unwrap();
    // The stored image is [-1, 1], channels first; ours has gone through 8 bits.
    let pixels = image.width * image.height;
    let ours: Vec<f32> =
        (0..3 * pixels).map(|i| f32::from(image.rgb[i % pixels * 3 + i / pixels]) / 127.5 - 1.0).collect();
    let worst = ours.iter().zip(&expected.data).map(|(a, b)| (a - b.clamp(-1.0, 1.0)).abs()).fold(0.0, f32::max);
    assert!(worst <= 1.2 / 255.0, "pixels differ by {worst}");
}

/// `--unet FILE` as SDXL-Lightning ships: another UNet over the base model, few Euler steps, trailing, no guidance.
#[test]
fn unet_over_a_base_model() {
    let golden = Golden::open("tiny-sdxl");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("unet.safetensors");
    std::fs::write(&file, crate::common::layouts::reversed_unet("tiny-sdxl")).unwrap();
    let mut model = Model::open(&crate::common::golden::data_folder("tiny-sdxl")).unwrap();
    model.replace_unet(&file).unwrap();
    let pipeline = Pipeline::open(model, None).unwrap();
    let case = golden.cases("sample/lightning").next().unwrap();
    compare_run("tiny-sdxl", &golden, &pipeline, &case);
}
