//! Speed of the executor's products, convolutions and attention on the shapes of Stable Diffusion, with the `gemm` crate as
//! the measure of what the machine can do.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, Executor, ProgramId};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Model, Pack, Weight};

/// A program of one op.
struct Bench {
    family: &'static str,
    name: String,
    program: Program,
}

impl Bench {
    fn new(family: &'static str, name: String, build: impl FnOnce(&mut Builder) -> ValueId) -> Bench {
        let mut b = Builder::new(name.clone(), DType::F32);
        let out = build(&mut b);
        b.output("out", out);
        Bench { family, name, program: b.finish().expect("a valid program") }
    }

    fn flops(&self) -> u64 {
        2 * self.program.nodes.iter().map(|n| n.op.macs(&self.program, &n.outputs)).sum::<u64>()
    }

    /// Loads the program, with weights and inputs of small noise.
    fn load(&self, cpu: &mut Cpu<f32>) -> ProgramId {
        let planned = plan(self.program.clone(), |program, node| cpu.workspace(program, node));
        let id = cpu.load(planned, &checkpoint(&self.program)).expect("the program loads");
        for &input in &self.program.inputs {
            let value = self.program.value(input);
            if let Origin::Input(name) = &value.origin {
                cpu.write(name, Data::F32(&noise(value.len()))).expect("the buffer exists");
            }
        }
        id
    }
}

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 2_654_435_761) % 1009) as f32 / 1009.0 - 0.5).collect()
}

/// A file with the weights of a program.
fn checkpoint(program: &Program) -> Model {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("weights.safetensors");
    let mut tensors = vec![("down_blocks.none".to_string(), vec![1], noise(1))];
    for (_, weight) in program.weights() {
        let mut shape = weight.shape.clone();
        match weight.pack {
            Pack::Linear | Pack::Geglu => shape.reverse(),
            Pack::Conv => shape = vec![shape[3], shape[2], shape[0], shape[1]],
            Pack::LinearTransposed | Pack::Table | Pack::Vector => {}
        }
        let len = shape.iter().product();
        tensors.push((weight.keys[0].clone(), shape, noise(len)));
    }
    let views = tensors.iter().map(|(name, shape, values)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values));
        (format!("model.diffusion_model.{name}"), view.expect("a tensor"))
    });
    serialize_to_file(views, None, &path).expect("a file");
    Model::open(&path).expect("a checkpoint")
}

fn weight(b: &mut Builder, name: &str, pack: Pack, shape: &[usize]) -> ValueId {
    let keys = vec![format!("down_blocks.{name}")];
    b.weight(Weight { component: Component::Unet, keys, pack, shape: shape.to_vec() })
}

fn gemm(rows: usize, k: usize, n: usize, activation: Activation) -> Bench {
    Bench::new("gemm", format!("{rows}x{k}x{n} {activation:?}"), |b| {
        let x = b.input("x", &[1, rows, k]);
        let pack = if activation == Activation::Geglu { Pack::Geglu } else { Pack::Linear };
        let w = weight(b, "w", pack, &[k, n]);
        let bias = Some(weight(b, "bias", Pack::Vector, &[n]));
        b.gemm(Gemm { x, w, bias, residual: None, activation })
    })
}

fn conv(batch: usize, size: usize, i: usize, o: usize, kernel: usize, stride: usize) -> Bench {
    let name = format!("{batch}x{size}x{size} {i} to {o} {kernel}x{kernel}/{stride}");
    Bench::new("conv2d", name, |b| {
        let x = b.input("x", &[batch, size, size, i]);
        let w = weight(b, "w", Pack::Conv, &[kernel, kernel, i, o]);
        let bias = Some(weight(b, "bias", Pack::Vector, &[o]));
        b.conv2d(Conv2d { x, w, bias, shift: None, residual: None, stride, padding: [kernel / 2; 4] })
    })
}

/// Gradient of [`gemm`] to its input.
fn gemm_to_input(rows: usize, k: usize, n: usize) -> Bench {
    Bench::new("gemm_to_input", format!("{rows}x{k}x{n}"), |b| {
        let d_y = b.input("d_y", &[1, rows, n]);
        let w = weight(b, "w", Pack::Linear, &[k, n]);
        b.push(Op::GemmBackward(GemmBackward::Input { d_y, w, residual: None }))[0]
    })
}

/// Gradient of [`gemm`] to its weight.
fn gemm_to_weight(rows: usize, k: usize, n: usize) -> Bench {
    Bench::new("gemm_to_weight", format!("{rows}x{k}x{n}"), |b| {
        let (x, d_y) = (b.input("x", &[1, rows, k]), b.input("d_y", &[1, rows, n]));
        b.push(Op::GemmBackward(GemmBackward::Weight { x, d_y }))[0]
    })
}

/// Gradient of [`conv`] to its input, whose side is `size`.
fn conv_to_input(batch: usize, size: usize, i: usize, o: usize, kernel: usize, stride: usize) -> Bench {
    let name = format!("{batch}x{size}x{size} {i} to {o} {kernel}x{kernel}/{stride}");
    Bench::new("conv2d_to_input", name, |b| {
        let out = (size + kernel / 2 * 2 - kernel) / stride + 1;
        let d_y = b.input("d_y", &[batch, out, out, o]);
        let w = weight(b, "w", Pack::Conv, &[kernel, kernel, i, o]);
        let (size, padding) = ([size; 2], [kernel / 2; 4]);
        b.push(Op::Conv2dBackward(Conv2dBackward { d_y, w, residual: None, size, stride, padding }))[0]
    })
}

