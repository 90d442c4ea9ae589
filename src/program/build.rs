//! Builder methods that read like layers. The first mistake is kept with the line that made it and returned by `finish`.

use super::*;
use crate::{Error, Result};
use std::collections::HashMap;

/// Appends ops to a [`Program`]. After a mistake every method returns a dummy value, so model code needs no `?` per layer.
pub struct Builder {
    program: Program,
    /// What weights, inputs and constants are of: the program's type, but for [`Builder::computing_in`].
    dtype: DType,
    weights: HashMap<(Weight, DType), ValueId>,
    error: Option<Error>,
}

impl Builder {
    pub fn new(name: impl Into<String>, dtype: DType) -> Builder {
        let program =
            Program { name: name.into(), dtype, nodes: vec![], values: vec![], inputs: vec![], outputs: vec![] };
        Builder { program, dtype, weights: HashMap::new(), error: None }
    }

    /// Goes on where a finished program ends.
    pub(crate) fn extend(program: Program, name: String) -> Builder {
        let weights = program.weights().map(|(id, weight)| ((weight.clone(), program.value(id).dtype), id)).collect();
        Builder { dtype: program.dtype, program: Program { name, ..program }, weights, error: None }
    }

    /// The type that is computed in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Appends a part that computes in another float type than the rest: its weights, inputs and constants are of that type, and
    /// so is what [`Builder::to_storage`] gives.
    pub fn computing_in<R>(&mut self, dtype: DType, append: impl FnOnce(&mut Builder) -> R) -> R {
        let outer = std::mem::replace(&mut self.dtype, dtype);
        let appended = append(self);
        self.dtype = outer;
        appended
    }

    pub(crate) fn program(&self) -> &Program {
        &self.program
    }

    pub fn shape(&self, id: ValueId) -> Shape {
        // After an error model code goes on, on values that are none: it may index their dimensions.
        if self.error.is_some() {
            return vec![1; 4];
        }
        self.program.values.get(id.index()).map(|v| v.shape.clone()).unwrap_or_default()
    }

    /// The last dimension: channels of an image, width of a token.
    pub fn channels(&self, id: ValueId) -> usize {
        self.shape(id).last().copied().unwrap_or(0)
    }

    /// A named float buffer; asking for the same one again gives the same value.
    pub fn input(&mut self, name: impl Into<String>, shape: &[usize]) -> ValueId {
        self.input_of(name, shape, self.dtype)
    }

    /// A named buffer of i32: token ids, indices.
    pub fn input_i32(&mut self, name: impl Into<String>, shape: &[usize]) -> ValueId {
        self.input_of(name, shape, DType::I32)
    }

    /// A named buffer of the accumulator type: state that is carried from run to run, timesteps.
    pub fn accumulator_input(&mut self, name: impl Into<String>, shape: &[usize]) -> ValueId {
        self.input_of(name, shape, self.dtype.accumulator())
    }

    /// A named buffer of scalars that change between runs, of the accumulator type.
    pub fn scalars(&mut self, name: impl Into<String>, len: usize) -> ValueId {
        self.accumulator_input(name, &[len])
    }

    /// A named buffer of the type of a value.
    pub(crate) fn input_like(&mut self, name: impl Into<String>, like: ValueId) -> ValueId {
        let value = self.program.value(like).clone();
        self.input_of(name, &value.shape, value.dtype)
    }

    fn input_of(&mut self, name: impl Into<String>, shape: &[usize], dtype: DType) -> ValueId {
        let value = Value { shape: shape.to_vec(), dtype, origin: Origin::Input(name.into()) };
        if let Some(&id) = self.program.inputs.iter().find(|id| *self.program.value(**id) == value) {
            return id;
        }
        let id = self.value(value);
        self.program.inputs.push(id);
        id
    }

    /// A named buffer in the place of a weight; asking for the same one again gives the same value.
    pub fn parameter(&mut self, weight: &Weight) -> ValueId {
        let name = weight.name();
        let is = |id: &ValueId| matches!(&self.program.value(*id).origin, Origin::Input(held) if *held == name);
        match self.program.inputs.iter().copied().find(is) {
            Some(id) => id,
            None => self.input(name, &weight.shape),
        }
    }

