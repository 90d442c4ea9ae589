//! Optimizers of a variable's parameters, on the device: update rules, clipping of gradients, learning-rate schedules.
//!
//! A step is one program over all parameters. What changes from step to step, the learning rate and the bias corrections, is a few
//! numbers that the host writes; parameters, gradients and moments stay where they are.

use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::optimize::variable::Parameter;
use crate::pipeline::programs::gradient_of;
use crate::plan::{Planned, plan};
use crate::program::{Builder, DType, Elementwise, Op, Program, Scalar, ValueId};
use crate::weights::Model;
use crate::{Error, Result};

/// How a parameter follows from its gradient; the formulas are those of [`crate::program::Update`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Loshchilov & Hutter 2019; Kingma & Ba 2015 without decay.
    AdamW { betas: [f64; 2], eps: f64, weight_decay: f64 },
    /// Tieleman & Hinton 2012 with momentum; parameters stay within `range`.
    RmsProp { alpha: f64, momentum: f64, eps: f64, range: [f64; 2] },
    /// Sutskever et al. 2013, as torch has it.
    Nesterov { momentum: f64 },
}

impl Rule {
    /// Adam with torch's defaults.
    pub const ADAM: Rule = Rule::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0 };

    /// State buffers of a parameter.
    fn moments(&self) -> &'static [&'static str] {
        match self {
            Rule::AdamW { .. } => &["m", "v"],
            Rule::RmsProp { .. } => &["v", "b"],
            Rule::Nesterov { .. } => &["b"],
        }
    }

    /// The numbers of step `t`, counted from 1 since the moments were 0.
    fn scalars(&self, lr: f64, clip: Option<Clip>, t: usize) -> Vec<f64> {
        match *self {
            Rule::AdamW { betas: [b1, b2], eps, weight_decay } => {
                let t = i32::try_from(t).unwrap_or(i32::MAX);
                vec![lr, 1.0 - b1, 1.0 - b2, eps, weight_decay, 1.0 - b1.powi(t), 1.0 - b2.powi(t)]
            }
            Rule::RmsProp { alpha, momentum, eps, range: [low, high] } => {
                // The op has a bound of its own for each number of the gradient.
                let bound = match clip {
                    Some(Clip::Value(bound)) => bound,
                    Some(Clip::GlobalNorm(_)) | None => f64::INFINITY,
                };
                vec![lr, alpha, momentum, eps, bound, low, high]
            }
            Rule::Nesterov { momentum } => vec![lr, momentum],
        }
    }

    fn append(&self, b: &mut Builder, p: ValueId, g: ValueId, moments: &[ValueId], scalars: ValueId) -> Vec<ValueId> {
        match (self, moments) {
            (Rule::AdamW { .. }, &[m, v]) => b.adamw([p, g, m, v], scalars).to_vec(),
            (Rule::RmsProp { .. }, &[v, momentum]) => b.rmsprop([p, g, v, momentum], scalars).to_vec(),
            (Rule::Nesterov { .. }, &[momentum]) => b.nesterov([p, g, momentum], scalars).to_vec(),
            (_, moments) => {
                b.fail(format!("{} state buffers of a parameter", moments.len()));
                vec![p]
            }
        }
    }
}

/// Bounds on gradients before the update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clip {
    /// On every number (`clip_grad_value_`).
    Value(f64),
    /// On the length of all gradients together (`clip_grad_norm_`). They are those of a whole batch: an image alone then takes
    /// another step than beside others.
    GlobalNorm(f64),
}

/// The learning rate over the iterations of a run, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LrSchedule {
    Constant,
    /// `lr (1 − t · decay)`.
    Linear {
        decay: f64,
    },
    /// From `lr` to 0 in `iterations` (Loshchilov & Hutter 2017, eq. 5, without restarts).
    Cosine {
        iterations: usize,
    },
    /// From 0 to `lr` over the first so many iterations, then constant.
    Warmup {
        iterations: usize,
    },
}

