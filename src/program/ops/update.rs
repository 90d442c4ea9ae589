//! Updates of state: guidance and sampler steps, optimisers, noise. What changes from run to run comes from memory.

use super::{OpKind, Rows};
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{DType, Program, ValueId};

#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// `Σ coefficients[i] · terms[i]`, `coefficients [n]` f32 read from memory: guidance and sampler step in one.
    ///
    /// The first term is a whole value and gives the result its shape and type. The others are as many rows of values that have the
    /// same dimensions after the first, of that type or all of one storage type. A zero coefficient leaves its term out even where
    /// the term is not finite.
    Combine { terms: Vec<Rows>, coefficients: ValueId },
    /// `coefficients[index] · x`, 0 where that is 0: the gradient of `Combine` to one of its terms.
    Scale { x: ValueId, coefficients: ValueId, index: usize },
    /// AdamW (Loshchilov & Hutter 2019, as torch has it; Adam with decay 0): `scalars [7]` are the learning rate, `1 − β1`,
    /// `1 − β2` (which f32 holds better than β2), ε, the weight decay, and the bias corrections `c1 = 1 − β1^t`, `c2 = 1 − β2^t`.
    ///
    /// `m ← β1 m + (1 − β1) g`, `v ← β2 v + (1 − β2) g²`, `p ← p (1 − lr decay) − lr (m / c1) / (√(v / c2) + ε)`.
    /// Outputs: `p`, `m`, `v`.
    AdamW { p: ValueId, g: ValueId, m: ValueId, v: ValueId, scalars: ValueId },
    /// RMSprop with momentum as DPO-Diff has it: `scalars [7]` are the learning rate, α, the momentum, ε, the bound on each
    /// element of the gradient, and the least and the largest value of `p`.
    ///
    /// `g ← clip(g, ±bound)`, `v ← α v + (1 − α) g²`, `b ← momentum b + g / (√v + ε)`, `p ← clip(p − lr b, low, high)`.
    /// Outputs: `p`, `v`, `b`.
    RmsProp { p: ValueId, g: ValueId, v: ValueId, b: ValueId, scalars: ValueId },
    /// SGD with Nesterov momentum as torch has it: `scalars [2]` are the learning rate and the momentum μ.
    ///
    /// `b ← μ b + g`, `p ← p − lr (g + μ b)`. Outputs: `p`, `b`.
    Nesterov { p: ValueId, g: ValueId, b: ValueId, scalars: ValueId },
    /// Standard normals `shape [B, .., C]` of the accumulator type, a pure function of `counter [B, 4]` i32, read from memory: low and high
    /// word of each sample's seed, low and high word of the number of the draw. They are those of the sampler's own generator and,
    /// as latents are drawn, numbered channels first: element `c` of position `i` of `n` is number `c n + i`.
    Noise { counter: ValueId, shape: Vec<usize> },
}

/// Numbers each optimiser reads.
const ADAMW_SCALARS: usize = 7;
const RMSPROP_SCALARS: usize = 7;
const NESTEROV_SCALARS: usize = 2;

