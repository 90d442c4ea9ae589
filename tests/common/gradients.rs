//! Gradients of elementwise ops, resampling, embeddings and updates: each a forward op and the op that takes it back.
//! Their programs have the buffer `leaf` (the backward also `d_y`) and the output `out`.

use super::cases::{Built, INTERPOLATIONS, Inputs};
use rarebit::program::*;

/// Appends the forward op to its leaf.
type Forward = dyn Fn(&mut Inputs, ValueId) -> ValueId + Sync;
/// Appends the backward op to the leaf and the gradient of what the forward op made.
type Backward = dyn Fn(&mut Inputs, ValueId, ValueId) -> ValueId + Sync;

/// Takes noise in [-2, 2] to where an op is smooth.
type Domain = fn(f64) -> f64;

pub struct Gradient {
    pub name: String,
    /// Shape of the leaf, after the batch if it is `batched`.
    leaf: Vec<usize>,
    batched: bool,
    /// The forward op is linear in the leaf.
    pub linear: bool,
    /// Each sample's gradient is its own.
    pub per_sample: bool,
    pub domain: Domain,
    forward: Box<Forward>,
    backward: Box<Backward>,
}

impl Gradient {
    fn new(
        name: impl Into<String>,
        leaf: &[usize],
        forward: impl Fn(&mut Inputs, ValueId) -> ValueId + Sync + 'static,
        backward: impl Fn(&mut Inputs, ValueId, ValueId) -> ValueId + Sync + 'static,
    ) -> Gradient {
        Gradient {
            name: name.into(),
            leaf: leaf.to_vec(),
            batched: true,
            linear: true,
            per_sample: true,
            domain: |x| x,
            forward: Box::new(forward),
            backward: Box::new(backward),
        }
    }

    fn smooth(self, domain: Domain) -> Gradient {
        Gradient { linear: false, domain, ..self }
    }

    /// Of a leaf all samples share, whose shape is all of its shape.
    fn shared(self) -> Gradient {
        Gradient { batched: false, per_sample: false, ..self }
    }

    /// Of an op that moves samples about.
    fn across(self) -> Gradient {
        Gradient { per_sample: false, ..self }
    }

    fn inputs(&self, dtype: DType, batch: usize, through_op: bool) -> (Inputs, ValueId) {
        let b = Builder::new(self.name.clone(), dtype);
        let mut inputs = Inputs { b, batch, through_op, batched: vec![], ints: vec![] };
        let leaf = if self.batched { inputs.batched("leaf", &self.leaf) } else { inputs.shared("leaf", &self.leaf) };
        (inputs, leaf)
    }

    pub fn forward(&self, batch: usize) -> Built {
        let (mut inputs, leaf) = self.inputs(DType::F64, batch, false);
        let out = (self.forward)(&mut inputs, leaf);
        finish(inputs, out)
    }

    pub fn backward(&self, dtype: DType, batch: usize, through_op: bool) -> Built {
        let y = self.forward(batch).program.outputs[0].1;
        let shape = self.forward(batch).program.shape(y).to_vec();
        let (mut inputs, leaf) = self.inputs(dtype, batch, through_op);
        let d_y = if self.per_sample { inputs.batched("d_y", &shape[1..]) } else { inputs.shared("d_y", &shape) };
        let out = (self.backward)(&mut inputs, leaf, d_y);
        finish(inputs, out)
    }
}

fn finish(mut inputs: Inputs, out: ValueId) -> Built {
    inputs.b.output("out", out);
    let Inputs { b, batched, ints, .. } = inputs;
    Built { program: b.finish().unwrap(), batched, ints }
}

fn one(f: &mut Inputs, op: Op) -> ValueId {
    f.b.push(op)[0]
}

pub fn all() -> Vec<Gradient> {
    [functions(), columns_and_rows(), resampling(), embeddings()].into_iter().flatten().collect()
}

