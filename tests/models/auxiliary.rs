//! CLIP pairs, heads and GPT-2 against transformers (`tools/reference/dump_models.py`): what they compute, and how they are found.

use crate::common::auxiliary::{Buffers, Clip, Gradient, Policy, channels_last, gradients, run, value};
use crate::common::golden::{Case, data_folder, relative_error};
use crate::common::inputs::noise;
use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::metrics::shapes::World;
use rarebit::models::clip_text::ClipText;
use rarebit::models::{Weights, clip_image, detect, gpt2, heads};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::networks::Tensor;
use rarebit::plan::plan;
use rarebit::program::{Activation, Builder, DType, Program};
use rarebit::weights::{Component, Model};
use safetensors::SafeTensors;
use std::collections::BTreeMap;

const LIMIT: f64 = 2e-5;
/// The golden files are computed in f64: only a number between two of f32 may be rounded to the other one.
const LIMIT_F64: f64 = 1e-8;

fn check(what: &str, got: &[f32], expected: &[f32], limit: f64) {
    let error = relative_error(got, expected);
    println!("{what:44} {error:.2e}");
    assert!(error <= limit, "{what}: {error:e}");
}

/// Every stored output of the image tower and its heads.
fn images<T: Real>(mut clip: Clip, name: &str, limit: f64) -> usize {
    let mut compared = 0;
    let forward = |case: &Case| case.has("preset") && case.name.contains('/') && !case.has("of");
    let cases: Vec<Case> = clip.golden.cases("").filter(forward).collect();
    for case in cases {
        let pixels = clip.golden.tensor(&case.text("pixels")).unwrap();
        let head = case.has("head").then(|| clip.head(&case.text("head")));
        let program = clip.image(T::DTYPE, &case.text("preset"), &pixels, head.as_ref());
        let floats = [("pixels".to_string(), channels_last(&pixels))].into();
        let outputs = run::<T>(&program, &clip.model, &Buffers { floats, ..Buffers::default() });
        let expected = clip.golden.tensor(&case.name).unwrap();
        let what = case.name.split('/').next_back().unwrap().split('-').next().unwrap();
        let (got, expected) = match what {
            // Only the first image is stored.
            "input" => (&outputs["input"][..expected.data.len()], channels_last(&expected)),
            "features" | "unit" => (&outputs[what][..], expected.data),
            _ => (&outputs["score"][..], expected.data),
        };
        check(&format!("{name} {}", case.name), got, &expected, limit);
        compared += 1;
    }
    compared
}

#[test]
fn image_towers_and_heads() {
    assert_eq!(images::<f32>(Clip::l(), "l", LIMIT), 15);
    assert_eq!(images::<f32>(Clip::h(), "h", LIMIT), 7);
}

#[test]
fn image_towers_in_f64() {
    images::<f64>(Clip::l(), "l", LIMIT_F64);
    images::<f64>(Clip::h(), "h", LIMIT_F64);
}

#[test]
fn text_features_and_logits() {
    for clip in [Clip::l(), Clip::h()] {
        let text = clip.text(DType::F32, 2);
        let texts = run::<f32>(&text, &clip.model, &clip.text_buffers());
        for name in ["embeddings", "features"] {
            check(name, &texts[name], &clip.golden.tensor(&format!("text/{name}")).unwrap().data, LIMIT);
        }
        let case = clip.golden.cases("logits").next().unwrap();
        let pixels = clip.golden.tensor(&case.text("pixels")).unwrap();
        let image = clip.image(DType::F32, "clip", &pixels, None);
        let floats = [("pixels".to_string(), channels_last(&pixels))].into();
        let images = run::<f32>(&image, &clip.model, &Buffers { floats, ..Buffers::default() });
        let scale = clip.config.logit_scale.unwrap().exp() as f32;
        let width = clip.config.image.projection;
        let cosine = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let rows = images["unit"].chunks(width).flat_map(|a| texts["unit"].chunks(width).map(move |b| (a, b)));
        let logits: Vec<f32> = rows.map(|(a, b)| scale * cosine(a, b)).collect();
        check("logits", &logits, &clip.golden.tensor("logits").unwrap().data, LIMIT);
    }
}

