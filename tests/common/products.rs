//! Products, convolutions and their gradients as cases: shapes, operands, programs of one op, and the gradients by plain loops.

use super::inputs::{noise, weights};
use super::tolerance::round;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Model, Pack, Weight};

#[derive(Clone, Debug)]
pub enum Case {
    /// Rows, K, N.
    Input([usize; 3]),
    Weight([usize; 3]),
    /// Size, channels in and out, kernel, stride, padding.
    Conv([usize; 2], [usize; 2], [usize; 2], usize, [usize; 4]),
}

/// Shapes where kernels go wrong: odd sizes, tails, one row, one column, several K blocks, several chunks of rows; the large tile;
/// a reduced dimension that is split, with columns in fours, in twos and odd.
pub fn cases() -> Vec<Case> {
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
        [257, 264, 40],
        [20, 260, 268],
        [900, 9, 20],
        [390, 400, 70],
        [540, 24, 1030],
        [540, 1032, 24],
        [20, 1060, 1030],
        [5, 1999, 37],
        [70, 1304, 72],
        [130, 1344, 168],
        [9, 200, 488],
        [20, 72, 160],
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
        ([16, 17], [8, 260], [3, 3], 1, [1; 4]),
        ([16, 17], [264, 8], [3, 3], 1, [1; 4]),
        ([22, 25], [8, 1030], [3, 3], 1, [1; 4]),
        ([22, 25], [1032, 8], [3, 3], 1, [1; 4]),
        ([6, 5], [150, 149], [3, 3], 1, [1; 4]),
        ([5, 4], [146, 152], [3, 3], 2, [0, 0, 1, 1]),
        ([3, 4], [1000, 1006], [1, 1], 1, [0; 4]),
        ([9, 6], [64, 72], [3, 3], 1, [1; 4]),
        ([12, 9], [64, 128], [5, 3], 1, [2, 1, 0, 3]),
        ([2, 140], [128, 64], [3, 3], 1, [1; 4]),
        ([5, 4], [192, 192], [3, 3], 1, [1; 4]),
    ];
    let gemms = gemms.into_iter().flat_map(|shape| [Case::Input(shape), Case::Weight(shape)]);
    let convolutions = convolutions
        .into_iter()
        .map(|(size, channels, kernel, stride, padding)| Case::Conv(size, channels, kernel, stride, padding));
    gemms.chain(convolutions).collect()
}