/// Functions of the element at its place.
fn functions() -> Vec<Gradient> {
    let mut cases = vec![];
    for width in [1, 37, 5000] {
        for activation in
            [Activation::None, Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::GeluTanh]
        {
            let case = Gradient::new(
                format!("{activation:?} {width}"),
                &[width],
                move |f, x| f.b.activate(x, activation),
                move |f, x, d_y| one(f, Op::Elementwise(Elementwise::ActivateBackward { x, d_y, activation })),
            );
            cases.push(case.smooth(|x| 2.0 * x));
        }
        let case = Gradient::new(
            format!("geglu {width}"),
            &[3, 2 * width],
            |f, x| f.b.geglu(x),
            |f, x, d_y| one(f, Op::Elementwise(Elementwise::GegluBackward { x, d_y })),
        );
        cases.push(case.smooth(|x| 2.0 * x));
        let case = Gradient::new(
            format!("clamp {width}"),
            &[width],
            |f, x| f.b.clamp(x, -0.75, 0.5),
            |f, x, d_y| one(f, Op::Elementwise(Elementwise::ClampBackward { x, d_y, low: -0.75, high: 0.5 })),
        );
        cases.push(case.smooth(|x| x));
    }
    let domains: [(Scalar, Domain); 6] = [
        (Scalar::Sqrt, |x| 2.5 + x),
        (Scalar::Square, |x| x),
        (Scalar::Ln, |x| 2.5 + x),
        (Scalar::Exp, |x| x),
        (Scalar::Reciprocal, |x| 2.5 + x),
        (Scalar::Spherical, |x| 0.49 * x),
    ];
    for (f, domain) in domains {
        let case = Gradient::new(
            format!("{f:?}"),
            &[37],
            move |inputs, x| inputs.b.map(x, f),
            move |inputs, x, d_y| one(inputs, Op::Elementwise(Elementwise::MapBackward { x, d_y, f })),
        );
        cases.push(case.smooth(domain));
    }
    cases.push(Gradient::new(
        "a term of a combination",
        &[33, 129],
        |f, x| {
            let (other, coefficients) = (f.batched("other", &[33, 129]), f.b.scalars("coefficients", 2));
            f.b.combine(&[other, x], coefficients)
        },
        |f, _, d_y| {
            let coefficients = f.b.scalars("coefficients", 2);
            one(f, Op::Update(Update::Scale { x: d_y, coefficients, index: 1 }))
        },
    ));
    // Of both halves of a value at once, as guidance reads a prediction.
    let halves = Gradient::new(
        "rows of a combination",
        &[6, 129],
        |f, value| {
            let (x, coefficients) = (f.shared("latents", &[3, 129]), f.b.scalars("coefficients", 3));
            f.b.combine(&[x.into(), Rows { value, at: 3 }, value.into()], coefficients)
        },
        |f, _, d_y| {
            let coefficients = f.b.scalars("coefficients", 3);
            let half = |f: &mut Inputs, index: usize, start: usize| {
                let scaled = one(f, Op::Update(Update::Scale { x: d_y, coefficients, index }));
                one(f, Op::Elementwise(Elementwise::Unslice { x: scaled, start, rows: 6 }))
            };
            let (first, second) = (half(f, 2, 0), half(f, 1, 3));
            f.b.add(first, second)
        },
    );
    cases.push(halves.shared());
    cases
}

