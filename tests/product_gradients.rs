//! Gradients of products and convolutions on the CPU: f64 against plain loops and against central differences of the forward
//! op, f32 against f64, weights as held in panels against plain inputs, and the same bits whatever the batch, the number of
//! threads and the runs before; no op touches memory that is not its own.

mod common;

use common::feed::{lesser_archs, no_weights, noise, weights};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Model, Pack, Weight};

#[derive(Clone, Debug)]
enum Case {
    /// Rows, K, N.
    Input([usize; 3]),
    Weight([usize; 3]),
    /// Size, channels in and out, kernel, stride, padding.
    Conv([usize; 2], [usize; 2], [usize; 2], usize, [usize; 4]),
}

/// Shapes where kernels go wrong: odd sizes, tails, one row, one column, several K blocks, several chunks of rows.
fn cases() -> Vec<Case> {
    let gemms = [
        [1, 1, 1],
        [1, 4, 3],
        [3, 17, 7],
        [5, 64, 33],
        [7, 80, 384],
        [13, 40, 385],
        [77, 130, 100],
        [200, 64, 65],
        [401, 96, 64],
        [430, 24, 770],
        [900, 9, 20],
        [390, 400, 70],
    ];
    let convolutions = [
        ([1, 1], [1, 1], [1, 1], 1, [0; 4]),
        ([5, 7], [3, 5], [3, 3], 1, [1; 4]),
        ([8, 8], [32, 4], [3, 3], 1, [1; 4]),
        ([8, 8], [4, 32], [3, 3], 1, [1; 4]),
        ([9, 6], [33, 40], [3, 3], 1, [1; 4]),
        ([9, 6], [40, 48], [3, 3], 2, [1; 4]),
        ([8, 10], [33, 36], [3, 3], 2, [0, 0, 1, 1]),
        ([8, 10], [33, 20], [3, 3], 2, [0, 0, 1, 1]),
        ([8, 11], [3, 36], [3, 3], 2, [0, 0, 1, 1]),
        ([6, 6], [64, 64], [1, 1], 1, [0; 4]),
        ([7, 5], [36, 34], [1, 1], 2, [0; 4]),
        ([5, 4], [20, 12], [1, 1], 1, [0; 4]),
        ([4, 4], [5, 6], [1, 1], 1, [1, 0, 2, 3]),
        ([12, 9], [40, 70], [5, 3], 1, [2, 1, 0, 3]),
        ([11, 13], [6, 9], [2, 4], 3, [0, 2, 1, 0]),
        ([11, 13], [40, 33], [2, 4], 3, [0, 2, 1, 0]),
        ([11, 13], [40, 9], [4, 2], 3, [1, 2, 1, 0]),
        ([16, 16], [80, 400], [3, 3], 1, [1; 4]),
        ([20, 22], [48, 4], [3, 3], 1, [1; 4]),
        ([14, 28], [3, 40], [14, 14], 14, [0; 4]),
        ([3, 3], [130, 64], [3, 3], 1, [1; 4]),
    ];
    let gemms = gemms.into_iter().flat_map(|shape| [Case::Input(shape), Case::Weight(shape)]);
    let convolutions = convolutions
        .into_iter()
        .map(|(size, channels, kernel, stride, padding)| Case::Conv(size, channels, kernel, stride, padding));
    gemms.chain(convolutions).collect()
}

impl Case {
    /// Shapes of `x`, `w` and `y`.
    fn shapes(&self, batch: usize) -> [Vec<usize>; 3] {
        match *self {
            Case::Input([m, k, n]) | Case::Weight([m, k, n]) => [vec![batch, m, k], vec![k, n], vec![batch, m, n]],
            Case::Conv(size, [i, o], kernel, stride, padding) => {
                let out = |d: usize| (size[d] + padding[d] + padding[d + 2] - kernel[d]) / stride + 1;
                let (x, y) = (vec![batch, size[0], size[1], i], vec![batch, out(0), out(1), o]);
                [x, vec![kernel[0], kernel[1], i, o], y]
            }
        }
    }

    /// The weight's bytes in a checkpoint are those of its transpose; convolutions keep their taps innermost.
    fn pack(&self) -> Pack {
        if matches!(self, Case::Conv(..)) { Pack::Conv } else { Pack::Linear }
    }

    fn forward(&self, b: &mut Builder, x: ValueId, w: ValueId) -> ValueId {
        match *self {
            Case::Input(_) | Case::Weight(_) => {
                b.gemm(Gemm { x, w, bias: None, residual: None, activation: Activation::None })
            }
            Case::Conv(_, _, _, stride, padding) => {
                b.conv2d(Conv2d { x, w, bias: None, shift: None, residual: None, stride, padding })
            }
        }
    }

