//! Gradients of the networks against torch autograd (`tools/reference/dump_gradients.py`), and against central differences in f64.

use crate::common::golden::{Golden, data_folder, relative_error};
use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::models::clip_text::ClipText;
use rarebit::models::unet::{Added, Unet};
use rarebit::models::vae;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{to_channels_first, to_channels_last};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Model};
use safetensors::SafeTensors;
use std::collections::BTreeMap;

const MODELS: [&str; 3] = ["tiny-sd1", "tiny-sd2", "tiny-sdxl"];
const LIMIT: f64 = 1e-4;

/// Named values on the host.
#[derive(Clone, Default)]
struct Values {
    floats: BTreeMap<String, Vec<f64>>,
    ints: BTreeMap<String, Vec<i32>>,
}

impl Values {
    fn with(mut self, name: &str, values: impl IntoIterator<Item = f32>) -> Values {
        self.floats.insert(name.into(), values.into_iter().map(f64::from).collect());
        self
    }
}

/// A network as a function: a program, the values of its inputs, and which of them are leaves.
struct Function {
    program: Program,
    objective: ValueId,
    leaves: Vec<(ValueId, String)>,
    inputs: Values,
}

/// Runs a program and reads the buffers `names`.
fn run<T: Real>(program: Program, inputs: &Values, model: &Model, names: &[String]) -> Vec<Vec<f64>> {
    let mut cpu = Cpu::<T>::new().with_guards(true);
    let len = |name: &String| program.outputs.iter().find(|(n, _)| n == name).map(|(_, id)| program.value(*id).len());
    let lens: Vec<usize> = names.iter().map(|name| len(name).unwrap()).collect();
    let id = {
        let planned = plan(program, |program, node| cpu.workspace(program, node));
        cpu.load(planned, model).unwrap()
    };
    for (name, values) in &inputs.floats {
        // A gradient may read fewer inputs than its function.
        let _ = cpu.write(name, Data::F64(values));
    }
    for (name, values) in &inputs.ints {
        let _ = cpu.write(name, Data::I32(values));
    }
    cpu.run(id).unwrap();
    let read = |(name, len): (&String, usize)| {
        let mut values = vec![0.0; len];
        cpu.read(name, DataMut::F64(&mut values)).unwrap();
        values
    };
    names.iter().zip(lens).map(read).collect()
}

impl Function {
    /// The gradients of Σ objective · cotangent, in the order of the leaves.
    fn gradients<T: Real>(&self, cotangent: &[f64], model: &Model) -> Vec<Vec<f64>> {
        let names: Vec<String> = self.leaves.iter().map(|(_, name)| format!("d_{name}")).collect();
        let request = Request {
            objectives: vec![(self.objective, Cotangent::Input("cotangent".into()))],
            leaves: self.leaves.iter().map(|(id, _)| *id).zip(names.clone()).collect(),
        };
        let mut bare = self.program.clone();
        bare.outputs.clear();
        let gradient = differentiate(&bare, &request, None).unwrap();
        let mut inputs = self.inputs.clone();
        inputs.floats.insert("cotangent".into(), cotangent.to_vec());
        run::<T>(gradient, &inputs, model, &names)
    }
}

/// The UNet from latents, context and added conditions to its prediction.
fn unet(pipeline: &Pipeline, golden: &Golden, dtype: DType) -> Function {
    let config = &pipeline.config.unet;
    let network = Unet::new(config);
    let tensor = |name: &str| golden.tensor(&format!("unet/{name}"));
    let (latents, context) = (tensor("latents").unwrap(), tensor("context").unwrap());
    let [rows, channels, height, width] = latents.shape[..] else { panic!("latents") };
    let mut b = Builder::new("unet", dtype);
    let x = b.input("latents", &[rows, height, width, channels]);
    let text = b.input("context", &context.shape);
    let timesteps = b.input("timesteps", &[1]);
    let last = |image: &[f32]| to_channels_last(image, channels);
    let mut inputs = Values::default()
        .with("latents", latents.data.chunks(channels * height * width).flat_map(last))
        .with("context", context.data)
        .with("timesteps", [420.5]);
    let mut leaves = vec![(x, "latents".to_string()), (text, "context".to_string())];
    let added = tensor("pooled").zip(tensor("time_ids")).map(|(pooled, ids)| {
        let added = Added { pooled: b.input("pooled", &pooled.shape), size_ids: b.input("time_ids", &ids.shape) };
        inputs = std::mem::take(&mut inputs).with("pooled", pooled.data).with("time_ids", ids.data);
        leaves.extend([(added.pooled, "pooled".to_string()), (added.size_ids, "time_ids".to_string())]);
        added
    });
    let kv = network.context_kv(&mut b, text);
    let time = network.time(&mut b, timesteps, added);
    let step = b.input_i32("step", &[1]);
    let time = b.select(time, step);
    let prediction = network.forward(&mut b, x, kv, time);
    b.output("out", prediction);
    Function { program: b.finish().unwrap(), objective: prediction, leaves, inputs }
}

