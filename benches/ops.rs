//! Speed of the executor's products, convolutions and attention on the shapes of Stable Diffusion, with the `gemm` crate as
//! the measure of what the machine can do.

#[path = "../tests/common/speed.rs"]
mod speed;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::program::DType;
use speed::noise;

fn ops(c: &mut Criterion) {
    for shape in speed::shapes() {
        let mut cpu = Cpu::<f32>::new();
        let program = shape.program(DType::F32, 1);
        let (flops, elements) = (program.flops(), program.value(program.nodes[0].outputs[0]).len() as u64);
        let id = speed::load(program, &mut cpu).expect("the program loads");
        let mut group = c.benchmark_group(shape.family());
        group.sample_size(10);
        group.throughput(Throughput::Elements(if flops > 0 { flops } else { elements }));
        group.bench_function(BenchmarkId::from_parameter(shape.name()), |b| {
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
