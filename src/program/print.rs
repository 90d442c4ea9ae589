//! The textual form: one line per op, readable without the source.

use super::*;
use std::fmt;

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "program {} ({})", self.name, self.dtype)?;
        for &id in &self.inputs {
            let v = self.value(id);
            writeln!(f, "  {} = input {} {:?}", self.show(id), v.dtype, v.shape)?;
        }
        for node in &self.nodes {
            let outputs: Vec<String> = node.outputs.iter().map(|o| format!("%{}", o.0)).collect();
            let first = self.value(node.outputs[0]);
            writeln!(f, "  {} {:?} = {}", outputs.join(" "), first.shape, self.show_op(&node.op))?;
        }
        for (name, id) in &self.outputs {
            writeln!(f, "  output '{name}' = {}", self.show(*id))?;
        }
        Ok(())
    }
}

impl Program {
    /// A value as it is written in a line: `%7`, `'latents'`, or a weight's key.
    fn show(&self, id: ValueId) -> String {
        match &self.value(id).origin {
            Origin::Input(name) => format!("'{name}'"),
            Origin::Weight(w) if w.keys.len() == 1 => w.keys[0].clone(),
            Origin::Weight(w) => format!("{}+{}", w.keys[0], w.keys.len() - 1),
            Origin::Op(_) => format!("%{}", id.0),
        }
    }

    /// One op with its operands and attributes.
    pub fn show_op(&self, op: &Op) -> String {
        let v = |id: &ValueId| self.show(*id);
        let cols = |c: &Cols| if c.at == 0 { v(&c.value) } else { format!("{}[..{}..]", v(&c.value), c.at) };
        let opt =
            |name: &str, id: &Option<ValueId>| id.map(|id| format!(" {name} {}", self.show(id))).unwrap_or_default();
        match op {
            Op::Gemm(g) => {
                let activation =
                    if g.activation == Activation::None { String::new() } else { format!(" {:?}", g.activation) };
                format!("gemm {} {}{}{activation}{}", v(&g.x), v(&g.w), opt("+", &g.bias), opt("residual", &g.residual))
            }
            Op::Conv2d(c) => {
                let shift = c.shift.map(|s| format!(" shift {}", cols(&s))).unwrap_or_default();
                let place = format!(" stride {} padding {:?}", c.stride, c.padding);
                format!(
                    "conv2d {} {}{place}{}{shift}{}",
                    v(&c.x),
                    v(&c.w),
                    opt("+", &c.bias),
                    opt("residual", &c.residual)
                )
            }
            Op::Attention(a) => format!(
                "attention q {} k {} v {} heads {}x{}{}",
                cols(&a.q),
                cols(&a.k),
                cols(&a.v),
                a.heads,
                a.head_dim,
                if a.causal { " causal" } else { "" }
            ),
            Op::Norm(Norm::Group { x, gamma, groups, eps, silu, .. }) => {
                format!(
                    "group_norm {} {} groups {groups} eps {eps:e}{}",
                    v(x),
                    v(gamma),
                    if *silu { " silu" } else { "" }
                )
            }
            Op::Norm(Norm::Layer { x, gamma, eps, .. }) => format!("layer_norm {} {} eps {eps:e}", v(x), v(gamma)),
            Op::Elementwise(e) => match e {
                Elementwise::Activate { x, activation } => format!("{activation:?} {}", v(x)).to_lowercase(),
                Elementwise::Add { a, b } => format!("add {} {}", v(a), v(b)),
                Elementwise::OuterAdd { a, b } => format!("outer_add {} {}", v(a), v(b)),
                Elementwise::Affine { x, scale, shift } => format!("affine {} * {scale} + {shift}", v(x)),
                Elementwise::Concat { a, b } => format!("concat {} {}", v(a), v(b)),
                Elementwise::Repeat { x, times } => format!("repeat {} x{times}", v(x)),
                Elementwise::Slice { x, start, len } => format!("slice {}[{start}..{}]", v(x), start + len),
            },
            Op::Resample(Resample::Nearest2x { x, height, width }) => {
                format!("nearest_2x {} to {height}x{width}", v(x))
            }
            Op::Embedding(e) => match e {
                Embedding::Tokens { ids, table, .. } => format!("tokens {} {}", v(ids), v(table)),
                Embedding::Sinusoidal { x, dim, .. } => format!("sinusoidal {} dim {dim}", v(x)),
                Embedding::Pool { x, at } => format!("pool {} at {}", v(x), v(at)),
                Embedding::Select { x, at } => format!("select {} at {}", v(x), v(at)),
            },
            Op::Update(Update::Combine { terms, coefficients }) => {
                let terms: Vec<String> = terms.iter().map(v).collect();
                format!("combine {} . {}", v(coefficients), terms.join(" "))
            }
        }
    }
}