impl Case {
    /// Shapes of `x`, `w` and `y`.
    pub fn shapes(&self, batch: usize) -> [Vec<usize>; 3] {
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
    pub fn pack(&self) -> Pack {
        if matches!(self, Case::Conv(..)) { Pack::Conv } else { Pack::Linear }
    }

    pub fn forward(&self, b: &mut Builder, x: ValueId, w: ValueId) -> ValueId {
        match *self {
            Case::Input(_) | Case::Weight(_) => {
                b.gemm(Gemm { x, w, bias: None, residual: None, activation: Activation::None })
            }
            Case::Conv(_, _, _, stride, padding) => {
                b.conv2d(Conv2d { x, w, bias: None, shift: None, residual: None, stride, padding })
            }
        }
    }

    pub fn op(&self, x: ValueId, w: ValueId, d_y: ValueId, residual: Option<ValueId>) -> Op {
        match *self {
            Case::Input(_) => Op::GemmBackward(GemmBackward::Input { d_y, w, residual }),
            Case::Weight(_) => Op::GemmBackward(GemmBackward::Weight { x, d_y }),
            Case::Conv(size, _, _, stride, padding) => {
                Op::Conv2dBackward(Conv2dBackward { d_y, w, residual, size, stride, padding })
            }
        }
    }

    /// Calls `f` for every product of the forward op: indices into `x`, `w` and `y`.
    pub fn products(&self, batch: usize, mut f: impl FnMut(usize, usize, usize)) {
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
    pub fn naive(&self, batch: usize, residual: bool, values: &Values) -> Vec<f64> {
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

    pub fn values(&self, first: usize, batch: usize) -> Values {
        let [x, w, y] = self.shapes(1).map(|shape| shape.iter().product());
        let samples = |name: &str, len| (first..first + batch).flat_map(|i| noise(name, i, len)).collect();
        Values { x: samples("x", x), w: noise("w", 0, w), d_y: samples("d_y", y), residual: samples("residual", x) }
    }
}

pub struct Values {
    pub x: Vec<f64>,
    pub w: Vec<f64>,
    pub d_y: Vec<f64>,
    pub residual: Vec<f64>,
}

pub fn weight(pack: Pack, shape: &[usize]) -> Weight {
    Weight { component: Component::Unet, keys: vec!["down_blocks.w".into()], pack, shape: shape.to_vec() }
}

/// `w [taps · I, O]` in the order in which checkpoints store it, `[O, I, taps]`.
pub fn stored(shape: &[usize], w: &[f64]) -> Model {
    let [.., i, o] = *shape else { panic!("no weight") };
    let taps = w.len() / i / o;
    let at = |j: usize| w[(j % taps * i + j / taps % i) * o + j / taps / i];
    let values = (0..w.len()).map(|j| at(j) as f32).collect();
    let shape = if shape.len() == 2 { vec![o, i] } else { vec![o, i, shape[0], shape[1]] };
    weights(&[("down_blocks.w", shape, values)])
}

/// How a case is built.
#[derive(Clone, Copy)]
pub struct How {
    pub dtype: DType,
    pub batch: usize,
    pub residual: bool,
    /// The operands come out of an op instead of a buffer, so that the planner may let the residual be overwritten.
    pub through_op: bool,
    /// `w` is a weight of a checkpoint.
    pub held: bool,
}

impl How {
    pub fn new(dtype: DType, batch: usize) -> How {
        How { dtype, batch, residual: true, through_op: true, held: false }
    }

    pub fn program(self, case: &Case) -> Program {
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

    /// The forward op with every column active (`activation` of a product), without residual.
    pub fn forward(self, case: &Case, activation: Activation) -> Program {
        let mut b = Builder::new(format!("forward of {case:?}"), self.dtype);
        let [x_shape, w_shape, _] = case.shapes(self.batch);
        let x = b.input("x", &x_shape);
        let pack = if activation == Activation::Geglu { Pack::Geglu } else { case.pack() };
        let w = if self.held { b.weight(weight(pack, &w_shape)) } else { b.input("w", &w_shape) };
        let out = match case {
            Case::Conv(..) => case.forward(&mut b, x, w),
            Case::Input(_) | Case::Weight(_) => b.gemm(Gemm { x, w, bias: None, residual: None, activation }),
        };
        b.output("out", out);
        b.finish().unwrap()
    }
}

/// Operands as a program of this type holds them.
pub fn rounded(values: Values, dtype: DType) -> Values {
    let all = |values: Vec<f64>| values.into_iter().map(|x| round(dtype, x)).collect();
    let Values { x, w, d_y, residual } = values;
    Values { x: all(x), w: all(w), d_y: all(d_y), residual: all(residual) }
}

/// The gradient of a case and its forward, and that of a GEGLU where it has an even number of columns.
pub fn programs(case: &Case, how: How) -> Vec<(String, Program)> {
    let mut programs = vec![("backward".to_string(), how.program(case))];
    let even = matches!(case, Case::Input([_, _, n]) if n % 2 == 0);
    for activation in [Some(Activation::None), even.then_some(Activation::Geglu)].into_iter().flatten() {
        programs.push((format!("forward {activation:?}"), how.forward(case, activation)));
    }
    programs
}

/// Runs a program some times and returns its output.
pub fn run(mut executor: impl Executor, program: &Program, values: &Values, model: &Model, times: usize) -> Vec<f64> {
    let planned = plan(program.clone(), |program, node| executor.workspace(program, node));
    let id = executor.load(planned, model).unwrap();
    for _ in 0..times {
        for &input in &program.inputs {
            let Origin::Input(name) = &program.value(input).origin else { continue };
            let data = match name.as_str() {
                "x" => &values.x,
                "w" => &values.w,
                "d_y" => &values.d_y,
                _ => &values.residual,
            };
            executor.write(name, Data::F64(data)).unwrap();
        }
        executor.run(id).unwrap();
    }
    let mut out = vec![0.0; program.value(program.outputs[0].1).len()];
    executor.read("out", DataMut::F64(&mut out)).unwrap();
    out
}
