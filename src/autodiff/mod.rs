//! Reverse-mode differentiation: from a program to a longer program of the same kind.
//!
//! Only ops between a leaf and an objective are differentiated, each by one rule (`rules`), in reverse order. Forward values that
//! a rule reads are either kept or computed again from kept ones when they are first asked for (`recompute`); the bits are the
//! same. What nothing reads in the end is removed, so a program whose cotangent is given carries no more of its forward than
//! the backward reads.

mod prune;
mod recompute;
mod rules;
mod unfuse;

pub use recompute::kept;

use crate::program::{Activation, Builder, Cols, Elementwise, Gemm, Op, Origin, Program, ValueId};
use crate::{Error, Result};
use std::collections::HashMap;
use std::panic::Location;

/// Where the gradient of an objective with respect to itself comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Cotangent {
    /// 1 everywhere: the objective is a loss per sample, whose sum is differentiated.
    Ones,
    /// A named buffer like the objective: a vector-Jacobian product.
    Input(String),
}

/// What to differentiate, and with respect to what.
#[derive(Clone, Debug)]
pub struct Request {
    /// Values of the program, each with its cotangent; their contributions add up.
    pub objectives: Vec<(ValueId, Cotangent)>,
    /// Any float values of the program (inputs, weights, results of ops) and the names of the outputs that get their gradients.
    pub leaves: Vec<(ValueId, String)>,
}

/// Differentiates `program`. The result has its outputs and one more per leaf, like the leaf (0 where the objectives do not
/// depend on it). Forward values outside `kept` are computed again; `None` keeps all.
///
/// Fails where the way from a leaf to an objective leads through an op without a derivative, naming the op.
pub fn differentiate(program: &Program, request: &Request, kept: Option<&[bool]>) -> Result<Program> {
    let between = Between::new(program, request);
    let (program, kept) = unfuse::unfuse(program, &between, kept);
    let between = Between::new(&program, request);
    let nodes = program.nodes.len();
    let name = format!("{} gradient", program.name);
    let mut walk = Walk {
        between,
        gradients: HashMap::new(),
        leaves: request.leaves.iter().map(|(id, _)| (*id, None)).collect(),
        again: HashMap::new(),
        kept,
        at: Location::caller(),
        b: Builder::extend(program, name),
    };
    for (id, cotangent) in &request.objectives {
        let value = match cotangent {
            Cotangent::Ones => walk.constant_like(*id, 1.0),
            Cotangent::Input(name) => walk.b.input_like(name, *id),
        };
        walk.add(*id, value);
    }
    for index in (0..nodes).rev() {
        walk.visit(index)?;
    }
    for (id, name) in &request.leaves {
        let gradient = match walk.finished(*id) {
            Some(gradient) => walk.made(gradient),
            None => walk.constant_like(*id, 0.0),
        };
        walk.b.output(name, gradient);
    }
    prune::prune(walk.b.finish()?)
}

/// Which values lie between leaves and objectives.
struct Between {
    /// Per value: it depends on a leaf.
    varies: Vec<bool>,
    /// Per value: an objective depends on it.
    matters: Vec<bool>,
}

impl Between {
    fn new(program: &Program, request: &Request) -> Between {
        let mut varies = vec![false; program.values.len()];
        let mut matters = varies.clone();
        request.leaves.iter().for_each(|(id, _)| varies[id.index()] = true);
        for node in &program.nodes {
            let passes = !matches!(node.op, Op::Elementwise(Elementwise::Detach { .. }));
            if passes && node.op.inputs().iter().any(|id| varies[id.index()]) {
                node.outputs.iter().for_each(|id| varies[id.index()] = true);
            }
        }
        request.objectives.iter().for_each(|(id, _)| matters[id.index()] = true);
        for node in program.nodes.iter().rev() {
            if node.outputs.iter().any(|id| matters[id.index()]) {
                node.op.inputs().iter().for_each(|id| matters[id.index()] = true);
            }
        }
        Between { varies, matters }
    }

    fn holds(&self, id: ValueId) -> bool {
        self.varies[id.index()] && self.matters[id.index()]
    }
}

/// What has been gathered of the gradient of a value.
#[derive(Default)]
struct Gathered {
    /// Contributions to all of it, added up.
    whole: Option<ValueId>,
    /// Contributions to some of its columns.
    columns: Vec<Cols>,
}

/// The reverse walk over the forward ops.
struct Walk {
    b: Builder,
    between: Between,
    gradients: HashMap<ValueId, Gathered>,
    /// The leaves, with their gradients once those are complete.
    leaves: HashMap<ValueId, Option<ValueId>>,
    /// Forward values that were computed again, by what they were first.
    again: HashMap<ValueId, ValueId>,
    /// Per forward value; `None` keeps all.
    kept: Option<Vec<bool>>,
    /// The model line of the op being differentiated.
    at: &'static Location<'static>,
}

impl Walk {
    fn constant_like(&mut self, id: ValueId, value: f64) -> ValueId {
        let like = self.b.program().value(id).clone();
        self.push(Op::Elementwise(Elementwise::Constant { shape: like.shape, dtype: like.dtype, value }))
    }

