//! Numbers for the buffers of a program, a model of a few tensors, and one run.

use super::cases::Built;
use super::naive::Buffers;
use super::tolerance::round;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::Model;

/// Uniform in [-2, 2], a function of its arguments only.
pub fn noise(name: &str, sample: usize, len: usize) -> Vec<f64> {
    let mut state = name.bytes().fold(sample as u64 + 1, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    // Rounded to f32, so that both executors get the same numbers.
    (0..len).map(|_| (2.0 * next()) as f32 as f64).collect()
}

/// Contents for the buffers of a case; sample `i` of a batched buffer is that of sample `first + i` in any batch.
pub fn fill(built: &Built, first: usize, batch: usize) -> Buffers {
    let mut buffers = Buffers::default();
    for &id in &built.program.inputs {
        let value = built.program.value(id);
        let Origin::Input(name) = &value.origin else { continue };
        if value.dtype == DType::I32 {
            continue;
        }
        let mut values = if built.batched.contains(name) {
            (first..first + batch).flat_map(|sample| noise(name, sample, value.len() / batch)).collect()
        } else {
            noise(name, 1000, value.len())
        };
        if name == "coefficients" {
            values[0] = 0.75;
        }
        buffers.floats.insert(name.clone(), values);
    }
    buffers.ints = built.ints.iter().cloned().collect();
    buffers
}

/// The same as the case's program holds them.
pub fn operands(built: &Built, first: usize, batch: usize) -> Buffers {
    let mut buffers = fill(built, first, batch);
    for (name, values) in &mut buffers.floats {
        let id = built.program.input(name).unwrap();
        let dtype = built.program.value(id).dtype;
        values.iter_mut().for_each(|x| *x = round(dtype, *x));
    }
    buffers
}

/// The instruction sets of lesser processors: AVX2 where there is it, and none at all.
pub fn lesser_archs() -> Vec<pulp::Arch> {
    #[allow(unused_mut)]
    let mut archs = vec![pulp::Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    archs.extend(pulp::x86::V3::try_new().map(pulp::Arch::V3));
    archs
}

/// A checkpoint with nothing in it that these programs use.
pub fn no_weights() -> Model {
    weights(&[("unused", vec![1], vec![0.0])])
}

/// A model of named UNet tensors.
pub fn weights(tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> Model {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (format!("model.diffusion_model.{name}"), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(&path, serialize(views, None).unwrap()).unwrap();
    Model::open(&path).unwrap()
}

/// Runs a program and returns its outputs in order.
pub fn run(
    mut executor: impl Executor,
    program: &Program,
    buffers: &Buffers,
    model: &Model,
    times: usize,
) -> Vec<Vec<f64>> {
    try_run(&mut executor, program, buffers, model, times).unwrap()
}

/// The same where the executor may refuse.
pub fn try_run(
    executor: &mut impl Executor,
    program: &Program,
    buffers: &Buffers,
    model: &Model,
    times: usize,
) -> rarebit::Result<Vec<Vec<f64>>> {
    let planned = plan(program.clone(), |program, node| executor.workspace(program, node));
    let id = executor.load(planned, model)?;
    for _ in 0..times {
        for (name, values) in &buffers.floats {
            executor.write(name, Data::F64(values))?;
        }
        for (name, values) in &buffers.ints {
            executor.write(name, Data::I32(values))?;
        }
        executor.run(id)?;
    }
    let read = |(name, id): &(String, ValueId)| {
        let mut out = vec![0.0; program.value(*id).len()];
        executor.read(name, DataMut::F64(&mut out))?;
        Ok(out)
    };
    program.outputs.iter().map(read).collect()
}