impl LrSchedule {
    /// What the learning rate is multiplied with.
    pub fn factor(&self, iteration: usize) -> f64 {
        let t = iteration as f64;
        match *self {
            LrSchedule::Constant => 1.0,
            LrSchedule::Linear { decay } => 1.0 - t * decay,
            LrSchedule::Cosine { iterations } => {
                let fraction = (t / iterations.max(1) as f64).min(1.0);
                0.5 * (1.0 + (std::f64::consts::PI * fraction).cos())
            }
            LrSchedule::Warmup { iterations } => ((t + 1.0) / iterations.max(1) as f64).min(1.0),
        }
    }
}

/// An update rule and what bounds its gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    pub rule: Rule,
    pub clip: Option<Clip>,
}

/// Added to the length that [`Clip::GlobalNorm`] divides by, as torch does.
const NORM_EPS: f64 = 1e-6;

/// The numbers that the host writes before a step.
const SCALARS: &str = "optimizer.scalars";

impl Optimizer {
    /// Adam with torch's defaults, unclipped.
    pub const ADAM: Optimizer = Optimizer { rule: Rule::ADAM, clip: None };

    fn moment(parameter: &str, moment: &str) -> String {
        format!("{parameter}.{moment}")
    }

    /// One step over all parameters, and what sets their moments to 0. `loss_scale` is what gradients were multiplied with.
    pub fn plan(
        &self,
        executor: &dyn Executor,
        dtype: DType,
        parameters: &[Parameter],
        loss_scale: f64,
    ) -> Result<PlannedOptimizer> {
        let plan = |program: Program| plan(program, |program, node| executor.workspace(program, node));
        Ok(PlannedOptimizer {
            optimizer: *self,
            step: plan(self.step(dtype, parameters, loss_scale)?),
            reset: plan(self.reset(dtype, parameters)?),
        })
    }

    fn step(&self, dtype: DType, parameters: &[Parameter], loss_scale: f64) -> Result<Program> {
        let mut b = Builder::new("optimizer", dtype);
        let scalars = b.scalars(SCALARS, self.rule.scalars(0.0, None, 1).len());
        let gradients: Vec<ValueId> = parameters
            .iter()
            .map(|Parameter { name, shape }| {
                let gradient = b.accumulator_input(gradient_of(name), shape);
                b.affine(gradient, 1.0 / loss_scale, 0.0)
            })
            .collect();
        let gradients = self.clipped(&mut b, gradients);
        for (Parameter { name, shape }, gradient) in parameters.iter().zip(gradients) {
            let p = b.accumulator_input(*name, shape);
            let names: Vec<String> = self.rule.moments().iter().map(|m| Optimizer::moment(name, m)).collect();
            let moments: Vec<ValueId> = names.iter().map(|name| b.accumulator_input(name, shape)).collect();
            let next = self.rule.append(&mut b, p, gradient, &moments, scalars);
            let names = std::iter::once(name.to_string()).chain(names);
            names.zip(next).for_each(|(name, id)| b.output(name, id));
        }
        b.finish()
    }

    fn clipped(&self, b: &mut Builder, gradients: Vec<ValueId>) -> Vec<ValueId> {
        match (self.clip, self.rule) {
            (None, _) | (Some(Clip::Value(_)), Rule::RmsProp { .. }) => gradients,
            (Some(Clip::Value(bound)), _) => gradients.into_iter().map(|g| b.clamp(g, -bound, bound)).collect(),
            (Some(Clip::GlobalNorm(bound)), _) => {
                let sums: Vec<ValueId> = gradients.iter().map(|g| sum_of_squares(b, *g)).collect();
                let Some(squares) = sums.into_iter().reduce(|sum, next| b.add(sum, next)) else { return gradients };
                let norm = b.map(squares, Scalar::Sqrt);
                let norm = b.affine(norm, 1.0, NORM_EPS);
                let inverse = b.map(norm, Scalar::Reciprocal);
                let factor = b.affine(inverse, bound, 0.0);
                let factor = b.clamp(factor, 0.0, 1.0);
                let scaled = |g: ValueId| {
                    let rows = b.shape(g)[0];
                    let factor = b.repeat(factor, rows);
                    b.scale(g, factor)
                };
                gradients.into_iter().map(scaled).collect()
            }
        }
    }