    /// Differentiates one op, if a gradient arrived at its first output.
    fn visit(&mut self, index: usize) -> Result<()> {
        let node = self.b.program().nodes[index].clone();
        self.at = node.at;
        if let Some(&extra) = node.outputs[1..].iter().find(|id| self.gradients.contains_key(id)) {
            return Err(self.no_derivative(&node.op, &format!("to its output %{}, which is a statistic", extra.0)));
        }
        let Some(d_y) = self.finished(node.outputs[0]) else { return Ok(()) };
        if node.op.inputs().iter().any(|id| self.wants(*id)) {
            rules::differentiate(self, &node, d_y)?;
        }
        Ok(())
    }

    /// Whether a gradient to this value leads on to a leaf.
    fn wants(&self, id: ValueId) -> bool {
        self.between.holds(id)
    }

    /// Appends a backward op and returns its first output.
    fn push(&mut self, op: Op) -> ValueId {
        self.push_all(op)[0]
    }

    fn push_all(&mut self, op: Op) -> Vec<ValueId> {
        self.b.push_at(op, self.at)
    }

    /// Adds a contribution to the gradient of `id`, which must be wanted.
    fn add(&mut self, id: ValueId, contribution: ValueId) {
        let whole = self.gradients.entry(id).or_default().whole.take();
        let sum = match whole {
            Some(whole) => self.push(Op::Elementwise(Elementwise::Add { a: whole, b: contribution })),
            None => contribution,
        };
        self.gradients.entry(id).or_default().whole = Some(sum);
    }

    /// The same, by an op that adds what there is already, its residual.
    fn add_with(&mut self, id: ValueId, op: impl FnOnce(Option<ValueId>) -> Op) {
        let residual = self.gradients.entry(id).or_default().whole.take();
        let sum = self.push(op(residual));
        self.gradients.entry(id).or_default().whole = Some(sum);
    }

    /// Adds a contribution to columns `to.at ..` of the gradient of `to.value`.
    fn add_columns(&mut self, to: Cols, contribution: ValueId) {
        if self.b.shape(to.value) == self.b.shape(contribution) {
            return self.add(to.value, contribution);
        }
        let part = Cols { value: contribution, at: to.at };
        self.gradients.entry(to.value).or_default().columns.push(part);
    }

    /// The whole gradient of a value, once every op that reads it has been visited; `None` if nothing arrived.
    fn finished(&mut self, id: ValueId) -> Option<ValueId> {
        if let Some(Some(gradient)) = self.leaves.get(&id) {
            return Some(*gradient);
        }
        let Gathered { whole, mut columns } = self.gradients.remove(&id)?;
        let gradient = match whole {
            Some(whole) if columns.is_empty() => whole,
            whole => {
                // In the order of the columns, so that parts side by side become one pass.
                columns.extend(whole.map(Cols::from));
                columns.sort_by_key(|part| part.at);
                let width = self.b.channels(id);
                self.push(Op::Elementwise(Elementwise::Scatter { parts: columns, width }))
            }
        };
        if let Some(leaf) = self.leaves.get_mut(&id) {
            *leaf = Some(gradient);
        }
        Some(gradient)
    }

    /// A value that an op makes, as outputs must be; a cotangent that nothing changed is copied.
    fn made(&mut self, id: ValueId) -> ValueId {
        match self.b.program().value(id).origin {
            Origin::Op(_) => id,
            Origin::Input(_) | Origin::Weight(_) => {
                self.push(Op::Elementwise(Elementwise::Affine { x: id, scale: 1.0, shift: 0.0 }))
            }
        }
    }

    /// A value of the forward, computed again if it was not kept.
    fn saved(&mut self, id: ValueId) -> ValueId {
        if let Some(&again) = self.again.get(&id) {
            return again;
        }
        let Origin::Op(index) = self.b.program().value(id).origin else { return id };
        if self.keeps(id) && !self.is_cheap(index) {
            return id;
        }
        let node = self.b.program().nodes[index].clone();
        let mut inputs: HashMap<ValueId, ValueId> = HashMap::new();
        for input in node.op.inputs() {
            inputs.insert(input, self.saved(input));
        }
        let outputs = self.b.push_at(node.op.with_inputs(|id| inputs[&id]), node.at);
        self.again.extend(node.outputs.into_iter().zip(outputs));
        self.again[&id]
    }

    fn keeps(&self, id: ValueId) -> bool {
        self.kept.as_ref().is_none_or(|kept| kept[id.index()])
    }

    /// Whether to make the op's result again though it could be kept, because the backward holds what it reads anyway: the skip
    /// connections that a UNet concatenates; attention's output and the residual that its projection adds. For the UNet of SD 1.5
    /// that is a ninth of the memory for a hundredth of the time.
    fn is_cheap(&self, index: usize) -> bool {
        let program = self.b.program();
        let by_attention = |id: ValueId| match program.value(id).origin {
            Origin::Op(from) => matches!(program.nodes[from].op, Op::Attention(_)),
            Origin::Input(_) | Origin::Weight(_) => false,
        };
        match program.nodes[index].op {
            Op::Elementwise(Elementwise::Concat { a, b }) => self.keeps(a) && self.keeps(b),
            Op::Gemm(Gemm { x, residual: Some(residual), activation: Activation::None, .. }) => {
                by_attention(x) && self.keeps(x) && self.keeps(residual)
            }
            _ => false,
        }
    }

    fn no_derivative(&self, op: &Op, what: &str) -> Error {
        let program = self.b.program();
        let what = format!("{}: there is no derivative {what}", program.show_op(op));
        Error::Program { program: program.name.clone(), what, at: self.at.to_string() }
    }
}
