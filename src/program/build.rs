//! Builder methods that read like layers. The first mistake is kept with the line that made it and returned by `finish`.

use super::*;
use crate::{Error, Result};
use std::collections::HashMap;

/// Appends ops to a [`Program`]. After a mistake every method returns a dummy value, so model code needs no `?` per layer.
pub struct Builder {
    program: Program,
    weights: HashMap<Weight, ValueId>,
    error: Option<Error>,
}

impl Builder {
    pub fn new(name: impl Into<String>, dtype: DType) -> Builder {
        let program =
            Program { name: name.into(), dtype, nodes: vec![], values: vec![], inputs: vec![], outputs: vec![] };
        Builder { program, weights: HashMap::new(), error: None }
    }

    pub fn shape(&self, id: ValueId) -> Shape {
        self.program.values.get(id.index()).map(|v| v.shape.clone()).unwrap_or_default()
    }

    /// The last dimension: channels of an image, width of a token.
    pub fn channels(&self, id: ValueId) -> usize {
        self.shape(id).last().copied().unwrap_or(0)
    }

    /// A named float buffer.
    pub fn input(&mut self, name: impl Into<String>, shape: &[usize]) -> ValueId {
        self.input_of(name, shape, self.program.dtype)
    }

    /// A named buffer of i32: token ids, indices.
    pub fn input_i32(&mut self, name: impl Into<String>, shape: &[usize]) -> ValueId {
        self.input_of(name, shape, DType::I32)
    }

    /// A named buffer of scalars that change between runs, at least f32.
    pub fn scalars(&mut self, name: impl Into<String>, len: usize) -> ValueId {
        let dtype = if self.program.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        self.input_of(name, &[len], dtype)
    }

    fn input_of(&mut self, name: impl Into<String>, shape: &[usize], dtype: DType) -> ValueId {
        let id = self.value(Value { shape: shape.to_vec(), dtype, origin: Origin::Input(name.into()) });
        self.program.inputs.push(id);
        id
    }

    /// A weight; asking for the same one again gives the same value.
    pub fn weight(&mut self, weight: Weight) -> ValueId {
        if let Some(&id) = self.weights.get(&weight) {
            return id;
        }
        let (shape, dtype) = (weight.shape.clone(), self.program.dtype);
        let id = self.value(Value { shape, dtype, origin: Origin::Weight(weight.clone()) });
        self.weights.insert(weight, id);
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
        const MOST_OUTPUTS: usize = 3;
        if self.error.is_some() {
            return vec![ValueId(0); MOST_OUTPUTS];
        }
        let types = match infer::infer(&self.program, &op) {
            Ok(types) => types,
            Err(what) => {
                self.fail(what);
                return vec![ValueId(0); MOST_OUTPUTS];
            }
        };
        let index = self.program.nodes.len();
        let outputs: Vec<ValueId> = types
            .into_iter()
            .map(|(shape, dtype)| self.value(Value { shape, dtype, origin: Origin::Op(index) }))
            .collect();
        self.program.nodes.push(Node { op, outputs: outputs.clone(), at: Location::caller() });
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

    #[track_caller]
    pub fn activate(&mut self, x: ValueId, activation: Activation) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Activate { x, activation }))[0]
    }

    #[track_caller]
    pub fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Add { a, b }))[0]
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
    pub fn concat(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Op::Elementwise(Elementwise::Concat { a, b }))[0]
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
    pub fn nearest_2x(&mut self, x: ValueId, height: usize, width: usize) -> ValueId {
        self.push(Op::Resample(Resample::Nearest2x { x, height, width }))[0]
    }

    #[track_caller]
    pub fn tokens(&mut self, ids: ValueId, table: ValueId, positions: ValueId) -> ValueId {
        self.push(Op::Embedding(Embedding::Tokens { ids, table, positions }))[0]
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
    pub fn combine(&mut self, terms: &[ValueId], coefficients: ValueId) -> ValueId {
        self.push(Op::Update(Update::Combine { terms: terms.to_vec(), coefficients }))[0]
    }
}