fn policy<T: Real>(weights: Weights, limit: f64) {
    let policy = Policy::tiny();
    let program = policy.program(T::DTYPE, weights);
    let outputs = run::<T>(&program, &policy.model, &policy.buffers(weights));
    for name in ["hidden", "logits", "log_probabilities"] {
        check(&format!("{weights:?} {name}"), &outputs[name], &policy.golden.tensor(name).unwrap().data, limit);
    }
    let loss = outputs["loss"].iter().sum::<f32>();
    check("loss", &[loss], &policy.golden.tensor("loss").unwrap().data, LIMIT);
}

#[test]
fn gpt2_frozen() {
    policy::<f32>(Weights::Frozen, LIMIT);
    policy::<f64>(Weights::Frozen, LIMIT_F64);
}

/// Every weight of a trainable network is a buffer, each once, the tied table too.
#[test]
fn gpt2_trainable() {
    policy::<f32>(Weights::Trainable, LIMIT);
    policy::<f64>(Weights::Trainable, LIMIT_F64);
    let policy = Policy::tiny();
    let program = policy.program(DType::F32, Weights::Trainable);
    assert_eq!(program.weights().count(), 0);
    let parameters = gpt2::parameters(&policy.config).unwrap();
    assert_eq!(program.inputs.len(), 3 + parameters.len());
    let elements: usize = parameters.iter().map(|weight| weight.shape.iter().product::<usize>()).sum();
    assert_eq!(elements, policy.model.parameters(Component::Policy));
}

/// The gradients of ⟨`of`, cotangent⟩ (a buffer `cotangent`, or ones) to some values, as outputs of their names.
fn differentiated(program: &Program, of: &str, with_cotangent: bool, to: &[&str]) -> Program {
    let cotangent = if with_cotangent { Cotangent::Input("cotangent".into()) } else { Cotangent::Ones };
    let leaves = to.iter().map(|name| (value(program, name), format!("d {name}"))).collect();
    let request = Request { objectives: vec![(value(program, of), cotangent)], leaves };
    let mut gradient = differentiate(program, &request, None).unwrap();
    gradient.outputs.retain(|(name, _)| name.starts_with("d "));
    gradient
}

/// Compares stored gradients of one program, which share objective and cotangent.
fn compare<T: Real>(program: &Program, model: &Model, buffers: &Buffers, stored: &[Gradient], limit: f64) {
    let to: Vec<&str> = stored.iter().map(|gradient| gradient.to.as_str()).collect();
    let program = differentiated(program, &stored[0].of, stored[0].cotangent.is_some(), &to);
    let mut buffers = buffers.clone();
    buffers.floats.extend(stored[0].cotangent.iter().map(|values| ("cotangent".to_string(), values.clone())));
    let found = run::<T>(&program, model, &buffers);
    for gradient in stored {
        check(&gradient.case.name, &found[&format!("d {}", gradient.to)], &gradient.expected, limit);
    }
}

fn image_gradients<T: Real>(mut clip: Clip, limit: f64) -> usize {
    let stored = gradients(&clip.golden, "").into_iter().filter(|gradient| gradient.to == "pixels");
    let mut compared = 0;
    for gradient in stored {
        let pixels = clip.golden.tensor(&gradient.case.text("pixels")).unwrap();
        let head = (gradient.of == "score").then(|| clip.head(&gradient.case.text("of")));
        let program = clip.image(T::DTYPE, &gradient.case.text("preset"), &pixels, head.as_ref());
        let floats = [("pixels".to_string(), channels_last(&pixels))].into();
        compare::<T>(&program, &clip.model, &Buffers { floats, ..Buffers::default() }, &[gradient], limit);
        compared += 1;
    }
    compared
}

#[test]
fn gradients_of_image_towers() {
    assert_eq!(image_gradients::<f32>(Clip::l(), LIMIT), 12);
    assert_eq!(image_gradients::<f32>(Clip::h(), LIMIT), 4);
    image_gradients::<f64>(Clip::l(), LIMIT_F64);
    image_gradients::<f64>(Clip::h(), LIMIT_F64);
}