fn attention(batch: usize, queries: usize, keys: usize, heads: usize, head_dim: usize) -> Bench {
    Bench::new("attention", format!("{batch}x{queries}x{keys} heads {heads}x{head_dim}"), |b| {
        let q = b.input("q", &[batch, queries, heads * head_dim]).into();
        let kv = b.input("kv", &[batch, keys, 2 * heads * head_dim]);
        let (k, v) = (Cols { value: kv, at: 0 }, Cols { value: kv, at: heads * head_dim });
        b.attention(Attention { q, k, v, heads, head_dim, causal: false })
    })
}

fn norm(batch: usize, pixels: usize, channels: usize) -> Bench {
    Bench::new("norm", format!("group {batch}x{pixels}x{channels}"), |b| {
        let x = b.input("x", &[batch, pixels, channels]);
        let gamma = weight(b, "gamma", Pack::Vector, &[channels]);
        b.group_norm(x, gamma, gamma, 32, 1e-5, true)
    })
}

/// Stable Diffusion 1.5 at 512², both halves of guidance, and its VAE.
fn shapes() -> Vec<Bench> {
    use Activation::*;
    vec![
        conv(2, 64, 4, 320, 3, 1),
        conv(2, 64, 320, 320, 3, 1),
        conv(2, 64, 960, 320, 3, 1),
        conv(2, 64, 320, 320, 3, 2),
        conv(2, 32, 640, 640, 3, 1),
        conv(2, 16, 1280, 1280, 3, 1),
        conv(2, 16, 2560, 1280, 3, 1),
        conv(2, 8, 1280, 1280, 3, 1),
        conv(2, 32, 1920, 640, 1, 1),
        conv(2, 64, 320, 4, 3, 1),
        conv(1, 512, 128, 128, 3, 1),
        conv(1, 512, 256, 128, 3, 1),
        conv(1, 256, 512, 256, 3, 1),
        conv(1, 512, 128, 3, 3, 1),
        gemm(8192, 320, 320, None),
        gemm(8192, 320, 960, None),
        gemm(8192, 320, 2560, Geglu),
        gemm(8192, 1280, 320, None),
        gemm(2048, 640, 640, None),
        gemm(2048, 640, 5120, Geglu),
        gemm(512, 1280, 1280, None),
        gemm(512, 1280, 10240, Geglu),
        gemm(512, 5120, 1280, None),
        gemm(128, 1280, 1280, None),
        gemm(154, 768, 3072, QuickGelu),
        conv_to_input(1, 64, 320, 320, 3, 1),
        conv_to_input(1, 64, 320, 320, 3, 2),
        conv_to_input(1, 8, 1280, 1280, 3, 1),
        conv_to_input(1, 512, 128, 3, 3, 1),
        gemm_to_input(4096, 320, 2560),
        gemm_to_input(4096, 320, 320),
        gemm_to_weight(1024, 768, 3072),
        attention(2, 4096, 4096, 8, 40),
        attention(2, 1024, 1024, 8, 80),
        attention(2, 256, 256, 8, 160),
        attention(2, 64, 64, 8, 160),
        attention(2, 4096, 77, 8, 40),
        attention(1, 4096, 4096, 1, 512),
        norm(2, 4096, 320),
        norm(2, 1024, 1280),
        norm(1, 512 * 512, 128),
    ]
}

fn ops(c: &mut Criterion) {
    for bench in shapes() {
        let mut cpu = Cpu::<f32>::new();
        let id = bench.load(&mut cpu);
        let mut group = c.benchmark_group(bench.family);
        group.sample_size(10);
        let elements = bench.program.value(bench.program.nodes[0].outputs[0]).len() as u64;
        group.throughput(Throughput::Elements(if bench.flops() > 0 { bench.flops() } else { elements }));
        group.bench_function(BenchmarkId::from_parameter(&bench.name), |b| {
            b.iter(|| cpu.run(id).expect("the program runs"));
        });
        group.finish();
    }
}

/// The same products by the `gemm` crate: convolutions as the product their unfolded form would take, unfolding not counted.
fn baseline(c: &mut Criterion) {
    let mut group = c.benchmark_group("baseline");
    group.sample_size(10);
    for [m, k, n] in [
        [8192, 2880, 320],
        [2048, 5760, 640],
        [512, 11520, 1280],
        [128, 11520, 1280],
        [8192, 320, 320],
        [8192, 320, 2560],
        [8192, 1280, 320],
        [512, 1280, 1280],
        [512, 5120, 1280],
        [154, 768, 3072],
    ] {
        let (a, b, mut out) = (noise(m * k), noise(k * n), vec![0.0f32; m * n]);
        group.throughput(Throughput::Elements(2 * (m * k * n) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{m}x{k}x{n}")), |bench| {
            bench.iter(|| product(m, k, n, &a, &b, &mut out));
        });
    }
    group.finish();
}

#[allow(unsafe_code)]
fn product(m: usize, k: usize, n: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == m * k && b.len() == k * n && out.len() == m * n);
    let (rows, columns) = (n as isize, 1);
    // SAFETY: the lengths are those of row-major m x k, k x n and m x n matrices.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            columns,
            rows,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

criterion_group!(benches, ops, baseline);
criterion_main!(benches);
