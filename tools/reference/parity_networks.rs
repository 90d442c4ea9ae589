//! The phases of `parity.py` for networks that are no pipeline: an image tower's gradient to its pixels, GPT-2's to all its weights.

use super::{Dump, Named, Result};
use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::models::gpt2::{self, Gpt2};
use rarebit::models::{Weights, clip_image, detect};
use rarebit::pipeline::networks::Tensor;
use rarebit::plan::plan;
use rarebit::program::{Builder, DType, Program, ValueId};
use rarebit::weights::{Component, Model};
use std::path::Path;

/// Loads and runs a program; its outputs by name, as the engine lays them out.
fn run(program: Program, model: &Model, buffers: &[(String, Data<'_>)]) -> Result<Named> {
    let mut cpu = Cpu::<f32>::new();
    let outputs: Vec<(String, Vec<usize>)> =
        program.outputs.iter().map(|(name, id)| (name.clone(), program.shape(*id).to_vec())).collect();
    let planned = plan(program, |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, model)?;
    for (name, data) in buffers {
        cpu.write(name, *data)?;
    }
    cpu.run(id)?;
    let read = |(name, shape): (String, Vec<usize>)| {
        let mut data = vec![0.0; shape.iter().product()];
        cpu.read(&name, DataMut::F32(&mut data))?;
        Ok((name, Tensor { shape, data }))
    };
    outputs.into_iter().map(read).collect()
}

/// `[1, 3, H, W]` to `[1, H, W, 3]`, or back.
fn turned(image: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| image[r * columns + c])).collect()
}

pub fn clip(folder: &Path, dump: &Dump<'_>) -> Result<Named> {
    let model = Model::network(Component::Clip, folder)?;
    let config = detect::clip_config(&model, Component::Clip)?.image;
    let (pixels, cotangent) = (dump.floats("in/pixels")?, dump.floats("in/d_features")?);
    let side = config.image_size;
    let mut b = Builder::new("clip", DType::F32);
    let image = b.input("pixels", &[1, side, side, 3]);
    let features = clip_image::features(&mut b, &config, Component::Clip, image);
    b.output("out/features", features);
    let request = Request {
        objectives: vec![(features, Cotangent::Input("cotangent".into()))],
        leaves: vec![(image, "out/d_pixels".into())],
    };
    let program = differentiate(&b.finish()?, &request, None)?;
    let area = side * side;
    let pixels = turned(&pixels.data, [3, area]);
    let buffers = [("pixels".to_string(), Data::F32(&pixels)), ("cotangent".into(), Data::F32(&cotangent.data))];
    let mut results = run(program, &model, &buffers)?;
    let (_, gradient) = &mut results[1];
    *gradient = Tensor { shape: vec![1, 3, side, side], data: turned(&gradient.data, [area, 3]) };
    Ok(results)
}

pub fn policy(folder: &Path, dump: &Dump<'_>) -> Result<Named> {
    let model = Model::network(Component::Policy, folder)?;
    let config = detect::policy_config(&model)?;
    let (ids, targets) = (dump.ints("in/ids")?, dump.ints("in/targets")?);
    let shape = dump.0.tensor("in/ids")?.shape().to_vec();
    let mut b = Builder::new("gpt2", DType::F32);
    let (id_buffer, target_buffer) = (b.input_i32("ids", &shape), b.input_i32("targets", &shape));
    let mut net = Gpt2::new(&mut b, &config, Weights::Trainable);
    let x = net.embed(id_buffer);
    let x = net.hidden(x);
    let logits = net.logits(x);
    let losses = b.cross_entropy(logits, target_buffer);
    // The mean over all targets, as a sum of samples' shares.
    let count = targets.iter().filter(|id| **id >= 0).count();
    let ones = b.constant(&shape, 1.0 / count as f64);
    let loss = b.dot(losses, ones);
    b.output("loss", loss);
    let program = b.finish()?;

    let weights = gpt2::parameters(&config)?;
    let mut leaves: Vec<(ValueId, String)> = Vec::new();
    for weight in &weights {
        let id = program.input(&weight.name()).ok_or_else(|| format!("no input '{}'", weight.name()))?;
        leaves.push((id, format!("out/d_{}", weight.keys.join("+"))));
    }
    let gradient = differentiate(&program, &Request { objectives: vec![(loss, Cotangent::Ones)], leaves }, None)?;
    let values = weights.iter().map(|weight| model.value(weight)).collect::<rarebit::Result<Vec<_>>>()?;
    let mut buffers = vec![("ids".to_string(), Data::I32(&ids)), ("targets".into(), Data::I32(&targets))];
    buffers.extend(weights.iter().zip(&values).map(|(weight, value)| (weight.name(), Data::F32(value))));
    let mut results = run(gradient, &model, &buffers)?;
    let (_, losses) = results.remove(0);
    results.push(("out/loss".into(), Tensor { shape: vec![1], data: vec![losses.data.iter().sum()] }));
    Ok(results)
}