fn decoder(pipeline: &Pipeline, golden: &Golden, dtype: DType) -> Function {
    let latents = golden.tensor("vae/latents").unwrap();
    let [rows, channels, height, width] = latents.shape[..] else { panic!("latents") };
    let mut b = Builder::new("decode", dtype);
    let x = b.input("latents", &[rows, height, width, channels]);
    let image = vae::decode(&mut b, &pipeline.config.vae, x);
    b.output("out", image);
    let inputs = Values::default().with("latents", to_channels_last(&latents.data, channels));
    Function { program: b.finish().unwrap(), objective: image, leaves: vec![(x, "latents".into())], inputs }
}

/// The first tower from its embedded tokens to the context (of SDXL the first half of it).
fn text(pipeline: &Pipeline, golden: &Golden, dtype: DType) -> Function {
    let config = &pipeline.config.text[0];
    let ids = golden.ints("ids/prompt");
    let mut b = Builder::new("text", dtype);
    let tokens = b.input_i32("ids", &[1, ids.len()]);
    let mut tower = ClipText::new(&mut b, config, Component::TextEncoder);
    let embedded = tower.embed(tokens);
    let states = if pipeline.config.text.len() == 1 {
        let states = tower.layers(embedded, 0, config.layers);
        tower.final_norm(states)
    } else {
        tower.layers(embedded, 0, config.layers - 1)
    };
    b.output("out", states);
    let mut inputs = Values::default();
    inputs.ints.insert("ids".into(), ids);
    Function { program: b.finish().unwrap(), objective: states, leaves: vec![(embedded, "embeddings".into())], inputs }
}

/// A tensor of gradients.safetensors, images channels last.
fn stored(model: &str, name: &str) -> Option<Vec<f32>> {
    let bytes = std::fs::read(data_folder(model).join("gradients.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).ok()?;
    let data: Vec<f32> = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    match tensor.shape() {
        [_, channels, height, width] => {
            let images = data.chunks(channels * height * width);
            Some(images.flat_map(|image| to_channels_last(image, *channels)).collect())
        }
        _ => Some(data),
    }
}

/// ⟨a, b⟩ / (‖a‖ ‖b‖).
fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn against_torch(part: &str, function: fn(&Pipeline, &Golden, DType) -> Function) {
    for model in MODELS {
        let golden = Golden::open(model);
        let pipeline = golden.pipeline();
        let function = function(&pipeline, &golden, DType::F32);
        let single = |values: Vec<f64>| -> Vec<f32> { values.into_iter().map(|x| x as f32).collect() };
        let cotangent: Vec<f64> =
            stored(model, &format!("{part}/cotangent")).unwrap().into_iter().map(f64::from).collect();
        let found = function.gradients::<f32>(&cotangent, &pipeline.model);
        for ((_, leaf), gradient) in function.leaves.iter().zip(found) {
            let expected = stored(model, &format!("{part}/d_{leaf}")).unwrap_or_else(|| panic!("{part}/d_{leaf}"));
            let double: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
            let cosine = cosine(&gradient, &double);
            let error = relative_error(&single(gradient), &expected);
            println!("{model:10} {part} to {leaf}: {error:.1e}, cosine 1 - {:.0e}", 1.0 - cosine);
            assert!(error <= LIMIT && cosine >= 0.999_999, "{model} {part} to {leaf}: {error:e}, cosine {cosine}");
        }
    }
}

#[test]
fn unet_like_torch() {
    against_torch("unet", unet);
}

#[test]
fn decoder_like_torch() {
    against_torch("vae", decoder);
}

#[test]
fn text_like_torch() {
    against_torch("text", text);
}

/// Uniform in [-1, 1].
fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Every network of every family along a random line per leaf, in f64.
#[test]
fn central_differences() {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for model in MODELS {
        let golden = Golden::open(model);
        let pipeline = golden.pipeline();
        for function in [unet, decoder] {
            let function = function(&pipeline, &golden, DType::F64);
            let cotangent = noise(3, function.program.value(function.objective).len());
            let found = function.gradients::<f64>(&cotangent, &pipeline.model);
            for ((_, leaf), gradient) in function.leaves.iter().zip(found) {
                let along = noise(11, gradient.len());
                let slope = dot(&gradient, &along);
                let value = |h: f64| {
                    let mut inputs = function.inputs.clone();
                    let x = inputs.floats.get_mut(leaf).unwrap();
                    x.iter_mut().zip(&along).for_each(|(x, a)| *x += h * a);
                    dot(&run::<f64>(function.program.clone(), &inputs, &pipeline.model, &["out".into()])[0], &cotangent)
                };
                let error = |h: f64| ((value(h) - value(-h)) / (2.0 * h) - slope).abs() / slope.abs();
                let best = [1e-2, 1e-3, 1e-4, 1e-5].into_iter().map(error).fold(f64::INFINITY, f64::min);
                println!("{model:10} {} to {leaf}: {best:.1e}", function.program.name);
                assert!(best <= 1e-6, "{model} {} to {leaf}: {best:e}", function.program.name);
            }
        }
    }
}

/// Channels first and last are each other's inverse, which the comparisons above rest on.
#[test]
fn layouts_are_inverse() {
    let x: Vec<f32> = (0..60).map(|i| i as f32).collect();
    assert_eq!(to_channels_first(&to_channels_last(&x, 3), 3), x);
}