    fn op(&self, x: ValueId, w: ValueId, d_y: ValueId, residual: Option<ValueId>) -> Op {
        match *self {
            Case::Input(_) => Op::GemmBackward(GemmBackward::Input { d_y, w, residual }),
            Case::Weight(_) => Op::GemmBackward(GemmBackward::Weight { x, d_y }),
            Case::Conv(size, _, _, stride, padding) => {
                Op::Conv2dBackward(Conv2dBackward { d_y, w, residual, size, stride, padding })
            }
        }
    }

    /// Calls `f` for every product of the forward op: indices into `x`, `w` and `y`.
    fn products(&self, batch: usize, mut f: impl FnMut(usize, usize, usize)) {
        match *self {
            Case::Input([m, k, n]) | Case::Weight([m, k, n]) => {
                for row in 0..batch * m {
                    for k_index in 0..k {
                        (0..n).for_each(|j| f(row * k + k_index, k_index * n + j, row * n + j));
                    }
                }
            }
            Case::Conv([height, width], [i, o], [kh, kw], stride, [top, left, ..]) => {
                let y = &self.shapes(batch)[2];
                for pixel in 0..batch * y[1] * y[2] {
                    let (sample, oy, ox) = (pixel / y[2] / y[1], pixel / y[2] % y[1], pixel % y[2]);
                    for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
                        let (iy, ix) = (oy * stride + ky, ox * stride + kx);
                        if iy < top || ix < left || iy - top >= height || ix - left >= width {
                            continue;
                        }
                        let (x, tap) = ((sample * height + iy - top) * width + ix - left, ky * kw + kx);
                        for channel in 0..i {
                            (0..o).for_each(|j| f(x * i + channel, (tap * i + channel) * o + j, pixel * o + j));
                        }
                    }
                }
            }
        }
    }

    /// The gradient by plain loops.
    fn naive(&self, batch: usize, residual: bool, values: &Values) -> Vec<f64> {
        let mut out = match self {
            Case::Weight(_) => vec![0.0; values.w.len()],
            Case::Input(_) | Case::Conv(..) if residual => values.residual.clone(),
            Case::Input(_) | Case::Conv(..) => vec![0.0; values.x.len()],
        };
        self.products(batch, |x, w, y| match self {
            Case::Weight(_) => out[w] += values.x[x] * values.d_y[y],
            Case::Input(_) | Case::Conv(..) => out[x] += values.w[w] * values.d_y[y],
        });
        out
    }

    fn values(&self, first: usize, batch: usize) -> Values {
        let [x, w, y] = self.shapes(1).map(|shape| shape.iter().product());
        let samples = |name: &str, len| (first..first + batch).flat_map(|i| noise(name, i, len)).collect();
        Values { x: samples("x", x), w: noise("w", 0, w), d_y: samples("d_y", y), residual: samples("residual", x) }
    }
}

struct Values {
    x: Vec<f64>,
    w: Vec<f64>,
    d_y: Vec<f64>,
    residual: Vec<f64>,
}

fn weight(pack: Pack, shape: &[usize]) -> Weight {
    Weight { component: Component::Unet, keys: vec!["down_blocks.w".into()], pack, shape: shape.to_vec() }
}

/// `w [taps · I, O]` in the order in which checkpoints store it, `[O, I, taps]`.
fn stored(shape: &[usize], w: &[f64]) -> Model {
    let [.., i, o] = *shape else { panic!("no weight") };
    let taps = w.len() / i / o;
    let at = |j: usize| w[(j % taps * i + j / taps % i) * o + j / taps / i];
    let values = (0..w.len()).map(|j| at(j) as f32).collect();
    let shape = if shape.len() == 2 { vec![o, i] } else { vec![o, i, shape[0], shape[1]] };
    weights(&[("down_blocks.w", shape, values)])
}

/// How a case is built.
#[derive(Clone, Copy)]
struct How {
    dtype: DType,
    batch: usize,
    residual: bool,
    /// The operands come out of an op instead of a buffer, so that the planner may let the residual be overwritten.
    through_op: bool,
    /// `w` is a weight of a checkpoint.
    held: bool,
}

impl How {
    fn new(dtype: DType, batch: usize) -> How {
        How { dtype, batch, residual: true, through_op: true, held: false }
    }

