//! One list of op cases for correctness, gradient and speed tests: each appends one op to a builder.

#[path = "cases_backward.rs"]
mod backward;

use rarebit::program::*;

/// How a case gets its operands.
pub struct Inputs {
    pub b: Builder,
    pub batch: usize,
    /// Operands come out of an op instead of a buffer, so that the planner may let the case's op overwrite them.
    pub through_op: bool,
    pub batched: Vec<String>,
    pub ints: Vec<(String, Vec<i32>)>,
}

impl Inputs {
    /// An operand whose first dimension is the batch.
    pub fn batched(&mut self, name: &str, rest: &[usize]) -> ValueId {
        self.batched.push(name.to_string());
        self.shared(name, &[&[self.batch], rest].concat())
    }

    /// The same of the accumulator type.
    pub fn batched_accumulator(&mut self, name: &str, rest: &[usize]) -> ValueId {
        self.batched.push(name.to_string());
        let id = self.b.accumulator_input(name, &[&[self.batch], rest].concat());
        if self.through_op { self.b.affine(id, 1.0, 0.0) } else { id }
    }

    /// An operand that all samples share.
    pub fn shared(&mut self, name: &str, shape: &[usize]) -> ValueId {
        let id = self.b.input(name, shape);
        if self.through_op { self.b.affine(id, 1.0, 0.0) } else { id }
    }

    /// An i32 buffer with one row per sample.
    pub fn ints(&mut self, name: &str, rest: &[usize], value: impl Fn(usize) -> i32) -> ValueId {
        self.batched.push(name.to_string());
        let shape = [&[self.batch], rest].concat();
        self.ints.push((name.to_string(), (0..shape.iter().product()).map(value).collect()));
        self.b.input_i32(name, &shape)
    }
}

/// Appends the op of a case and returns its outputs.
pub type Build = dyn Fn(&mut Inputs) -> Vec<ValueId> + Sync;

/// A one-op program of any batch.
pub struct Case {
    pub name: String,
    pub build: Box<Build>,
}

/// A case as a program, with what is needed to fill its buffers.
pub struct Built {
    pub program: Program,
    /// Buffers whose first dimension is the batch.
    pub batched: Vec<String>,
    pub ints: Vec<(String, Vec<i32>)>,
}

impl Case {
    pub fn new(name: impl Into<String>, build: impl Fn(&mut Inputs) -> Vec<ValueId> + Sync + 'static) -> Case {
        Case { name: name.into(), build: Box::new(build) }
    }

    /// The program, its outputs named `out0`, `out1`, ...
    pub fn program(&self, dtype: DType, batch: usize, through_op: bool) -> Built {
        let b = Builder::new(self.name.clone(), dtype);
        let mut inputs = Inputs { b, batch, through_op, batched: vec![], ints: vec![] };
        let outputs = (self.build)(&mut inputs);
        for (i, &id) in outputs.iter().enumerate() {
            inputs.b.output(format!("out{i}"), id);
        }
        let Inputs { b, batched, ints, .. } = inputs;
        Built { program: b.finish().unwrap(), batched, ints }
    }
}

/// Every op, with the shapes where kernels go wrong: odd sizes, tails, one row, one column, padding, strides, column offsets.
pub fn all() -> Vec<Case> {
    let forward = [gemms(), convolutions(), attentions(), norms(), elementwise(), rest(), underived()];
    forward.into_iter().chain([backward::attentions(), backward::norms()]).flatten().collect()
}

pub fn gemms() -> Vec<Case> {
    let mut cases = vec![];
    let shapes = [
        (1, 1, 1),
        (1, 4, 3),
        (2, 16, 16),
        (3, 7, 17),
        (5, 33, 64),
        (7, 384, 80),
        (13, 385, 40),
        (77, 100, 130),
        (200, 65, 64),
        (401, 64, 96),
        (430, 770, 24),
        (3, 1031, 7),
        (5, 1100, 24),
        (70, 900, 50),
    ];
    for (m, k, n) in shapes {
        let activations = [
            Activation::None,
            Activation::Silu,
            Activation::Gelu,
            Activation::QuickGelu,
            Activation::GeluTanh,
            Activation::Geglu,
        ];
        for (i, activation) in activations.into_iter().enumerate() {
            for (bias, residual) in [(false, false), (true, false), (false, true), (true, true)] {
                // Large shapes once per activation.
                if m > 20 && (bias, residual) != (i % 2 == 0, i % 3 != 1) {
                    continue;
                }
                let columns = if activation == Activation::Geglu { 2 * n } else { n };
                let name = format!("gemm {m}x{k}x{n} {activation:?} bias {bias} residual {residual}");
                cases.push(Case::new(name, move |f| {
                    let x = f.batched("x", &[m, k]);
                    let w = f.shared("w", &[k, columns]);
                    let bias = bias.then(|| f.shared("bias", &[columns]));
                    let residual = residual.then(|| f.batched("residual", &[m, n]));
                    f.b.push(Op::Gemm(Gemm { x, w, bias, residual, activation }))[..1].to_vec()
                }));
            }
        }
    }
    cases
}