#[test]
fn gradients_of_text_towers() {
    for clip in [Clip::l(), Clip::h()] {
        let stored = gradients(&clip.golden, "text/");
        compare::<f32>(&clip.text(DType::F32, 2), &clip.model, &clip.text_buffers(), &stored, LIMIT);
        compare::<f64>(&clip.text(DType::F64, 2), &clip.model, &clip.text_buffers(), &stored, LIMIT_F64);
    }
}

fn policy_gradients<T: Real>(weights: Weights, limit: f64) -> usize {
    let policy = Policy::tiny();
    let mut stored = gradients(&policy.golden, "");
    stored.retain(|gradient| weights == Weights::Trainable || gradient.to == "embeddings");
    let program = policy.program(T::DTYPE, weights);
    compare::<T>(&program, &policy.model, &policy.buffers(weights), &stored, limit);
    stored.len()
}

/// To all weights (the tied table's two uses together) and to the embeddings.
#[test]
fn gradients_of_gpt2() {
    let parameters = gpt2::parameters(&Policy::tiny().config).unwrap().len();
    assert_eq!(policy_gradients::<f32>(Weights::Trainable, LIMIT), parameters + 1);
    policy_gradients::<f64>(Weights::Trainable, LIMIT_F64);
    assert_eq!(policy_gradients::<f32>(Weights::Frozen, LIMIT), 1);
}

#[test]
fn what_files_say_is_found() {
    let clip = Clip::l();
    assert_eq!((clip.config.image.heads, clip.config.image.patch_size), (3, 8));
    assert_eq!(clip.config.preprocess.std, [0.5, 0.25, 0.5]);
    assert_eq!(clip.config.logit_scale, Some(2.625));
    // One file serves the pair and the pipeline.
    assert!(clip.model.has(Component::TextEncoder));
    assert_eq!(clip.model.files().count(), 3);

    let h = Clip::h();
    assert_eq!((h.config.image.activation, h.config.image.heads), (Activation::Gelu, 2));
    // A file named as transformers names it brings the configuration beside it; under another name it has none.
    let file = data_folder("tiny-clip-h").join("model.safetensors");
    let model = Model::network(Component::Clip, &file).unwrap();
    assert_eq!(detect::clip_config(&model, Component::Clip).unwrap(), h.config);
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("clip_vision_h.safetensors");
    std::fs::copy(&file, &bare).unwrap();
    let bare = detect::clip_config(&Model::network(Component::Clip, &bare).unwrap(), Component::Clip).unwrap();
    assert_eq!((bare.image.heads, bare.image.activation), (1, Activation::QuickGelu));
    assert_eq!(bare.text.unwrap().activation, Activation::QuickGelu);

    let mut clip = clip;
    assert!(clip.head("aesthetic").relu);
    let laion = clip.head("laion");
    let keys: Vec<usize> = laion.layers.iter().map(|layer| layer.key).collect();
    assert_eq!((laion.relu, laion.input, keys), (false, 32, vec![0, 2, 4, 6, 7]));
}