    fn program(self, case: &Case) -> Program {
        let mut b = Builder::new(format!("{case:?}"), self.dtype);
        let [x_shape, w_shape, y_shape] = case.shapes(self.batch);
        let mut input = |name: &str, shape: &[usize]| {
            let id = b.input(name, shape);
            if self.through_op { b.affine(id, 1.0, 0.0) } else { id }
        };
        let x = input("x", &x_shape);
        let d_y = input("d_y", &y_shape);
        let residual = self.residual.then(|| input("residual", &x_shape));
        let w = if self.held { b.weight(weight(case.pack(), &w_shape)) } else { b.input("w", &w_shape) };
        let out = b.push(case.op(x, w, d_y, residual))[0];
        b.output("out", out);
        b.finish().unwrap()
    }
}

/// Runs a program some times and returns its output.
fn run<T: Real>(mut cpu: Cpu<T>, program: &Program, values: &Values, model: &Model, times: usize) -> Vec<f64> {
    let planned = plan(program.clone(), |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, model).unwrap();
    for _ in 0..times {
        for &input in &program.inputs {
            let Origin::Input(name) = &program.value(input).origin else { continue };
            let data = match name.as_str() {
                "x" => &values.x,
                "w" => &values.w,
                "d_y" => &values.d_y,
                _ => &values.residual,
            };
            cpu.write(name, Data::F64(data)).unwrap();
        }
        cpu.run(id).unwrap();
    }
    let mut out = vec![0.0; program.value(program.outputs[0].1).len()];
    cpu.read("out", DataMut::F64(&mut out)).unwrap();
    out
}

/// Largest difference relative to the largest magnitude.
fn error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| if (a - b).is_nan() { f64::INFINITY } else { m.max((a - b).abs()) })
        / scale
}

#[test]
fn f64_agrees_with_plain_loops() {
    let model = no_weights();
    for case in cases() {
        for (residual, through_op) in [(false, false), (true, false), (true, true)] {
            let how = How { residual, through_op, ..How::new(DType::F64, 2) };
            let values = case.values(0, 2);
            let found = run(Cpu::<f64>::new().with_guards(true), &how.program(&case), &values, &model, 1);
            let off = error(&found, &case.naive(2, residual, &values));
            assert!(off < 1e-13, "{case:?} residual {residual} through_op {through_op}: off by {off:e}");
        }
    }
}

#[test]
fn f32_agrees_with_f64() {
    let model = no_weights();
    for case in cases() {
        let values = case.values(0, 3);
        let expected = run(Cpu::<f64>::new(), &How::new(DType::F64, 3).program(&case), &values, &model, 1);
        let single = How::new(DType::F32, 3).program(&case);
        let found = run(Cpu::<f32>::new().with_guards(true), &single, &values, &model, 1);
        let off = error(&found, &expected);
        assert!(off < 2e-6, "{case:?}: off by {off:e}");
    }
}