/// What moves or adds up whole rows and columns.
fn columns_and_rows() -> Vec<Gradient> {
    let mut cases = vec![];
    for width in [1usize, 7, 3000] {
        // Columns read twice, overlapping, and columns nothing reads.
        let (from, to) = ((width / 2).min(4), 3 + width);
        cases.push(Gradient::new(
            format!("columns {width}"),
            &[3, width + 9],
            move |f, x| {
                let a = f.b.columns(Cols { value: x, at: 2 }, width);
                let b = f.b.columns(Cols { value: x, at: 2 + from }, to);
                f.b.concat(a, b)
            },
            move |f, _, d_y| {
                let a = f.b.columns(d_y, width);
                let b = f.b.columns(Cols { value: d_y, at: width }, to);
                let parts = vec![Cols { value: a, at: 2 }, Cols { value: b, at: 2 + from }];
                one(f, Op::Elementwise(Elementwise::Scatter { parts, width: width + 9 }))
            },
        ));
        // More reads than a launch adds up.
        cases.push(Gradient::new(
            format!("columns {width} read ten times"),
            &[2, width + 9],
            move |f, x| {
                let first = f.b.columns(Cols { value: x, at: 0 }, width);
                (1..10).fold(first, |all, at| {
                    let next = f.b.columns(Cols { value: x, at }, width);
                    f.b.concat(all, next)
                })
            },
            move |f, _, d_y| {
                let part = |f: &mut Inputs, at: usize| f.b.columns(Cols { value: d_y, at: at * width }, width);
                let parts = (0..10).map(|at| Cols { value: part(f, at), at }).collect();
                one(f, Op::Elementwise(Elementwise::Scatter { parts, width: width + 9 }))
            },
        ));
        for left in [true, false] {
            let case = Gradient::new(
                format!("outer_add {width}, left {left}"),
                &[4, width],
                move |f, x| {
                    let other = f.shared("other", &[3, width]);
                    if left { f.b.outer_add(x, other) } else { f.b.outer_add(other, x) }
                },
                move |f, _, d_y| f.b.push(Op::Elementwise(Elementwise::OuterAddBackward { d_y }))[usize::from(!left)],
            );
            cases.push(case.shared());
        }
        let repeat = Gradient::new(
            format!("repeat {width}"),
            &[5, width],
            |f, x| f.b.repeat(x, 3),
            |f, _, x| one(f, Op::Elementwise(Elementwise::SumRepeats { x, times: 3 })),
        );
        let slice = Gradient::new(
            format!("slice {width}"),
            &[6, width],
            |f, x| f.b.slice(x, 1, 4),
            |f, _, x| one(f, Op::Elementwise(Elementwise::Unslice { x, start: 1, rows: 6 })),
        );
        cases.extend([repeat.across(), slice.shared()]);
        // The middle of what is joined: rows of both.
        cases.push(Gradient::new(
            format!("tokens {width}"),
            &[4, width],
            move |f, x| {
                let other = f.batched("other", &[3, width]);
                let joined = f.b.concat_tokens(x, other);
                f.b.token_rows(joined, 1, 5)
            },
            |f, _, d_y| {
                let d_joined = one(f, Op::Elementwise(Elementwise::PadTokens { x: d_y, start: 1, tokens: 7 }));
                f.b.token_rows(d_joined, 0, 4)
            },
        ));
    }
    cases
}

fn resampling() -> Vec<Gradient> {
    let mut cases = vec![];
    for (h, w, height, width, c) in
        [(1, 1, 2, 2, 1), (3, 5, 6, 10, 7), (4, 4, 7, 8, 3), (2, 3, 4, 5, 64), (2, 3, 3, 5, 4)]
    {
        cases.push(Gradient::new(
            format!("nearest_2x {h}x{w}x{c} to {height}x{width}"),
            &[h, w, c],
            move |f, x| f.b.nearest_2x(x, height, width),
            move |f, _, d_y| one(f, Op::Resample(Resample::Nearest2xBackward { d_y, height: h, width: w })),
        ));
    }
    for how in INTERPOLATIONS {
        for (h, w, height, width, c) in
            [(1, 1, 3, 2, 1), (5, 9, 2, 4, 3), (4, 3, 9, 5, 2), (16, 18, 7, 8, 3), (11, 1, 2, 1, 1), (9, 20, 33, 7, 3)]
        {
            cases.push(Gradient::new(
                format!("resize {h}x{w}x{c} to {height}x{width} {how:?}"),
                &[h, w, c],
                move |f, x| f.b.resize(x, height, width, how),
                move |f, _, d_y| one(f, Op::Resample(Resample::ResizeBackward { d_y, height: h, width: w, how })),
            ));
        }
    }
    for (top, left) in [(0, 0), (1, 2), (2, 3)] {
        cases.push(Gradient::new(
            format!("crop at {top}, {left}"),
            &[5, 7, 3],
            move |f, x| f.b.crop(x, top, left, 3, 4),
            move |f, _, d_y| one(f, Op::Resample(Resample::CropBackward { d_y, top, left, height: 5, width: 7 })),
        ));
    }
    cases
}

/// Rows of the table, enough for two tasks.
const VOCABULARY: usize = 300;

fn ids(f: &mut Inputs) -> ValueId {
    // Each id at several positions, most at none; the last three are extra rows.
    f.ints("ids", &[9], |i| [0, 5, 299, 0, 302, 300, 5, 256, 255][i * 4 % 9])
}