#[test]
fn wrong_networks_are_refused() {
    let policy = Model::network(Component::Policy, &data_folder("tiny-clip-h")).unwrap();
    let error = detect::policy_config(&policy).unwrap_err().to_string();
    assert!(error.contains("transformer.wte.weight") && error.contains("prompt_policy"), "{error}");
    let error = Model::network(Component::Aesthetic, &data_folder("tiny-gpt2")).err().unwrap().to_string();
    assert!(error.contains("in the place of the aesthetic: holds a GPT-2"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (data_folder("tiny-gpt2"), folder.path());
    std::fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
    let refused = |config: &str, why: &str| {
        std::fs::write(to.join("config.json"), config).unwrap();
        let error = detect::policy_config(&Model::network(Component::Policy, to).unwrap()).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("config.json"), "{error}");
    };
    refused(r#"{"model_type": "gpt_neo"}"#, "model_type");
    refused(r#"{"activation_function": "relu"}"#, "activation_function");
    refused(r#"{"vocab_size": 62, "n_embd": 32, "n_head": 4}"#, "vocab_size is 62");
    refused(r#"{"vocab_size": 61, "n_embd": 32, "n_head": 5}"#, "does not divide");
}

/// The embedded pair finds the scenes that captions describe, and its head gives the world's aesthetic of them.
#[test]
fn embedded_clip_and_aesthetic() {
    let bytes = std::fs::read(data_folder("shapes").join("reader.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let (scenes, cells) = (golden.tensor("scenes").unwrap(), golden.tensor("cells").unwrap());
    let world = World::embedded().unwrap();
    let values: Vec<i64> = cells.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let cells: Vec<Vec<usize>> =
        values.chunks(world.attributes.len()).map(|cell| cell.iter().map(|v| *v as usize).collect()).collect();

    let pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    let clip = detect::clip_config(&pipeline.model, Component::Clip).unwrap();
    let head = detect::head_config(&pipeline.model).unwrap();
    assert_eq!(detect::policy_config(&pipeline.model).unwrap().vocab_size, clip.text.as_ref().unwrap().vocab_size);
    let n = cells.len();
    let mut b = Builder::new("image", DType::F32);
    let pixels = b.input("pixels", scenes.shape());
    let image = clip.preprocess.append(&mut b, pixels);
    let features = clip_image::features(&mut b, &clip.image, Component::Clip, image);
    let unit = clip_image::unit(&mut b, features);
    let score = heads::aesthetic(&mut b, &head, unit);
    b.output("unit", unit);
    b.output("score", score);
    let pixels = scenes.data().iter().map(|x| f32::from(*x) / 127.5 - 1.0).collect();
    let floats = [("pixels".to_string(), pixels)].into();
    let images = run::<f32>(&b.finish().unwrap(), &pipeline.model, &Buffers { floats, ..Buffers::default() });

    let said = ["colour", "shape", "bg"].map(|name| world.attributes.iter().position(|a| a.name == name).unwrap());
    let stated = |cell: &Vec<usize>| said.map(|i| cell[i]);
    let (mut ids, mut ends) = (vec![], vec![]);
    for cell in &cells {
        let [colour, shape, ground] = said.map(|i| &world.attributes[i].values[cell[i]]);
        let tokens = pipeline.tokenize(&format!("a {colour} {shape} on a {ground} background")).unwrap().remove(0);
        ids.extend(tokens.ids);
        ends.push(tokens.eos as i32);
    }
    let mut b = Builder::new("text", DType::F32);
    let (id_buffer, end_buffer) = (b.input_i32("ids", &[n, ids.len() / n]), b.input_i32("ends", &[n]));
    let mut tower = ClipText::new(&mut b, clip.text.as_ref().unwrap(), Component::Clip);
    let x = tower.embed(id_buffer);
    let features = tower.features(x, end_buffer);
    let unit = clip_image::unit(&mut b, features);
    b.output("unit", unit);
    let ints = [("ids".to_string(), ids), ("ends".to_string(), ends)].into();
    let texts = run::<f32>(&b.finish().unwrap(), &pipeline.model, &Buffers { ints, ..Buffers::default() });

    let width = clip.image.projection;
    let cosine = |text: &[f32], image: &[f32]| text.iter().zip(image).map(|(a, b)| a * b).sum::<f32>();
    let found = texts["unit"].chunks(width).zip(&cells).filter(|(text, cell)| {
        let near = images["unit"].chunks(width).map(|image| cosine(text, image));
        let (best, _) = near.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        stated(&cells[best]) == stated(cell)
    });
    let found = found.count();
    let error =
        cells.iter().zip(&images["score"]).map(|(cell, score)| (world.aesthetic(cell) - f64::from(*score)).abs());
    let error = error.sum::<f64>() / n as f64;
    println!("{found} of {n} scenes found; aesthetic off by {error:.2} in the mean");
    assert!(found * 10 >= n * 8, "{found} of {n}");
    assert!(error < 0.5, "{error}");
}

/// The relative error of a gradient along a random line against central differences in f64, at the best step of a sweep.
fn central_error(program: &Program, model: &Model, buffers: &BTreeMap<String, Moved>, of: &str, to: &[String]) -> f64 {
    let mut cpu = Cpu::<f64>::new();
    let names: Vec<&str> = to.iter().map(String::as_str).collect();
    let gradient = differentiated(program, of, false, &names);
    let load = |cpu: &mut Cpu<f64>, program: &Program| {
        let planned = plan(program.clone(), |program, node| cpu.workspace(program, node));
        cpu.load(planned, model).unwrap()
    };
    let (forward, backward) = (load(&mut cpu, program), load(&mut cpu, &gradient));
    let along: Vec<Vec<f64>> = to.iter().zip(1..).map(|(name, seed)| noise(name, seed, buffers[name].len())).collect();
    let at = |cpu: &mut Cpu<f64>, id, h: f64| {
        for (name, data) in buffers {
            match (data, to.iter().position(|moved| moved == name)) {
                (Moved::Floats(x), Some(i)) => {
                    let x: Vec<f64> = x.iter().zip(&along[i]).map(|(x, a)| x + h * a).collect();
                    cpu.write(name, Data::F64(&x)).unwrap();
                }
                (Moved::Floats(x), None) => cpu.write(name, Data::F64(x)).unwrap(),
                (Moved::Ints(ids), _) => cpu.write(name, Data::I32(ids)).unwrap(),
            }
        }
        cpu.run(id).unwrap();
    };
    at(&mut cpu, backward, 0.0);
    let mut slope = 0.0;
    for (name, along) in to.iter().zip(&along) {
        let mut found = vec![0.0; along.len()];
        cpu.read(&format!("d {name}"), DataMut::F64(&mut found)).unwrap();
        slope += found.iter().zip(along).map(|(d, a)| d * a).sum::<f64>();
    }
    let mut loss = |h: f64| {
        at(&mut cpu, forward, h);
        let mut out = vec![0.0; program.value(value(program, of)).len()];
        cpu.read(of, DataMut::F64(&mut out)).unwrap();
        out.iter().sum::<f64>()
    };
    let mut error = |h: f64| ((loss(h) - loss(-h)) / (2.0 * h) - slope).abs() / slope.abs();
    [1e-2, 1e-3, 1e-4, 1e-5].into_iter().map(&mut error).fold(f64::INFINITY, f64::min)
}

enum Moved {
    Floats(Vec<f64>),
    Ints(Vec<i32>),
}

impl Moved {
    fn len(&self) -> usize {
        match self {
            Moved::Floats(x) => x.len(),
            Moved::Ints(x) => x.len(),
        }
    }
}

/// Image towers to pixels, text towers to embeddings, GPT-2 to all its weights at once.
#[test]
fn central_differences() {
    let mut errors = vec![];
    for clip in [Clip::l(), Clip::h()] {
        let side = clip.config.image.image_size + 5;
        let pixels = Tensor { shape: vec![1, 3, side, side], data: vec![] };
        let buffers = [("pixels".to_string(), Moved::Floats(noise("pixels", 0, side * side * 3)))].into();
        let program = clip.image(DType::F64, "clip", &pixels, None);
        errors.push(("pixels", central_error(&program, &clip.model, &buffers, "features", &["pixels".into()])));

        let config = clip.config.text.as_ref().unwrap();
        let mut b = Builder::new("text", DType::F64);
        let x = b.input("x", &[2, config.max_positions, config.width]);
        let ends = b.input_i32("ends", &[2]);
        let features = ClipText::new(&mut b, config, Component::Clip).features(x, ends);
        b.output("features", features);
        let x = Moved::Floats(noise("x", 0, 2 * config.max_positions * config.width));
        let buffers = [("x".to_string(), x), ("ends".to_string(), Moved::Ints(vec![3, 5]))].into();
        let program = b.finish().unwrap();
        errors.push(("text", central_error(&program, &clip.model, &buffers, "features", &["x".into()])));
    }
    let policy = Policy::tiny();
    let program = policy.program(DType::F64, Weights::Trainable);
    let weights: Vec<String> = gpt2::parameters(&policy.config).unwrap().iter().map(|weight| weight.name()).collect();
    let Buffers { floats, ints } = policy.buffers(Weights::Trainable);
    let floats = floats.into_iter().map(|(name, x)| (name, Moved::Floats(x.into_iter().map(f64::from).collect())));
    let buffers = floats.chain(ints.into_iter().map(|(name, ids)| (name, Moved::Ints(ids)))).collect();
    errors.push(("weights", central_error(&program, &policy.model, &buffers, "loss", &weights)));
    for (to, error) in errors {
        println!("gradient to {to}: {error:.1e}");
        assert!(error <= 1e-6, "{to}: {error:e}");
    }
}