impl OpKind for Update {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        match self {
            Update::Combine { terms, coefficients } => {
                terms.iter_mut().map(|t| &mut t.value).chain([coefficients]).collect()
            }
            Update::Scale { x, coefficients, .. } => vec![x, coefficients],
            Update::AdamW { p, g, m, v, scalars } => vec![p, g, m, v, scalars],
            Update::RmsProp { p, g, v, b, scalars } => vec![p, g, v, b, scalars],
            Update::Nesterov { p, g, b, scalars } => vec![p, g, b, scalars],
            Update::Noise { counter, .. } => vec![counter],
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        match *self {
            Update::Combine { ref terms, coefficients } => {
                let Some(&first) = terms.first() else { return Err("no terms".into()) };
                let s = cx.float(first.value, 1)?;
                ensure!(first.at == 0, "the first term begins at row {}", first.at);
                terms[1..].iter().try_for_each(|term| rows(cx, *term, s))?;
                let mut stored =
                    terms.iter().map(|term| cx.type_of(term.value).1).filter(|dtype| *dtype != cx.of(vec![]).1);
                let one = stored.next();
                ensure!(stored.all(|dtype| Some(dtype) == one), "terms of more than two types");
                scalars(cx, coefficients, terms.len())?;
                Ok(cx.one(s.to_vec()))
            }
            Update::Scale { x, coefficients, index } => {
                let count = cx.shape(coefficients).iter().product();
                ensure!(index < count, "coefficient {index} of {count}");
                scalars(cx, coefficients, count)?;
                Ok(cx.one(cx.float(x, 1)?.to_vec()))
            }
            Update::AdamW { p, g, m, v, scalars } => optimiser(cx, &[p, g, m, v], scalars, ADAMW_SCALARS, 3),
            Update::RmsProp { p, g, v, b, scalars } => optimiser(cx, &[p, g, v, b], scalars, RMSPROP_SCALARS, 3),
            Update::Nesterov { p, g, b, scalars } => optimiser(cx, &[p, g, b], scalars, NESTEROV_SCALARS, 2),
            Update::Noise { counter, ref shape } => {
                ensure!(shape.len() >= 2 && shape.iter().all(|n| *n > 0), "noise of shape {shape:?}, needs [B, .., C]");
                cx.index("counter", counter, &[shape[0], 4])?;
                Ok(vec![cx.accumulator(shape.clone())])
            }
        }
    }

    fn alias(&self) -> Option<ValueId> {
        match self {
            Update::Combine { terms, .. } => terms.first().map(|term| term.value),
            Update::Scale { x, .. } => Some(*x),
            // Parameters and state are buffers, which nothing takes over; the gradient is read by every output.
            Update::AdamW { .. } | Update::RmsProp { .. } | Update::Nesterov { .. } => None,
            Update::Noise { .. } => None,
        }
    }

    fn show(&self, p: &Program) -> String {
        let show = |id: &ValueId| p.show(*id);
        match self {
            Update::Combine { terms, coefficients } => {
                let of = |term: &Rows| match p.shape(term.value) == p.shape(terms[0].value) {
                    true => show(&term.value),
                    false => format!("{}[{}..]", show(&term.value), term.at),
                };
                let terms: Vec<String> = terms.iter().map(of).collect();
                format!("combine {} . {}", show(coefficients), terms.join(" "))
            }
            Update::Scale { x, coefficients, index } => format!("scale {}[{index}] {}", show(coefficients), show(x)),
            Update::AdamW { p, g, .. } => format!("adamw {} {}", show(p), show(g)),
            Update::RmsProp { p, g, .. } => format!("rmsprop {} {}", show(p), show(g)),
            Update::Nesterov { p, g, .. } => format!("nesterov {} {}", show(p), show(g)),
            Update::Noise { counter, .. } => format!("noise {}", show(counter)),
        }
    }
}

fn scalars(cx: &Infer, id: ValueId, count: usize) -> Result<(), String> {
    let (shape, dtype) = cx.type_of(id);
    let fits = shape == [count] && matches!(dtype, DType::F32 | DType::F64);
    ensure!(fits, "scalars %{} are {dtype} {shape:?}, need {count} of f32 or f64", id.0);
    Ok(())
}

/// A term of a combination of shape `s`.
fn rows(cx: &Infer, term: Rows, s: &[usize]) -> Result<(), String> {
    let (shape, dtype) = cx.type_of(term.value);
    let (id, accumulator) = (term.value.0, cx.of(vec![]).1);
    ensure!(
        dtype == accumulator || dtype != DType::I32 && dtype.accumulator() == accumulator,
        "term %{id} is {dtype} beside {accumulator}"
    );
    let fits = shape.len() == s.len() && shape[1..] == s[1..] && term.at + s[0] <= shape[0];
    ensure!(fits, "term %{id} is {shape:?} from row {}, needs {s:?}", term.at);
    Ok(())
}

/// Parameter, gradient and state of one shape; `outputs` of the same.
fn optimiser(cx: &Infer, values: &[ValueId], ids: ValueId, count: usize, outputs: usize) -> Result<Types, String> {
    let s = cx.float(values[0], 1)?;
    for &value in &values[1..] {
        cx.exactly("gradient or state", value, s)?;
    }
    scalars(cx, ids, count)?;
    Ok(vec![cx.of(s.to_vec()); outputs])
}