/// Size, channels in and out, kernel, stride, padding, and what is added: bias, shift of one sample or all, residual.
type Convolution = ([usize; 2], [usize; 2], [usize; 2], usize, [usize; 4], &'static str);

pub fn convolutions() -> Vec<Case> {
    let list: Vec<Convolution> = vec![
        ([1, 1], [1, 1], [1, 1], 1, [0; 4], ""),
        ([5, 7], [3, 5], [3, 3], 1, [1; 4], "b"),
        ([8, 8], [4, 32], [3, 3], 1, [1; 4], "b"),
        ([9, 6], [32, 17], [3, 3], 1, [1; 4], "bsr"),
        ([9, 6], [40, 48], [3, 3], 2, [1; 4], "bS"),
        ([8, 10], [33, 20], [3, 3], 2, [0, 0, 1, 1], "br"),
        ([6, 6], [64, 64], [1, 1], 1, [0; 4], "bSr"),
        ([7, 5], [36, 24], [1, 1], 2, [0; 4], "S"),
        ([5, 4], [20, 12], [1, 1], 1, [0; 4], "s"),
        ([4, 4], [5, 6], [1, 1], 1, [1, 0, 2, 3], "r"),
        ([12, 9], [40, 70], [5, 3], 1, [2, 1, 0, 3], "sr"),
        ([11, 13], [6, 9], [2, 4], 3, [0, 2, 1, 0], "bs"),
        ([16, 16], [400, 80], [3, 3], 1, [1; 4], "bSr"),
        ([20, 22], [48, 4], [3, 3], 1, [1; 4], "b"),
        ([14, 16], [14, 30], [14, 14], 14, [0; 4], ""),
        ([3, 3], [64, 130], [3, 3], 1, [1; 4], "bsr"),
        ([6, 5], [120, 37], [3, 3], 1, [1; 4], "bSr"),
        ([6, 5], [120, 72], [3, 3], 1, [1; 4], "bsr"),
    ];
    let case = |(size, channels, kernel, stride, padding, extra): Convolution| {
        let name =
            format!("conv2d {size:?} {channels:?} kernel {kernel:?} stride {stride} padding {padding:?} {extra}");
        Case::new(name, move |f| {
            let [i, o] = channels;
            let x = f.batched("x", &[size[0], size[1], i]);
            let w = f.shared("w", &[kernel[0], kernel[1], i, o]);
            let bias = extra.contains('b').then(|| f.shared("bias", &[o]));
            let shift = if extra.contains('s') {
                Some(Cols { value: f.shared("shift", &[1, o + 5]), at: 5 })
            } else if extra.contains('S') {
                Some(Cols { value: f.batched("shift", &[o + 7]), at: 3 })
            } else {
                None
            };
            let out = |i: usize| (size[i] + padding[i] + padding[i + 2] - kernel[i]) / stride + 1;
            let residual = extra.contains('r').then(|| f.batched("residual", &[out(0), out(1), o]));
            f.b.push(Op::Conv2d(Conv2d { x, w, bias, shift, residual, stride, padding }))[..1].to_vec()
        })
    };
    list.into_iter().map(case).collect()
}

pub fn attentions() -> Vec<Case> {
    let mut cases = vec![];
    let shapes = [
        (1, 1, 1, 1),
        (5, 5, 2, 3),
        (40, 50, 2, 24),
        (5, 77, 2, 40),
        (77, 77, 3, 64),
        (130, 130, 2, 80),
        (33, 33, 2, 104),
        (64, 300, 1, 160),
        (19, 19, 1, 512),
        (5, 13, 2, 64),
        (70, 77, 2, 64),
        (33, 140, 2, 40),
        (100, 110, 1, 168),
        (520, 520, 2, 8),
        (100, 1000, 1, 40),
        (150, 300, 1, 64),
    ];
    for (queries, keys, heads, dim) in shapes {
        for causal in [false, true] {
            if causal && queries > keys {
                continue;
            }
            cases.push(Case::new(
                format!("attention {queries}x{keys} heads {heads}x{dim} causal {causal}"),
                move |f| {
                    let width = heads * dim;
                    let (q, k, v) = if queries == keys {
                        // One fused projection.
                        let qkv = f.batched("qkv", &[queries, 3 * width]);
                        let cols = |at| Cols { value: qkv, at };
                        (cols(0), cols(width), cols(2 * width))
                    } else {
                        let kv = f.batched("kv", &[keys, 2 * width + 3]);
                        let q = f.batched("q", &[queries, width]).into();
                        (q, Cols { value: kv, at: 1 }, Cols { value: kv, at: width + 3 })
                    };
                    f.b.push(Op::Attention(Attention { q, k, v, heads, head_dim: dim, causal }))
                },
            ));
        }
    }
    cases
}

pub fn norms() -> Vec<Case> {
    let mut cases = vec![];
    let shapes: [(&[usize], usize); 7] = [
        (&[1, 1], 1),
        (&[3, 5, 6], 3),
        (&[8, 8, 64], 32),
        (&[7, 9, 40], 8),
        (&[17, 32], 32),
        (&[50, 30, 96], 32),
        (&[4, 4, 2560], 32),
    ];
    for (rest, groups) in shapes {
        for silu in [false, true] {
            cases.push(Case::new(format!("group_norm {rest:?} groups {groups} silu {silu}"), move |f| {
                let x = f.batched("x", rest);
                let c = rest[rest.len() - 1];
                let (gamma, beta) = (f.shared("gamma", &[c]), f.shared("beta", &[c]));
                f.b.push(Op::Norm(Norm::Group { x, gamma, beta, groups, eps: 1e-5, silu }))
            }));
        }
        cases.push(Case::new(format!("layer_norm {rest:?}"), move |f| {
            let x = f.batched("x", rest);
            let c = rest[rest.len() - 1];
            let (gamma, beta) = (f.shared("gamma", &[c]), f.shared("beta", &[c]));
            f.b.push(Op::Norm(Norm::Layer { x, gamma, beta, eps: 1e-5 }))
        }));
    }
    for width in [1, 3, 40, 1100] {
        cases.push(Case::new(format!("softmax {width}"), move |f| {
            let x = f.batched("x", &[5, width]);
            f.b.push(Op::Rowwise(Rowwise::Softmax { x }))
        }));
        for eps in [1e-12, 3.0] {
            cases.push(Case::new(format!("unit {width} eps {eps}"), move |f| {
                let x = f.batched("x", &[5, width]);
                f.b.push(Op::Rowwise(Rowwise::Unit { x, eps }))
            }));
        }
        cases.push(Case::new(format!("cross_entropy {width}"), move |f| {
            let logits = f.batched("logits", &[5, width]);
            let targets = f.ints("targets", &[5], |i| (i * 7 % width) as i32 - i32::from(i % 4 == 3) * 10_000);
            f.b.push(Op::Rowwise(Rowwise::CrossEntropy { logits, targets }))
        }));
    }
    // More than a chunk of rows, of elements; no row but the sample itself.
    for rest in [&[3][..], &[7, 5, 3], &[150, 1, 320], &[40_000, 1]] {
        cases.push(Case::new(format!("dot {rest:?}"), move |f| {
            let (a, b) = (f.batched("a", rest), f.batched("b", rest));
            f.b.push(Op::Norm(Norm::Dot { a, b }))
        }));
        cases.push(Case::new(format!("sum {rest:?}"), move |f| {
            let x = f.batched("x", rest);
            f.b.push(Op::Norm(Norm::Sum { x, over: Over::Middle }))
        }));
    }
    cases
}

pub fn elementwise() -> Vec<Case> {
    let mut cases = vec![];
    for [rows, width] in [[1, 1], [7, 5], [300, 320]] {
        cases.push(Case::new(format!("spread over {rows} rows of {width}"), move |f| {
            let x = f.batched("x", &[width]);
            let samples = f.b.shape(x)[0];
            f.b.push(Op::Elementwise(Elementwise::Spread { x, shape: vec![samples, rows, width] }))
        }));
        cases.push(Case::new(format!("spread over all {rows} rows of {width}"), move |f| {
            let (x, y) = (f.shared("x", &[1, width]), f.batched("y", &[rows, width]));
            let shape = f.b.shape(y);
            let x = f.b.push(Op::Elementwise(Elementwise::Spread { x, shape }))[0];
            vec![f.b.add(x, y)]
        }));
    }
    for width in [1, 37, 5000] {
        use Activation::*;
        for activation in [None, Silu, Gelu, QuickGelu, GeluTanh] {
            cases.push(Case::new(format!("{activation:?} {width}"), move |f| {
                let x = f.batched("x", &[width]);
                vec![f.b.activate(x, activation)]
            }));
        }
        cases.push(Case::new(format!("add {width}"), move |f| {
            let (a, b) = (f.batched("a", &[width]), f.batched("b", &[width]));
            vec![f.b.add(a, b)]
        }));
        cases.push(Case::new(format!("add to itself {width}"), move |f| {
            let a = f.batched("a", &[width]);
            vec![f.b.add(a, a)]
        }));
        cases.push(Case::new(format!("affine {width}"), move |f| {
            let x = f.batched("x", &[width]);
            vec![f.b.affine(x, -1.7, 0.3)]
        }));
        cases.push(Case::new(format!("concat {width}"), move |f| {
            let (a, b) = (f.batched("a", &[3, width]), f.batched("b", &[3, 7]));
            vec![f.b.concat(a, b)]
        }));
        cases.push(Case::new(format!("columns {width}"), move |f| {
            let x = f.batched("x", &[3, width + 5]);
            vec![f.b.columns(Cols { value: x, at: 2 }, width)]
        }));
        cases.push(Case::new(format!("concat_tokens {width}"), move |f| {
            let (a, b) = (f.batched("a", &[3, width]), f.batched("b", &[5, width]));
            vec![f.b.concat_tokens(a, b)]
        }));
        cases.push(Case::new(format!("token_rows {width}"), move |f| {
            let x = f.batched("x", &[9, width]);
            vec![f.b.token_rows(x, 4, 3)]
        }));
        cases.push(Case::new(format!("geglu {width}"), move |f| {
            let x = f.batched("x", &[3, 2 * width]);
            vec![f.b.geglu(x)]
        }));
        cases.push(Case::new(format!("mul {width}"), move |f| {
            let (a, b) = (f.batched("a", &[width]), f.batched("b", &[width]));
            vec![f.b.mul(a, b)]
        }));
        cases.push(Case::new(format!("scale {width}"), move |f| {
            let (x, by) = (f.batched("x", &[2, width]), f.batched_accumulator("by", &[]));
            vec![f.b.scale(x, by)]
        }));
        cases.push(Case::new(format!("channel_affine {width}"), move |f| {
            let x = f.batched("x", &[width, 3]);
            vec![f.b.channel_affine(x, &[0.5, -2.0, 1.5], &[0.25, 0.0, -1.0])]
        }));
        cases.push(Case::new(format!("clamp and detach {width}"), move |f| {
            let x = f.batched("x", &[width]);
            let clamped = f.b.clamp(x, -0.5, 0.75);
            let detached = f.b.detach(x);
            vec![clamped, detached]
        }));
        cases.push(Case::new(format!("columns of wide rows {width}"), move |f| {
            // Multiples of 16 bytes.
            let (a, b) = (f.batched("a", &[2, 8 * width]), f.batched("b", &[2, 40]));
            let x = f.b.concat(a, b);
            vec![f.b.columns(Cols { value: x, at: 8 }, 8 * width + 24)]
        }));
        cases.push(Case::new(format!("constant {width}"), move |f| vec![f.b.constant(&[f.batch, width], 0.1)]));
    }
    cases.push(Case::new("channel_affine of many channels", |f| {
        let x = f.batched("x", &[7, 37]);
        let [scale, shift] = [0.1, -0.3].map(|step| (0..37).map(|c| step * c as f64 - 1.0).collect::<Vec<f64>>());
        vec![f.b.channel_affine(x, &scale, &shift)]
    }));
    for f in [Scalar::Sqrt, Scalar::Square, Scalar::Ln, Scalar::Exp, Scalar::Reciprocal, Scalar::Spherical] {
        cases.push(Case::new(format!("{f:?}"), move |inputs| {
            // Within every function's domain: 0.5 to 1, and 1.
            let x = inputs.batched("x", &[37]);
            let x = inputs.b.affine(x, 0.125, 0.75);
            let x = inputs.b.clamp(x, 0.5, 1.0);
            vec![inputs.b.map(x, f)]
        }));
    }
    cases
}

/// Casts between all types a device holds; the CPU's executor is of one type.
pub fn casts() -> Vec<Case> {
    let mut cases = vec![];
    for width in [1, 37, 5000] {
        for to in [DType::F16, DType::BF16, DType::F32] {
            cases.push(Case::new(format!("cast to {to} {width}"), move |f| {
                let x = f.batched("x", &[width]);
                f.b.push(Op::Elementwise(Elementwise::Cast { x, to }))
            }));
        }
    }
    cases
}

/// Every way to resize.
pub const INTERPOLATIONS: [Interpolation; 4] = [
    Interpolation { filter: Filter::Bilinear, antialias: false },
    Interpolation { filter: Filter::Bilinear, antialias: true },
    Interpolation { filter: Filter::Bicubic, antialias: false },
    Interpolation { filter: Filter::Bicubic, antialias: true },
];

/// Resampling, embeddings and updates, and the ops that move whole samples.
pub fn rest() -> Vec<Case> {
    let mut cases = vec![];
    for (h, w, height, width, c) in
        [(1, 1, 2, 2, 1), (3, 5, 6, 10, 7), (4, 4, 7, 8, 3), (2, 3, 4, 5, 64), (2, 3, 3, 5, 4)]
    {
        cases.push(Case::new(format!("nearest_2x {h}x{w}x{c} to {height}x{width}"), move |f| {
            let x = f.batched("x", &[h, w, c]);
            vec![f.b.nearest_2x(x, height, width)]
        }));
    }
    for how in INTERPOLATIONS {
        for (h, w, height, width, c) in
            [(1, 1, 3, 2, 1), (5, 9, 2, 4, 3), (4, 3, 9, 5, 2), (16, 18, 7, 8, 3), (70, 150, 33, 40, 3)]
        {
            cases.push(Case::new(format!("resize {h}x{w}x{c} to {height}x{width} {how:?}"), move |f| {
                let x = f.batched("x", &[h, w, c]);
                vec![f.b.resize(x, height, width, how)]
            }));
        }
    }
    cases.push(Case::new("crop", |f| {
        let x = f.batched("x", &[5, 7, 3]);
        vec![f.b.crop(x, 1, 2, 3, 4)]
    }));
    cases.push(Case::new("tokens with extra rows", |f| {
        let ids = f.ints("ids", &[7], |i| (i * 5 % 14) as i32);
        let (table, extra) = (f.shared("table", &[11, 20]), f.shared("extra", &[3, 20]));
        let positions = f.shared("positions", &[9, 20]);
        vec![f.b.tokens_with(ids, table, extra, positions)]
    }));
    cases.push(Case::new("mix", |f| {
        let weights = f.batched("weights", &[5]);
        let ids = f.ints("ids", &[5], |i| (i * 7 % 12) as i32 - 1);
        let table = f.shared("table", &[11, 20]);
        vec![f.b.mix(weights, ids, table)]
    }));
    cases.push(Case::new("patches", |f| {
        let x = f.batched("x", &[3, 2, 20]);
        let (class, positions) = (f.shared("class", &[20]), f.shared("positions", &[7, 20]));
        vec![f.b.patches(x, class, positions)]
    }));
    cases.push(Case::new("row", |f| {
        let x = f.batched("x", &[5, 20]);
        vec![f.b.row(x, 3)]
    }));
    cases.push(Case::new("tokens", |f| {
        let ids = f.ints("ids", &[7], |i| (i * 5 % 11) as i32);
        let (table, positions) = (f.shared("table", &[11, 20]), f.shared("positions", &[9, 20]));
        vec![f.b.tokens(ids, table, positions)]
    }));
    cases.push(Case::new("pool", |f| {
        let x = f.batched("x", &[6, 10]);
        let at = f.ints("at", &[], |i| (i * 4 % 6) as i32);
        vec![f.b.pool(x, at)]
    }));
    for (flip, shift) in [(true, 0.0), (false, 1.0)] {
        cases.push(Case::new(format!("sinusoidal flip {flip}"), move |f| {
            let x = f.batched("x", &[3]);
            vec![f.b.sinusoidal(x, 20, flip, shift)]
        }));
    }
    for terms in [1, 2, 4, 20] {
        cases.push(Case::new(format!("combine {terms}"), move |f| {
            let ids: Vec<ValueId> = (0..terms).map(|i| f.batched(&format!("x{i}"), &[33, 129])).collect();
            let coefficients = f.b.scalars("coefficients", terms);
            vec![f.b.combine(&ids, coefficients)]
        }));
    }
    cases
}

/// Ops without a derivative to some of their operands: mixtures of a table, optimisers, noise.
pub fn underived() -> Vec<Case> {
    let mut cases = vec![];
    // Rows of multiples of 16 bytes.
    cases.push(Case::new("tokens, mix and pool of wide rows", |f| {
        let ids = f.ints("ids", &[7], |i| (i * 5 % 11) as i32);
        let (table, positions) = (f.shared("table", &[11, 1040]), f.shared("positions", &[9, 1040]));
        let (weights, at) = (f.batched("weights", &[7]), f.ints("at", &[], |i| (i * 4 % 7) as i32));
        let x = f.b.tokens(ids, table, positions);
        vec![f.b.mix(weights, ids, table), f.b.pool(x, at), x]
    }));
    let state = |f: &mut Inputs, squared: &str| {
        let [p, g, a, b] = ["p", "g", "a", "b"].map(|name| {
            let x = f.batched(name, &[33, 129]);
            if name == squared { f.b.map(x, Scalar::Square) } else { x }
        });
        [p, g, a, b]
    };
    // Scalars within the optimisers' domains, each about its own middle.
    let scalars = |f: &mut Inputs, middles: &[f64]| {
        let scalars = f.b.scalars("scalars", middles.len());
        f.b.channel_affine(scalars, &vec![0.2; middles.len()], middles)
    };
    cases.push(Case::new("adamw", move |f| {
        let (state, scalars) = (state(f, "b"), scalars(f, &[0.5; 7]));
        f.b.adamw(state, scalars).to_vec()
    }));
    cases.push(Case::new("rmsprop", move |f| {
        let (state, scalars) = (state(f, "a"), scalars(f, &[0.5, 0.5, 0.5, 0.5, 1.0, -0.7, 0.9]));
        f.b.rmsprop(state, scalars).to_vec()
    }));
    cases.push(Case::new("nesterov", move |f| {
        let ([p, g, b, _], scalars) = (state(f, ""), scalars(f, &[0.5; 2]));
        f.b.nesterov([p, g, b], scalars).to_vec()
    }));
    for rest in [&[1][..], &[70], &[5, 6, 4], &[9, 7, 3]] {
        cases.push(Case::new(format!("noise {rest:?}"), move |f| {
            let counter = f.ints("counter", &[4], |i| [1 - 3 * i as i32, 7, (i / 4) as i32, 0][i % 4]);
            let shape = [&[f.batch], rest].concat();
            vec![f.b.noise(counter, &shape)]
        }));
    }
    cases
}

/// What only kernels that keep rows and pixels in registers can get wrong: rows longer than those, many pixels of a block, groups
/// wider than a block, means a hundred deviations from 0.
pub fn registers() -> Vec<Case> {
    let mut cases = vec![];
    for (rest, groups) in [(&[400, 400, 1][..], 1), (&[2, 3, 1300], 1), (&[2, 2, 2048], 2), (&[50, 30, 96], 32)] {
        for (scale, shift) in [(1.0, 0.0), (0.01, 1.25)] {
            let name = format!("group_norm {rest:?} groups {groups} near {shift}");
            cases.push(Case::new(name, move |f| {
                let (x, gamma, beta) = backward::operands(f, rest);
                let x = f.b.affine(x, scale, shift);
                f.b.push(Op::Norm(Norm::Group { x, gamma, beta, groups, eps: 1e-8, silu: false }))
            }));
        }
        cases.push(Case::new(format!("group_norm_backward {rest:?} groups {groups} of many pixels"), move |f| {
            let (x, gamma, beta) = backward::operands(f, rest);
            let made = f.b.push(Op::Norm(Norm::Group { x, gamma, beta, groups, eps: 1e-5, silu: true }));
            let (mean, rstd, d_y) = (made[1], made[2], f.batched("d_y", rest));
            f.b.push(Op::Norm(Norm::GroupBackward { x, d_y, gamma, beta, mean, rstd, groups, silu: true }))
        }));
    }
    for width in [40, 1300, 21_000] {
        for (scale, shift) in [(1.0, 0.0), (0.01, 1.25)] {
            cases.push(Case::new(format!("layer_norm of {width} near {shift}"), move |f| {
                let (x, gamma, beta) = backward::operands(f, &[2, width]);
                let x = f.b.affine(x, scale, shift);
                f.b.push(Op::Norm(Norm::Layer { x, gamma, beta, eps: 1e-8 }))
            }));
        }
        cases.push(Case::new(format!("layer_norm_backward of {width}"), move |f| {
            let (x, gamma, beta) = backward::operands(f, &[2, width]);
            let made = f.b.push(Op::Norm(Norm::Layer { x, gamma, beta, eps: 1e-5 }));
            let (mean, rstd, d_y) = (made[1], made[2], f.batched("d_y", &[2, width]));
            f.b.push(Op::Norm(Norm::LayerBackward { x, d_y, gamma, mean, rstd }))
        }));
        cases.push(Case::new(format!("cross_entropy of {width}"), move |f| {
            let logits = f.batched("logits", &[2, width]);
            let targets = f.ints("targets", &[2], |i| (i * 7919 % width) as i32);
            let made = f.b.push(Op::Rowwise(Rowwise::CrossEntropy { logits, targets }));
            let d_loss = f.batched_accumulator("d_loss", &[2]);
            let d = f.b.push(Op::Rowwise(Rowwise::CrossEntropyBackward { logits, targets, lse: made[1], d_loss }));
            [made, d].concat()
        }));
        cases.push(Case::new(format!("unit_backward of {width}"), move |f| {
            let (x, d_y) = (f.batched("x", &[2, width]), f.batched("d_y", &[2, width]));
            let made = f.b.push(Op::Rowwise(Rowwise::Unit { x, eps: 1e-12 }));
            f.b.push(Op::Rowwise(Rowwise::UnitBackward { y: made[0], norm: made[1], d_y, eps: 1e-12 }))
        }));
    }
    cases
}

/// Ops that mix the batch, which have no meaning one sample at a time.
pub fn across_samples() -> Vec<Case> {
    moves_and_sums().into_iter().chain(backward::across_samples()).collect()
}

/// Those of them that are no backward ops.
pub fn moves_and_sums() -> Vec<Case> {
    let sums = [Over::Samples, Over::Rows].map(|over| {
        Case::new(format!("sum over {over:?}"), move |f| {
            let x = f.batched("x", &[70, 500]);
            f.b.push(Op::Norm(Norm::Sum { x, over }))
        })
    });
    let moves = [
        Case::new("repeat", |f| {
            let x = f.batched("x", &[5, 7]);
            vec![f.b.repeat(x, 3)]
        }),
        Case::new("slice", |f| {
            let x = f.shared("x", &[6, 1500]);
            vec![f.b.slice(x, 1, 4)]
        }),
        Case::new("outer_add", |f| {
            let (a, b) = (f.shared("a", &[4, 70]), f.batched("b", &[70]));
            vec![f.b.outer_add(a, b)]
        }),
        Case::new("select", |f| {
            let x = f.shared("x", &[4, 2, 70]);
            f.ints.push(("at".into(), vec![2]));
            let at = f.b.input_i32("at", &[1]);
            vec![f.b.select(x, at)]
        }),
        // Guidance and a sampler's step: latents of the accumulator type, both predictions in one value of the program's, fresh noise.
        Case::new("combine rows", |f| {
            let (x, noise) = (f.batched_accumulator("latents", &[33, 12]), f.batched_accumulator("noise", &[33, 12]));
            let value = f.shared("predictions", &[2 * f.batch, 33, 12]);
            let coefficients = f.b.scalars("coefficients", 4);
            let terms = [x.into(), Rows { value, at: f.batch }, value.into(), noise.into()];
            vec![f.b.combine(&terms, coefficients)]
        }),
        // Second predictions that are not aligned to 16 bytes, of more rows than are read.
        Case::new("combine rows of odd width", |f| {
            let x = f.batched_accumulator("latents", &[37]);
            let value = f.shared("predictions", &[f.batch + 2, 37]);
            let coefficients = f.b.scalars("coefficients", 2);
            vec![f.b.combine(&[x.into(), Rows { value, at: 1 }], coefficients)]
        }),
    ];
    moves.into_iter().chain(sums).collect()
}