/// `⟨d_y, f(x + h v) - f(x - h v)⟩ / 2h` against `⟨d_x, v⟩`, and the same for the weight.
#[test]
fn f64_agrees_with_central_differences() {
    let model = no_weights();
    for case in cases() {
        let values = case.values(0, 2);
        let how = How { residual: false, ..How::new(DType::F64, 2) };
        let gradient = run(Cpu::<f64>::new(), &how.program(&case), &values, &model, 1);
        let mut b = Builder::new("forward", DType::F64);
        let [x, w, _] = case.shapes(2);
        let (x, w) = (b.input("x", &x), b.input("w", &w));
        let y = case.forward(&mut b, x, w);
        b.output("out", y);
        let forward = b.finish().unwrap();
        let direction = noise("direction", 0, gradient.len());
        let loss = |h: f64| {
            let moved = |from: &[f64]| from.iter().zip(&direction).map(|(x, v)| x + h * v).collect();
            let (mut x, mut w) = (values.x.clone(), values.w.clone());
            match case {
                Case::Weight(_) => w = moved(&w),
                Case::Input(_) | Case::Conv(..) => x = moved(&x),
            }
            let values = Values { x, w, d_y: vec![], residual: vec![] };
            run(Cpu::<f64>::new(), &forward, &values, &model, 1)
        };
        let along = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let expected = along(&gradient, &direction);
        let off = |h: f64| {
            let difference: Vec<f64> = loss(h).iter().zip(loss(-h)).map(|(up, down)| (up - down) / (2.0 * h)).collect();
            (along(&difference, &values.d_y) - expected).abs() / expected.abs().max(1e-3)
        };
        let best = (3..=7).map(|i| off(10f64.powi(-i))).fold(f64::INFINITY, f64::min);
        assert!(best < 1e-6, "{case:?}: off by {best:e}");
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let model = no_weights();
    for case in cases().into_iter().filter(|case| !matches!(case, Case::Weight(_))) {
        let how = How::new(DType::F32, 3);
        let together = run(Cpu::<f32>::new(), &how.program(&case), &case.values(0, 3), &model, 1);
        for (sample, of_sample) in together.chunks_exact(together.len() / 3).enumerate() {
            let one = How { batch: 1, ..how }.program(&case);
            let alone = run(Cpu::<f32>::new(), &one, &case.values(sample, 1), &model, 1);
            assert!(alone == of_sample, "{case:?}: sample {sample} differs in a batch");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_earlier_runs() {
    let model = no_weights();
    for case in cases() {
        let (program, values) = (How::new(DType::F32, 2).program(&case), case.values(0, 2));
        let result = |threads, times, guards| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(Cpu::<f32>::new().with_guards(guards), &program, &values, &model, times))
        };
        let expected = result(1, 1, false);
        for (threads, times, guards) in [(2, 1, false), (3, 1, true), (7, 2, false)] {
            assert!(result(threads, times, guards) == expected, "{case:?} with {threads} threads, {times} runs");
        }
    }
}

#[test]
fn other_instruction_sets_agree() {
    let model = no_weights();
    let archs = lesser_archs();
    for case in cases() {
        let (program, values) = (How::new(DType::F32, 1).program(&case), case.values(0, 1));
        let expected = run(Cpu::<f32>::new(), &program, &values, &model, 1);
        for &arch in &archs {
            let off = error(&run(Cpu::<f32>::on(arch).with_guards(true), &program, &values, &model, 1), &expected);
            assert!(off < 2e-6, "{case:?} on {arch:?}: off by {off:e}");
        }
    }
}

/// What the forward packed gives the bits of the plain matrix.
#[test]
fn weights_agree_with_inputs() {
    for case in cases().into_iter().filter(|case| !matches!(case, Case::Weight(_))) {
        let (how, values) = (How::new(DType::F32, 2), case.values(0, 2));
        let model = stored(&case.shapes(2)[1], &values.w);
        let from_input = run(Cpu::<f32>::new(), &how.program(&case), &values, &model, 1);
        let held = How { held: true, ..how }.program(&case);
        let from_weight = run(Cpu::<f32>::new(), &held, &values, &model, 1);
        assert!(from_weight == from_input, "{case:?}");
    }
}

/// A GEGLU's weight, whose halves are packed apart, read by the fused op, by a plain product of all its columns and by the
/// gradient, all in one executor; and a weight packed otherwise is refused.
#[test]
fn all_readers_of_a_geglu_share_its_weight() {
    for (k, n) in [(33, 2 * 50), (20, 2), (64, 2 * 128), (40, 2 * 77)] {
        let values = Case::Input([5, k, n]).values(0, 1);
        let model = stored(&[k, n], &values.w);
        let build = |reader: usize, pack: Option<Pack>| {
            let mut b = Builder::new("reader", DType::F32);
            let w = match pack {
                Some(pack) => b.weight(weight(pack, &[k, n])),
                None => b.input("w", &[k, n]),
            };
            let activation = if reader == 0 { Activation::Geglu } else { Activation::None };
            let op = if reader == 2 {
                let d_y = b.input("d_y", &[1, 5, n]);
                Op::GemmBackward(GemmBackward::Input { d_y, w, residual: None })
            } else {
                let x = b.input("x", &[1, 5, k]);
                Op::Gemm(Gemm { x, w, bias: None, residual: None, activation })
            };
            let out = b.push(op)[0];
            b.output(format!("out{reader}"), out);
            b.finish().unwrap()
        };
        let mut cpu = Cpu::<f32>::new();
        for reader in 0..3 {
            let read = |cpu: &mut Cpu<f32>, program: Program| {
                let mut out = vec![0.0f32; program.value(program.outputs[0].1).len()];
                let planned = plan(program, |program, node| cpu.workspace(program, node));
                let id = cpu.load(planned, &model).unwrap();
                for (name, data) in [("x", &values.x), ("d_y", &values.d_y), ("w", &values.w)] {
                    // Not all are there yet.
                    let _ = cpu.write(name, Data::F64(data));
                }
                cpu.run(id).unwrap();
                cpu.read(&format!("out{reader}"), DataMut::F32(&mut out)).unwrap();
                out
            };
            let held = read(&mut cpu, build(reader, Some(Pack::Geglu)));
            assert!(held == read(&mut cpu, build(reader, None)), "{k}x{n}: reader {reader}");
        }
        let planned = plan(build(0, Some(Pack::Linear)), |_, _| 0);
        let message = cpu.load(planned, &model).unwrap_err().to_string();
        assert!(message.contains("packed as Linear, is read as that of a GEGLU"), "{message}");
    }
}
