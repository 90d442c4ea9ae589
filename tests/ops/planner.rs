//! The planner: no two live buffers overlap, whatever the program, and the arena is hardly larger than what is live.

use crate::common::published::{decode, gradient};
use proptest::prelude::*;
use rarebit::models::config::{AddedConfig, Middle, UnetConfig};
use rarebit::models::unet::Unet;
use rarebit::plan::{ALIGNMENT, Planned, Region, plan};
use rarebit::program::{Activation, Builder, DType, Gemm, Program, ValueId};

/// Checks a plan against lifetimes computed here, op by op.
fn check(planned: &Planned) {
    let Planned { program, plan } = planned;
    let dies = |id: ValueId, after: usize| {
        let output = program.outputs.iter().any(|(_, o)| *o == id);
        let read_later = program.nodes[after + 1..].iter().any(|node| node.op.inputs().contains(&id));
        !output && !read_later
    };
    let mut live: Vec<(ValueId, Region)> = Vec::new();
    for (index, node) in program.nodes.iter().enumerate() {
        let taken = plan.in_place[index];
        if let Some(from) = taken {
            assert_eq!(node.op.may_alias(), Some(from));
            assert!(dies(from, index), "op {index} overwrites %{} which is read later", from.0);
            assert_eq!(plan.regions[from.index()], plan.regions[node.outputs[0].index()]);
            live.retain(|(id, _)| *id != from);
        }
        let mut now: Vec<Region> = node.outputs.iter().map(|id| plan.regions[id.index()].unwrap()).collect();
        now.extend(plan.workspace[index]);
        for (i, a) in now.iter().enumerate() {
            assert!(a.end() <= plan.arena_bytes && a.offset % ALIGNMENT == 0);
            assert!(now[..i].iter().all(|b| !a.overlaps(b)), "outputs of op {index} overlap");
            for (id, b) in &live {
                assert!(!a.overlaps(b), "op {index} writes over %{}", id.0);
            }
        }
        live.extend(node.outputs.iter().map(|&id| (id, plan.regions[id.index()].unwrap())));
        live.retain(|(id, _)| !dies(*id, index));
    }
}

/// A random program over one input: every choice picks an op and its operands among the values so far.
fn random_program(choices: &[(u8, u16, u16)]) -> Program {
    let mut b = Builder::new("random", DType::F32);
    let mut values = vec![b.input("x", &[1, 4, 6])];
    for &(kind, first, second) in choices {
        let pick = |n: u16| values[n as usize % values.len()];
        let (x, y) = (pick(first), pick(second));
        let next = match kind % 6 {
            0 => b.activate(x, Activation::Silu),
            1 => b.concat(x, y),
            2 if b.shape(x) == b.shape(y) => b.add(x, y),
            3 => {
                let (k, n) = (b.channels(x), 1 + second as usize % 9);
                let w = b.input(format!("w{}", values.len()), &[k, n]);
                b.gemm(Gemm { x, w, bias: None, residual: None, activation: Activation::None })
            }
            4 => b.affine(x, 2.0, 1.0),
            _ => b.activate(x, Activation::Gelu),
        };
        // Concatenating concatenations doubles widths; keep them small.
        if b.channels(next) < 200 {
            values.push(next);
        }
    }
    let last = *values.last().unwrap();
    if values.len() > 1 {
        b.output("y", last);
    }
    b.finish().unwrap()
}

proptest! {
    #[test]
    fn live_buffers_never_overlap(
        choices in prop::collection::vec((any::<u8>(), any::<u16>(), any::<u16>()), 1..60),
        scratch in prop::collection::vec(0usize..3000, 60),
    ) {
        let program = random_program(&choices);
        let planned = plan(program, |program, node| {
            let index = program.nodes.iter().position(|n| n.outputs == node.outputs).unwrap();
            scratch[index % scratch.len()] / 1000 * 700
        });
        check(&planned);
        prop_assert!(planned.plan.arena_bytes >= planned.plan.live_bytes);
    }
}

fn sd15() -> UnetConfig {
    UnetConfig {
        in_channels: 4,
        out_channels: 4,
        channels: vec![320, 640, 1280, 1280],
        down_transformers: [1, 1, 1, 0].map(|depth| vec![depth; 2]).to_vec(),
        up_transformers: [1, 1, 1, 0].map(|depth| vec![depth; 3]).to_vec(),
        middle: Middle::Transformer(1),
        heads: vec![8; 4],
        context_width: 768,
        norm_groups: 32,
        norm_eps: 1e-5,
        linear_projection: false,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        added: None,
        sample_size: 64,
    }
}

fn sdxl() -> UnetConfig {
    UnetConfig {
        channels: vec![320, 640, 1280],
        down_transformers: [0, 2, 10].map(|depth| vec![depth; 2]).to_vec(),
        up_transformers: [0, 2, 10].map(|depth| vec![depth; 3]).to_vec(),
        middle: Middle::Transformer(10),
        heads: vec![5, 10, 20],
        context_width: 2048,
        linear_projection: true,
        added: Some(AddedConfig { time_dim: 256, input_width: 2816 }),
        sample_size: 128,
        ..sd15()
    }
}

fn unet_program(config: &UnetConfig, side: usize) -> Program {
    let unet = Unet::new(config);
    let mut b = Builder::new("unet", DType::F32);
    let latents = b.input("latents", &[2, side, side, 4]);
    let kv = b.input("kv", &[2, 77, unet.kv_width()]);
    let time = b.input("time", &[1, unet.time_width()]);
    let out = unet.forward(&mut b, latents, kv, time);
    b.output("out", out);
    b.finish().unwrap()
}

#[test]
fn arena_is_within_a_tenth_of_what_is_live() {
    let executor = rarebit::exec::cpu::Cpu::<f32>::new();
    let programs = [unet_program(&sd15(), 64), unet_program(&sdxl(), 128), decode(DType::F32, 1, 64)];
    let gradients = [gradient(&programs[0]), gradient(&programs[2])];
    for program in programs.into_iter().chain(gradients) {
        let name = format!("{} of {} ops", program.name, program.nodes.len());
        let planned = plan(program, |program, node| rarebit::exec::Executor::workspace(&executor, program, node));
        let ratio = planned.plan.arena_bytes as f64 / planned.plan.live_bytes as f64;
        println!("{name}: arena {} bytes, {ratio:.4} x live", planned.plan.arena_bytes);
        assert!(ratio <= 1.10, "{name}: {ratio}");
        check(&planned);
    }
}

/// 0.800 TFLOP per sample at 512x512, attention products counted; the text's keys and values are another program's.
#[test]
fn counts_the_known_macs() {
    let program = unet_program(&sd15(), 64);
    let macs: u64 = program.nodes.iter().map(|node| node.op.macs(&program, &node.outputs)).sum();
    assert_eq!(macs / 1_000_000 / 2, 400_132);
}