    /// A weight; asking for the same one again gives the same value.
    pub fn weight(&mut self, weight: Weight) -> ValueId {
        let key = (weight, self.dtype);
        if let Some(&id) = self.weights.get(&key) {
            return id;
        }
        let (weight, dtype) = key.clone();
        let id = self.value(Value { shape: weight.shape.clone(), dtype, origin: Origin::Weight(weight) });
        self.weights.insert(key, id);
        id
    }

    /// Names a value as an output.
    pub fn output(&mut self, name: impl Into<String>, id: ValueId) {
        self.program.outputs.push((name.into(), id));
    }

    /// The finished, verified program, or the first mistake.
    pub fn finish(self) -> Result<Program> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.program.verify()?;
        Ok(self.program)
    }

    /// Records a mistake found by model code (a configuration that cannot be built).
    #[track_caller]
    pub fn fail(&mut self, what: impl Into<String>) {
        let at = Location::caller().to_string();
        let program = self.program.name.clone();
        self.error.get_or_insert(Error::Program { program, what: what.into(), at });
    }

    fn value(&mut self, value: Value) -> ValueId {
        self.program.values.push(value);
        ValueId(self.program.values.len() as u32 - 1)
    }

    /// Appends any op; outputs in the order the op documents.
    #[track_caller]
    pub fn push(&mut self, op: Op) -> Vec<ValueId> {
        self.push_at(op, Location::caller())
    }

    /// The same for an op that another model line than the caller's is to be named for.
    pub(crate) fn push_at(&mut self, op: Op, at: &'static Location<'static>) -> Vec<ValueId> {
        const MOST_OUTPUTS: usize = 3;
        if self.error.is_some() {
            return vec![ValueId(0); MOST_OUTPUTS];
        }
        let types = match infer::infer(&self.program, &op) {
            Ok(types) => types,
            Err(what) => {
                let (program, at) = (self.program.name.clone(), at.to_string());
                self.error.get_or_insert(Error::Program { program, what, at });
                return vec![ValueId(0); MOST_OUTPUTS];
            }
        };
        let index = self.program.nodes.len();
        let outputs: Vec<ValueId> = types
            .into_iter()
            .map(|(shape, dtype)| self.value(Value { shape, dtype, origin: Origin::Op(index) }))
            .collect();
        self.program.nodes.push(Node { op, outputs: outputs.clone(), at });
        outputs
    }

    #[track_caller]
    pub fn gemm(&mut self, gemm: Gemm) -> ValueId {
        self.push(Op::Gemm(gemm))[0]
    }

    #[track_caller]
    pub fn conv2d(&mut self, conv: Conv2d) -> ValueId {
        self.push(Op::Conv2d(conv))[0]
    }

    #[track_caller]
    pub fn attention(&mut self, attention: Attention) -> ValueId {
        self.push(Op::Attention(attention))[0]
    }

    #[track_caller]
    pub fn group_norm(
        &mut self,
        x: ValueId,
        gamma: ValueId,
        beta: ValueId,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> ValueId {
        self.push(Op::Norm(Norm::Group { x, gamma, beta, groups, eps, silu }))[0]
    }

    #[track_caller]
    pub fn layer_norm(&mut self, x: ValueId, gamma: ValueId, beta: ValueId, eps: f64) -> ValueId {
        self.push(Op::Norm(Norm::Layer { x, gamma, beta, eps }))[0]
    }

    /// Over the last dimension.
    #[track_caller]
    pub fn softmax(&mut self, x: ValueId) -> ValueId {
        self.push(Op::Rowwise(Rowwise::Softmax { x }))[0]
    }

    /// Rows of norm 1.
    #[track_caller]
    pub fn unit(&mut self, x: ValueId, eps: f64) -> ValueId {
        self.push(Op::Rowwise(Rowwise::Unit { x, eps }))[0]
    }

    /// Inner product per sample.
    #[track_caller]
    pub fn dot(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Norm(Norm::Dot { a, b }))[0]
    }

    /// The loss per row.
    #[track_caller]
    pub fn cross_entropy(&mut self, logits: ValueId, targets: ValueId) -> ValueId {
        self.push(Op::Rowwise(Rowwise::CrossEntropy { logits, targets }))[0]
    }

    #[track_caller]
    pub fn sum(&mut self, x: ValueId, over: Over) -> ValueId {
        self.push(Op::Norm(Norm::Sum { x, over }))[0]
    }

    #[track_caller]
    pub fn activate(&mut self, x: ValueId, activation: Activation) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Activate { x, activation }))[0]
    }

    #[track_caller]
    pub fn geglu(&mut self, x: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Geglu { x }))[0]
    }

    #[track_caller]
    pub fn map(&mut self, x: ValueId, f: Scalar) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Map { x, f }))[0]
    }

    #[track_caller]
    pub fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Add { a, b }))[0]
    }

    #[track_caller]
    pub fn mul(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Mul { a, b }))[0]
    }

    /// Sample by sample.
    #[track_caller]
    pub fn scale(&mut self, x: ValueId, by: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Scale { x, by }))[0]
    }

    #[track_caller]
    pub fn outer_add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::OuterAdd { a, b }))[0]
    }

    #[track_caller]
    pub fn affine(&mut self, x: ValueId, scale: f64, shift: f64) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Affine { x, scale, shift }))[0]
    }

    #[track_caller]
    pub fn channel_affine(&mut self, x: ValueId, scale: &[f64], shift: &[f64]) -> ValueId {
        let (scale, shift) = (scale.to_vec(), shift.to_vec());
        self.push(Op::Elementwise(Elementwise::ChannelAffine { x, scale, shift }))[0]
    }

    #[track_caller]
    pub fn clamp(&mut self, x: ValueId, low: f64, high: f64) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Clamp { x, low, high }))[0]
    }

    /// The value in the type that is computed in; the value itself where it is of that.
    #[track_caller]
    pub fn to_storage(&mut self, x: ValueId) -> ValueId {
        self.cast(x, self.dtype)
    }

    /// The value in the accumulator type; the value itself where it is of that.
    #[track_caller]
    pub fn to_accumulator(&mut self, x: ValueId) -> ValueId {
        self.cast(x, self.dtype.accumulator())
    }

    #[track_caller]
    fn cast(&mut self, x: ValueId, to: DType) -> ValueId {
        match self.program.values.get(x.index()) {
            Some(value) if value.dtype != to => self.push(Op::Elementwise(Elementwise::Cast { x, to }))[0],
            Some(_) | None => x,
        }
    }

    /// The value, but no gradient.
    #[track_caller]
    pub fn detach(&mut self, x: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Detach { x }))[0]
    }

    #[track_caller]
    pub fn constant(&mut self, shape: &[usize], value: f64) -> ValueId {
        let dtype = self.dtype;
        self.push(Op::Elementwise(Elementwise::Constant { shape: shape.to_vec(), dtype, value }))[0]
    }

    #[track_caller]
    pub fn concat(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Concat { a, b }))[0]
    }

    #[track_caller]
    pub fn concat_tokens(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::ConcatTokens { a, b }))[0]
    }

    #[track_caller]
    pub fn columns(&mut self, x: impl Into<Cols>, len: usize) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Columns { x: x.into(), len }))[0]
    }

    #[track_caller]
    pub fn repeat(&mut self, x: ValueId, times: usize) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Repeat { x, times }))[0]
    }

    #[track_caller]
    pub fn slice(&mut self, x: ValueId, start: usize, len: usize) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Slice { x, start, len }))[0]
    }

    #[track_caller]
    pub fn token_rows(&mut self, x: ValueId, start: usize, len: usize) -> ValueId {
        self.push(Op::Elementwise(Elementwise::TokenRows { x, start, len }))[0]
    }

    #[track_caller]
    pub fn nearest_2x(&mut self, x: ValueId, height: usize, width: usize) -> ValueId {
        self.push(Op::Resample(Resample::Nearest2x { x, height, width }))[0]
    }

    #[track_caller]
    pub fn resize(&mut self, x: ValueId, height: usize, width: usize, how: Interpolation) -> ValueId {
        self.push(Op::Resample(Resample::Resize { x, height, width, how }))[0]
    }

    #[track_caller]
    pub fn crop(&mut self, x: ValueId, top: usize, left: usize, height: usize, width: usize) -> ValueId {
        self.push(Op::Resample(Resample::Crop { x, top, left, height, width }))[0]
    }

    #[track_caller]
    pub fn tokens(&mut self, ids: ValueId, table: ValueId, positions: ValueId) -> ValueId {
        self.push(Op::Embedding(Embedding::Tokens { ids, table, extra: None, positions }))[0]
    }

    /// With rows of its own after those of the table.
    #[track_caller]
    pub fn tokens_with(&mut self, ids: ValueId, table: ValueId, extra: ValueId, positions: ValueId) -> ValueId {
        self.push(Op::Embedding(Embedding::Tokens { ids, table, extra: Some(extra), positions }))[0]
    }

    #[track_caller]
    pub fn mix(&mut self, weights: ValueId, ids: ValueId, table: ValueId) -> ValueId {
        self.push(Op::Embedding(Embedding::Mix { weights, ids, table }))[0]
    }

    #[track_caller]
    pub fn sinusoidal(&mut self, x: ValueId, dim: usize, flip_sin_to_cos: bool, freq_shift: f64) -> ValueId {
        self.push(Op::Embedding(Embedding::Sinusoidal { x, dim, flip_sin_to_cos, freq_shift }))[0]
    }

    #[track_caller]
    pub fn pool(&mut self, x: ValueId, at: ValueId) -> ValueId {
        self.push(Op::Embedding(Embedding::Pool { x, at }))[0]
    }

    #[track_caller]
    pub fn select(&mut self, x: ValueId, at: ValueId) -> ValueId {
        self.push(Op::Embedding(Embedding::Select { x, at }))[0]
    }

    #[track_caller]
    pub fn patches(&mut self, x: ValueId, class: ValueId, positions: ValueId) -> ValueId {
        self.push(Op::Embedding(Embedding::Patches { x, class, positions }))[0]
    }

    #[track_caller]
    pub fn row(&mut self, x: ValueId, row: usize) -> ValueId {
        self.push(Op::Embedding(Embedding::Row { x, row }))[0]
    }

    #[track_caller]
    pub fn combine(&mut self, terms: &[impl Into<Rows> + Copy], coefficients: ValueId) -> ValueId {
        let terms = terms.iter().map(|&term| term.into()).collect();
        self.push(Op::Update(Update::Combine { terms, coefficients }))[0]
    }

    /// Standard normals of the accumulator type; `counter [B, 4]` i32 holds each sample's seed and draw.
    #[track_caller]
    pub fn noise(&mut self, counter: ValueId, shape: &[usize]) -> ValueId {
        self.push(Op::Update(Update::Noise { counter, shape: shape.to_vec() }))[0]
    }

    /// The next `p`, `m` and `v`.
    #[track_caller]
    pub fn adamw(&mut self, [p, g, m, v]: [ValueId; 4], scalars: ValueId) -> [ValueId; 3] {
        let out = self.push(Op::Update(Update::AdamW { p, g, m, v, scalars }));
        [out[0], out[1], out[2]]
    }

    /// The next `p`, `v` and `b`.
    #[track_caller]
    pub fn rmsprop(&mut self, [p, g, v, b]: [ValueId; 4], scalars: ValueId) -> [ValueId; 3] {
        let out = self.push(Op::Update(Update::RmsProp { p, g, v, b, scalars }));
        [out[0], out[1], out[2]]
    }

    /// The next `p` and `b`.
    #[track_caller]
    pub fn nesterov(&mut self, [p, g, b]: [ValueId; 3], scalars: ValueId) -> [ValueId; 2] {
        let out = self.push(Op::Update(Update::Nesterov { p, g, b, scalars }));
        [out[0], out[1]]
    }
}
