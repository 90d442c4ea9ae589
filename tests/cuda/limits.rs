//! What a driver refuses is refused before it is asked, by the same lines on the emulation; and the largest images that a GPU has the
//! memory for need no such launch.

use crate::common::emulated::build;
use crate::common::inputs::no_weights;
use crate::common::published::{decode, gradient};
use rarebit::exec::Executor;
use rarebit::exec::cuda::{
    Address, Cuda, Driver, Emulated, Hopper, Launch, PEAKS, Peak, Planner, Settings, TensorMap, explain,
};
use rarebit::plan::plan;
use rarebit::program::{Attention, Builder, DType, Program};

const HOPPER: [Hopper; 3] = [Hopper::Off, Hopper::Auto, Hopper::Always];

fn h200() -> Peak {
    PEAKS.into_iter().find(|peak| peak.name == "h200").unwrap()
}

/// The most blocks along x, y and z of all launches, each of which a driver takes.
fn most_blocks(program: Program, hopper: Hopper) -> [u32; 3] {
    let planned = plan(program, |program, node| Planner { hopper }.workspace(program, node));
    let launches: Vec<Launch> = explain(&planned, h200(), hopper)
        .unwrap()
        .rows
        .into_iter()
        .flat_map(|row| row.launches)
        .map(|(l, _)| l)
        .collect();
    [0, 1, 2].map(|axis| launches.iter().map(|launch| launch.grid[axis]).max().unwrap())
}

#[test]
fn large_decodes_and_their_gradients_can_be_launched() {
    let large = [decode(DType::F16, 1, 256), decode(DType::F16, 4, 256), decode(DType::F32, 1, 256)];
    let gradients = [(DType::F16, 16, 64), (DType::BF16, 32, 64), (DType::F16, 2, 256)]
        .map(|(dtype, batch, side)| gradient(&decode(dtype, batch, side)));
    for program in large.into_iter().chain(gradients) {
        for hopper in HOPPER {
            let name = format!("{} of {} ops, Hopper {hopper:?}", program.name, program.nodes.len());
            let [x, y, z] = most_blocks(program.clone(), hopper);
            println!("{name}: at most {x}, {y}, {z} blocks");
            // Along y and z no extent of the image.
            assert!(x > 65_535 && y < 1024 && z < 1024, "{name}: {x}, {y}, {z}");
        }
    }
}

/// Samples of attention go along z.
fn many_samples(batch: usize) -> Program {
    let mut b = Builder::new("many", DType::F16);
    let x = b.input("x", &[batch, 1, 8]);
    let attention = Attention { q: x.into(), k: x.into(), v: x.into(), heads: 1, head_dim: 8, causal: false };
    let out = b.attention(attention);
    b.output("out", out);
    b.finish().unwrap()
}

#[test]
fn a_batch_beyond_every_grid_is_one_error() {
    for hopper in HOPPER {
        let planned = |batch| plan(many_samples(batch), |program, node| Planner { hopper }.workspace(program, node));
        explain(&planned(65_535), h200(), hopper).unwrap();
        let explained = explain(&planned(65_536), h200(), hopper).unwrap_err().to_string();
        let mut emulated =
            Cuda::new(Box::new(Emulated::open(&build(), Settings::default()).unwrap())).with_hopper(hopper);
        let loaded = emulated.load(planned(65_536), &no_weights()).unwrap_err().to_string();
        for error in [explained, loaded] {
            let words = ["program 'many', op 0", "1x1x65536", "65535 blocks along z", "--batch"];
            assert!(words.iter().all(|word| error.contains(word)) && !error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn the_emulation_refuses_what_a_driver_refuses() {
    let mut emulated = Emulated::open(&build(), Settings::default()).unwrap();
    let function = emulated.function("fill_f32", 0).unwrap();
    let y = emulated.allocate(4096).unwrap();
    // FillParams: where, how many, a value, whether aligned.
    let params = |count: u64| [y.0, count, u64::from(2f32.to_bits())];
    let launch = |grid, block, shared| Launch::new("fill_f32", grid, block, shared, params(16));
    emulated.launch(function, &launch([1, 1, 1], 256, 0)).unwrap();
    for (grid, block, shared, what) in [
        ([1, 65_536, 1], 256, 0, "along y"),
        ([1, 1, 0], 256, 0, "along z"),
        ([1 << 32, 1, 1], 256, 0, "along x"),
        ([1, 1, 1], 0, 0, "1 to 1024 threads"),
        ([1, 1, 1], 2048, 0, "1 to 1024 threads"),
        // More than the kernel was compiled for.
        ([1, 1, 1], 288, 0, "1 to 256 threads"),
        ([1, 1, 1], 256, 232_449, "shared memory"),
    ] {
        let error = emulated.launch(function, &launch(grid, block, shared)).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("fill_f32"), "{error}");
    }
    let map =
        TensorMap { dtype: DType::F16, address: y, extents: [64, 8, 1, 1], strides: [64, 0, 0], window: [64, 8, 1, 1] };
    emulated.tensor_map(&map).unwrap();
    for (wrong, what) in [
        (TensorMap { address: Address(y.0 + 8), ..map.clone() }, "multiple of 16"),
        (TensorMap { window: [64, 512, 1, 1], ..map.clone() }, "1 to 256"),
        (TensorMap { window: [32, 8, 1, 1], ..map.clone() }, "first dimension"),
        (TensorMap { strides: [60, 0, 0], ..map.clone() }, "multiples of 16 bytes"),
        (TensorMap { extents: [64, 0, 1, 1], ..map.clone() }, "extents"),
        (TensorMap { dtype: DType::F32, ..map }, "16 bits"),
    ] {
        let error = emulated.tensor_map(&wrong).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}