    fn reset(&self, dtype: DType, parameters: &[Parameter]) -> Result<Program> {
        let mut b = Builder::new("optimizer reset", dtype.accumulator());
        for Parameter { name, shape } in parameters {
            for moment in self.rule.moments() {
                let zero = b.constant(shape, 0.0);
                b.output(Optimizer::moment(name, moment), zero);
            }
        }
        b.finish()
    }
}

/// `[1]`: rows to a number each, then those to one.
fn sum_of_squares(b: &mut Builder, x: ValueId) -> ValueId {
    let rows = b.dot(x, x);
    let times = b.shape(rows)[0];
    b.push(Op::Elementwise(Elementwise::SumRepeats { x: rows, times }))[0]
}

/// The programs of an optimizer.
pub struct PlannedOptimizer {
    optimizer: Optimizer,
    step: Planned,
    reset: Planned,
}

impl PlannedOptimizer {
    pub fn all(&self) -> [&Planned; 2] {
        [&self.step, &self.reset]
    }

    pub fn load(self, executor: &mut dyn Executor, model: &Model) -> Result<LoadedOptimizer> {
        let reset = &self.reset.program;
        let moments = reset.outputs.iter().map(|(name, id)| (name.clone(), reset.value(*id).len())).collect();
        Ok(LoadedOptimizer {
            optimizer: self.optimizer,
            moments,
            step: executor.load(self.step, model)?,
            reset: executor.load(self.reset, model)?,
            taken: 0,
        })
    }
}

/// An optimizer between two steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Steps since the moments were 0.
    pub taken: usize,
    /// In the order of the optimizer's buffers.
    pub moments: Vec<Vec<f32>>,
}

/// An optimizer on an executor, beside the parameters it changes.
pub struct LoadedOptimizer {
    optimizer: Optimizer,
    step: ProgramId,
    reset: ProgramId,
    /// The buffers of the moments, and how many numbers each holds.
    moments: Vec<(String, usize)>,
    /// Steps since the moments were 0.
    taken: usize,
}

impl LoadedOptimizer {
    /// Starts anew: moments 0, and the next step the first.
    pub fn reset(&mut self, executor: &mut dyn Executor) -> Result<()> {
        self.taken = 0;
        executor.run(self.reset)
    }

    pub fn state(&self, executor: &dyn Executor) -> Result<OptimizerState> {
        let read = |(name, len): &(String, usize)| {
            let mut values = vec![0.0; *len];
            executor.read(name, DataMut::F32(&mut values)).map(|()| values)
        };
        Ok(OptimizerState { taken: self.taken, moments: self.moments.iter().map(read).collect::<Result<_>>()? })
    }

    /// Goes on from there; `Error::Usage` where it is of another optimizer.
    pub fn restore(&mut self, executor: &mut dyn Executor, state: &OptimizerState) -> Result<()> {
        let lens = self.moments.iter().map(|(_, len)| *len);
        if !state.moments.iter().map(Vec::len).eq(lens) {
            return Err(Error::Usage("the state is of another optimizer".into()));
        }
        self.taken = state.taken;
        let mut both = self.moments.iter().zip(&state.moments);
        both.try_for_each(|((name, _), values)| executor.write(name, Data::F32(values)))
    }

    /// One step along the gradients that the parameters' buffers hold; nothing is read back.
    pub fn step(&mut self, executor: &mut dyn Executor, lr: f64) -> Result<()> {
        let Optimizer { rule, clip } = self.optimizer;
        executor.write(SCALARS, Data::F64(&rule.scalars(lr, clip, self.taken + 1)))?;
        self.taken += 1;
        executor.run(self.step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rates() {
        assert_eq!(LrSchedule::Constant.factor(9), 1.0);
        assert!((LrSchedule::Linear { decay: 0.1 }.factor(3) - 0.7).abs() < 1e-15);
        let cosine = LrSchedule::Cosine { iterations: 10 };
        assert_eq!([cosine.factor(0), cosine.factor(10), cosine.factor(11)], [1.0, 0.0, 0.0]);
        assert!((cosine.factor(5) - 0.5).abs() < 1e-15);
        let warmup = LrSchedule::Warmup { iterations: 4 };
        assert_eq!([warmup.factor(0), warmup.factor(3), warmup.factor(9)], [0.25, 1.0, 1.0]);
    }
}