fn embeddings() -> Vec<Gradient> {
    let tokens = |f: &mut Inputs, leaf: ValueId, which: usize| {
        let ids = ids(f);
        let mut rows =
            [(VOCABULARY, "table"), (3, "extra"), (11, "positions")].map(|(rows, name)| f.shared(name, &[rows, 20]));
        rows[which] = leaf;
        f.b.tokens_with(ids, rows[0], rows[1], rows[2])
    };
    let tokens_backward = |f: &mut Inputs, d_y: ValueId, first: usize, rows: usize| {
        let ids = ids(f);
        one(f, Op::Embedding(Embedding::TokensBackward { ids, d_y, first, rows }))
    };
    let mut cases = vec![
        Gradient::new(
            "tokens to table",
            &[VOCABULARY, 20],
            move |f, x| tokens(f, x, 0),
            move |f, _, d_y| tokens_backward(f, d_y, 0, VOCABULARY),
        )
        .shared(),
        Gradient::new(
            "tokens to extra",
            &[3, 20],
            move |f, x| tokens(f, x, 1),
            move |f, _, d_y| tokens_backward(f, d_y, VOCABULARY, 3),
        )
        .shared(),
        Gradient::new(
            "tokens to positions",
            &[11, 20],
            move |f, x| tokens(f, x, 2),
            |f, _, d_y| one(f, Op::Embedding(Embedding::PositionsBackward { d_y, rows: 11 })),
        )
        .shared(),
    ];
    let choices = |f: &mut Inputs| f.ints("ids", &[5], |i| (i * 7 % 12) as i32 - 1);
    cases.push(Gradient::new(
        "mix",
        &[5],
        move |f, weights| {
            let (ids, table) = (choices(f), f.shared("table", &[11, 20]));
            f.b.mix(weights, ids, table)
        },
        move |f, _, d_y| {
            let (ids, table) = (choices(f), f.shared("table", &[11, 20]));
            one(f, Op::Embedding(Embedding::MixBackward { ids, table, d_y }))
        },
    ));
    for (flip_sin_to_cos, freq_shift) in [(true, 0.0), (false, 1.0)] {
        let case = Gradient::new(
            format!("sinusoidal flip {flip_sin_to_cos}"),
            &[3],
            move |f, x| f.b.sinusoidal(x, 20, flip_sin_to_cos, freq_shift),
            move |f, x, d_y| {
                let op = Embedding::SinusoidalBackward { x, d_y, dim: 20, flip_sin_to_cos, freq_shift };
                one(f, Op::Embedding(op))
            },
        );
        cases.push(case.smooth(|x| x));
    }
    let at = |f: &mut Inputs| f.ints("at", &[], |i| (i * 4 % 6) as i32);
    cases.push(Gradient::new(
        "pool",
        &[6, 10],
        move |f, x| {
            let at = at(f);
            f.b.pool(x, at)
        },
        move |f, _, d_y| {
            let at = at(f);
            one(f, Op::Embedding(Embedding::PoolBackward { d_y, at, rows: 6 }))
        },
    ));
    for shape in [vec![4, 70], vec![4, 2, 70]] {
        let (name, leaf) = (format!("select {shape:?}"), shape.clone());
        let at = |f: &mut Inputs| {
            f.ints.push(("at".into(), vec![2]));
            f.b.input_i32("at", &[1])
        };
        let case = Gradient::new(
            name,
            &leaf,
            move |f, x| {
                let at = at(f);
                f.b.select(x, at)
            },
            move |f, _, d_y| {
                let at = at(f);
                one(f, Op::Embedding(Embedding::SelectBackward { d_y, at, shape: shape.clone() }))
            },
        );
        cases.push(case.shared());
    }
    cases.push(Gradient::new(
        "patches",
        &[3, 2, 20],
        |f, x| {
            let (class, positions) = (f.shared("class", &[20]), f.shared("positions", &[7, 20]));
            f.b.patches(x, class, positions)
        },
        |f, _, d_y| one(f, Op::Embedding(Embedding::PatchesBackward { d_y, middle: vec![3, 2] })),
    ));
    cases.push(Gradient::new(
        "row",
        &[5, 20],
        |f, x| f.b.row(x, 3),
        |f, _, d_y| one(f, Op::Embedding(Embedding::RowBackward { d_y, row: 3, rows: 5 })),
    ));
    cases
}
