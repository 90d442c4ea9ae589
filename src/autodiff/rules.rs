//! One rule per op: from the gradient of its output to contributions to the gradients of its inputs.

use super::Walk;
use crate::Result;
use crate::program::*;

/// Adds what `node` passes on of `d_y`, the gradient of its first output, to the inputs that want it.
pub fn differentiate(w: &mut Walk, node: &Node, d_y: ValueId) -> Result<()> {
    match &node.op {
        Op::Gemm(op) => gemm(w, op, d_y),
        Op::Conv2d(op) => return conv2d(w, op, d_y),
        Op::Attention(op) => attention(w, op, &node.outputs, d_y),
        Op::Norm(op) => return norm(w, op, &node.outputs, d_y),
        Op::Rowwise(op) => return rowwise(w, op, &node.outputs, d_y),
        Op::Elementwise(op) => return elementwise(w, op, d_y),
        Op::Resample(op) => return resample(w, op, d_y),
        Op::Embedding(op) => return embedding(w, op, d_y),
        Op::Update(op) => return update(w, op, d_y),
        Op::GemmBackward(GemmBackward::Input { d_y: x, w: weight, residual }) => {
            transposed(w, *x, *weight, *residual, d_y);
        }
        Op::GemmBackward(GemmBackward::Weight { .. }) | Op::Conv2dBackward(_) | Op::AttentionBackward(_) => {
            return Err(second(w, &node.op));
        }
    }
    Ok(())
}

fn second(w: &Walk, op: &Op) -> crate::Error {
    w.no_derivative(op, "of what is a derivative already")
}

/// Fails where something that has no gradient would need one.
fn constant(w: &Walk, op: Op, what: &str, id: ValueId) -> Result<()> {
    if w.wants(id) { Err(w.no_derivative(&op, what)) } else { Ok(()) }
}

fn gemm(w: &mut Walk, op: &Gemm, d_y: ValueId) {
    let Gemm { x, w: weight, bias, residual, .. } = *op;
    if let Some(residual) = residual.filter(|id| w.wants(*id)) {
        w.add(residual, d_y);
    }
    if let Some(bias) = bias.filter(|id| w.wants(*id)) {
        let d_bias = w.push(Op::Norm(Norm::Sum { x: d_y, over: Over::Rows }));
        w.add(bias, d_bias);
    }
    if w.wants(weight) {
        let x = w.saved(x);
        let d_w = w.push(Op::GemmBackward(GemmBackward::Weight { x, d_y }));
        w.add(weight, d_w);
    }
    if w.wants(x) {
        let weight = w.saved(weight);
        w.add_with(x, |residual| Op::GemmBackward(GemmBackward::Input { d_y, w: weight, residual }));
    }
}

/// `x wᵀ + residual`, the product of a head tied to an embedding's table.
fn transposed(w: &mut Walk, x: ValueId, weight: ValueId, residual: Option<ValueId>, d_y: ValueId) {
    if let Some(residual) = residual.filter(|id| w.wants(*id)) {
        w.add(residual, d_y);
    }
    if w.wants(weight) {
        let x = w.saved(x);
        let d_w = w.push(Op::GemmBackward(GemmBackward::Weight { x: d_y, d_y: x }));
        w.add(weight, d_w);
    }
    if w.wants(x) {
        let weight = w.saved(weight);
        w.add_with(x, |residual| {
            Op::Gemm(Gemm { x: d_y, w: weight, bias: None, residual, activation: Activation::None })
        });
    }
}

fn conv2d(w: &mut Walk, op: &Conv2d, d_y: ValueId) -> Result<()> {
    let Conv2d { x, w: weight, bias, shift, residual, stride, padding } = *op;
    for id in [Some(weight), bias].into_iter().flatten() {
        constant(w, Op::Conv2d(op.clone()), "to the weights of a convolution", id)?;
    }
    if let Some(residual) = residual.filter(|id| w.wants(*id)) {
        w.add(residual, d_y);
    }
    if let Some(shift) = shift.filter(|shift| w.wants(shift.value)) {
        let over = if w.b.shape(shift.value)[0] == 1 { Over::Samples } else { Over::Middle };
        let d_shift = w.push(Op::Norm(Norm::Sum { x: d_y, over }));
        w.add_columns(shift, d_shift);
    }
    if w.wants(x) {
        let shape = w.b.shape(x);
        let size = [shape[1], shape[2]];
        w.add_with(x, |residual| {
            Op::Conv2dBackward(Conv2dBackward { d_y, w: weight, residual, size, stride, padding })
        });
    }
    Ok(())
}

fn attention(w: &mut Walk, op: &Attention, outputs: &[ValueId], d_y: ValueId) {
    let (to_q, to_kv) = (w.wants(op.q.value), w.wants(op.k.value) || w.wants(op.v.value));
    let mut forward = op.clone();
    for cols in [&mut forward.q, &mut forward.k, &mut forward.v] {
        cols.value = w.saved(cols.value);
    }
    let (out, lse) = (w.saved(outputs[0]), w.saved(outputs[1]));
    let gradients = w.push_all(Op::AttentionBackward(AttentionBackward { forward, out, lse, d_out: d_y, to_q, to_kv }));
    let to = [to_q.then_some(op.q), to_kv.then_some(op.k), to_kv.then_some(op.v)];
    for (cols, gradient) in to.into_iter().flatten().zip(gradients) {
        if w.wants(cols.value) {
            w.add_columns(cols, gradient);
        }
    }
}

fn norm(w: &mut Walk, op: &Norm, outputs: &[ValueId], d_y: ValueId) -> Result<()> {
    match *op {
        Norm::Group { x, gamma, beta, groups, silu, .. } => {
            constant(w, Op::Norm(op.clone()), "to scale and shift of a group norm", gamma)?;
            constant(w, Op::Norm(op.clone()), "to scale and shift of a group norm", beta)?;
            let [mean, rstd] = [outputs[1], outputs[2]].map(|id| w.saved(id));
            let saved = w.saved(x);
            let d_x = Norm::GroupBackward { x: saved, d_y, gamma, beta, mean, rstd, groups, silu };
            let d_x = w.push(Op::Norm(d_x));
            w.add(x, d_x);
        }
        Norm::Layer { x, gamma, beta, .. } => {
            let [mean, rstd] = [outputs[1], outputs[2]].map(|id| w.saved(id));
            let saved = w.saved(x);
            if w.wants(gamma) || w.wants(beta) {
                let affine = w.push_all(Op::Norm(Norm::LayerBackwardAffine { x: saved, d_y, mean, rstd }));
                for (id, gradient) in [gamma, beta].into_iter().zip(affine) {
                    if w.wants(id) {
                        w.add(id, gradient);
                    }
                }
            }
            if w.wants(x) {
                let d_x = w.push(Op::Norm(Norm::LayerBackward { x: saved, d_y, gamma, mean, rstd }));
                w.add(x, d_x);
            }
        }
        Norm::Dot { a, b } => {
            for (to, other) in [(a, b), (b, a)] {
                if w.wants(to) {
                    let x = w.saved(other);
                    let gradient = w.push(Op::Elementwise(Elementwise::Scale { x, by: d_y }));
                    w.add(to, gradient);
                }
            }
        }
        Norm::Sum { x, .. } => {
            let shape = w.b.shape(x);
            let d_x = w.push(Op::Elementwise(Elementwise::Spread { x: d_y, shape }));
            w.add(x, d_x);
        }
        Norm::GroupBackward { .. } | Norm::LayerBackward { .. } | Norm::LayerBackwardAffine { .. } => {
            return Err(second(w, &Op::Norm(op.clone())));
        }
    }
    Ok(())
}

fn rowwise(w: &mut Walk, op: &Rowwise, outputs: &[ValueId], d_y: ValueId) -> Result<()> {
    match *op {
        Rowwise::Softmax { x } => {
            let y = w.saved(outputs[0]);
            let d_x = w.push(Op::Rowwise(Rowwise::SoftmaxBackward { y, d_y }));
            w.add(x, d_x);
        }
        Rowwise::Unit { x, eps } => {
            let [y, norm] = [outputs[0], outputs[1]].map(|id| w.saved(id));
            let d_x = w.push(Op::Rowwise(Rowwise::UnitBackward { y, norm, d_y, eps }));
            w.add(x, d_x);
        }
        Rowwise::CrossEntropy { logits, targets } => {
            let (saved, lse) = (w.saved(logits), w.saved(outputs[1]));
            let d_x = Rowwise::CrossEntropyBackward { logits: saved, targets, lse, d_loss: d_y };
            let d_x = w.push(Op::Rowwise(d_x));
            w.add(logits, d_x);
        }
        Rowwise::SoftmaxBackward { .. } | Rowwise::UnitBackward { .. } | Rowwise::CrossEntropyBackward { .. } => {
            return Err(second(w, &Op::Rowwise(op.clone())));
        }
    }
    Ok(())
}

fn elementwise(w: &mut Walk, op: &Elementwise, d_y: ValueId) -> Result<()> {
    use Elementwise::*;
    let push = |w: &mut Walk, op| w.push(Op::Elementwise(op));
    match *op {
        Activate { x, activation } => {
            let saved = w.saved(x);
            let d_x = push(w, ActivateBackward { x: saved, d_y, activation });
            w.add(x, d_x);
        }
        Geglu { x } => {
            let saved = w.saved(x);
            let d_x = push(w, GegluBackward { x: saved, d_y });
            w.add(x, d_x);
        }
        Map { x, f } => {
            let saved = w.saved(x);
            let d_x = push(w, MapBackward { x: saved, d_y, f });
            w.add(x, d_x);
        }
        Clamp { x, low, high } => {
            let saved = w.saved(x);
            let d_x = push(w, ClampBackward { x: saved, d_y, low, high });
            w.add(x, d_x);
        }
        Add { a, b } => {
            for to in [a, b] {
                if w.wants(to) {
                    w.add(to, d_y);
                }
            }
        }
        Mul { a, b } => {
            for (to, other) in [(a, b), (b, a)] {
                if w.wants(to) {
                    let other = w.saved(other);
                    let gradient = push(w, Mul { a: d_y, b: other });
                    w.add(to, gradient);
                }
            }
        }
        Scale { x, by } => {
            if w.wants(x) {
                let by = w.saved(by);
                let gradient = push(w, Scale { x: d_y, by });
                w.add(x, gradient);
            }
            if w.wants(by) {
                let x = w.saved(x);
                let gradient = w.push(Op::Norm(Norm::Dot { a: d_y, b: x }));
                w.add(by, gradient);
            }
        }
        OuterAdd { a, b } => {
            let gradients = w.push_all(Op::Elementwise(OuterAddBackward { d_y }));
            for (to, gradient) in [a, b].into_iter().zip(gradients) {
                if w.wants(to) {
                    w.add(to, gradient);
                }
            }
        }
        Affine { x, scale, .. } => {
            let d_x = if scale == 1.0 { d_y } else { push(w, Affine { x: d_y, scale, shift: 0.0 }) };
            w.add(x, d_x);
        }
        ChannelAffine { x, ref scale, .. } => {
            let (scale, shift) = (scale.clone(), vec![0.0; scale.len()]);
            let d_x = push(w, ChannelAffine { x: d_y, scale, shift });
            w.add(x, d_x);
        }
        Spread { x, ref shape } => {
            let over = match w.b.shape(x)[..] {
                [_] => Over::Rows,
                [1, _] if shape[0] != 1 => Over::Samples,
                _ => Over::Middle,
            };
            let d_x = w.push(Op::Norm(Norm::Sum { x: d_y, over }));
            w.add(x, d_x);
        }
        Concat { a, b } => {
            let width = w.b.channels(a);
            for (to, at) in [(a, 0), (b, width)] {
                if w.wants(to) {
                    let len = w.b.channels(to);
                    let gradient = push(w, Columns { x: Cols { value: d_y, at }, len });
                    w.add(to, gradient);
                }
            }
        }
        ConcatTokens { a, b } => {
            let before = w.b.shape(a)[1];
            for (to, start) in [(a, 0), (b, before)] {
                if w.wants(to) {
                    let len = w.b.shape(to)[1];
                    let gradient = push(w, TokenRows { x: d_y, start, len });
                    w.add(to, gradient);
                }
            }
        }
        Columns { x, .. } => w.add_columns(x, d_y),
        Scatter { ref parts, .. } => {
            for part in parts {
                if w.wants(part.value) {
                    let len = w.b.channels(part.value);
                    let gradient = push(w, Columns { x: Cols { value: d_y, at: part.at }, len });
                    w.add(part.value, gradient);
                }
            }
        }
        Repeat { x, times } => {
            let d_x = push(w, SumRepeats { x: d_y, times });
            w.add(x, d_x);
        }
        SumRepeats { x, times } => {
            let d_x = push(w, Repeat { x: d_y, times });
            w.add(x, d_x);
        }
        Slice { x, start, .. } => {
            let rows = w.b.shape(x)[0];
            let d_x = push(w, Unslice { x: d_y, start, rows });
            w.add(x, d_x);
        }
        Unslice { x, start, .. } => {
            let len = w.b.shape(x)[0];
            let d_x = push(w, Slice { x: d_y, start, len });
            w.add(x, d_x);
        }
        TokenRows { x, start, .. } => {
            let tokens = w.b.shape(x)[1];
            let d_x = push(w, PadTokens { x: d_y, start, tokens });
            w.add(x, d_x);
        }
        PadTokens { x, start, .. } => {
            let len = w.b.shape(x)[1];
            let d_x = push(w, TokenRows { x: d_y, start, len });
            w.add(x, d_x);
        }
        Cast { x, .. } => {
            let to = w.b.program().value(x).dtype;
            let d_x = push(w, Cast { x: d_y, to });
            w.add(x, d_x);
        }
        Detach { .. } | Constant { .. } => {}
        ActivateBackward { .. }
        | GegluBackward { .. }
        | MapBackward { .. }
        | ClampBackward { .. }
        | OuterAddBackward { .. } => return Err(second(w, &Op::Elementwise(op.clone()))),
    }
    Ok(())
}

fn resample(w: &mut Walk, op: &Resample, d_y: ValueId) -> Result<()> {
    let size = |w: &Walk, x| {
        let shape = w.b.shape(x);
        (shape[1], shape[2])
    };
    let (x, backward) = match *op {
        Resample::Nearest2x { x, .. } => {
            let (height, width) = size(w, x);
            (x, Resample::Nearest2xBackward { d_y, height, width })
        }
        Resample::Resize { x, how, .. } => {
            let (height, width) = size(w, x);
            (x, Resample::ResizeBackward { d_y, height, width, how })
        }
        Resample::Crop { x, top, left, .. } => {
            let (height, width) = size(w, x);
            (x, Resample::CropBackward { d_y, top, left, height, width })
        }
        Resample::Nearest2xBackward { .. } | Resample::ResizeBackward { .. } | Resample::CropBackward { .. } => {
            return Err(second(w, &Op::Resample(op.clone())));
        }
    };
    let d_x = w.push(Op::Resample(backward));
    w.add(x, d_x);
    Ok(())
}

fn embedding(w: &mut Walk, op: &Embedding, d_y: ValueId) -> Result<()> {
    use Embedding::*;
    let push = |w: &mut Walk, op| w.push(Op::Embedding(op));
    match *op {
        Tokens { ids, table, extra, positions } => {
            let known = w.b.shape(table)[0];
            for (to, first) in [(Some(table), 0), (extra, known)] {
                if let Some(to) = to.filter(|id| w.wants(*id)) {
                    let rows = w.b.shape(to)[0];
                    let gradient = push(w, TokensBackward { ids, d_y, first, rows });
                    w.add(to, gradient);
                }
            }
            to_positions(w, positions, d_y);
        }
        Mix { weights, ids, table } => {
            constant(w, Op::Embedding(op.clone()), "to the table of a mixture", table)?;
            let d_weights = push(w, MixBackward { ids, table, d_y });
            w.add(weights, d_weights);
        }
        Sinusoidal { x, dim, flip_sin_to_cos, freq_shift } => {
            let saved = w.saved(x);
            let d_x = push(w, SinusoidalBackward { x: saved, d_y, dim, flip_sin_to_cos, freq_shift });
            w.add(x, d_x);
        }
        Pool { x, at } => {
            let rows = w.b.shape(x)[1];
            let d_x = push(w, PoolBackward { d_y, at, rows });
            w.add(x, d_x);
        }
        Select { x, at } => {
            let shape = w.b.shape(x);
            let d_x = push(w, SelectBackward { d_y, at, shape });
            w.add(x, d_x);
        }
        Patches { x, class, positions } => {
            if w.wants(x) {
                let shape = w.b.shape(x);
                let d_x = push(w, PatchesBackward { d_y, middle: shape[1..shape.len() - 1].to_vec() });
                w.add(x, d_x);
            }
            if w.wants(class) {
                let row = push(w, Row { x: d_y, row: 0 });
                let d_class = w.push(Op::Norm(Norm::Sum { x: row, over: Over::Rows }));
                w.add(class, d_class);
            }
            to_positions(w, positions, d_y);
        }
        Row { x, row } => {
            let rows = w.b.shape(x)[1];
            let d_x = push(w, RowBackward { d_y, row, rows });
            w.add(x, d_x);
        }
        TokensBackward { .. }
        | PositionsBackward { .. }
        | MixBackward { .. }
        | SinusoidalBackward { .. }
        | PoolBackward { .. }
        | SelectBackward { .. }
        | PatchesBackward { .. }
        | RowBackward { .. } => return Err(second(w, &Op::Embedding(op.clone()))),
    }
    Ok(())
}

fn to_positions(w: &mut Walk, positions: ValueId, d_y: ValueId) {
    if w.wants(positions) {
        let rows = w.b.shape(positions)[0];
        let gradient = w.push(Op::Embedding(Embedding::PositionsBackward { d_y, rows }));
        w.add(positions, gradient);
    }
}

/// The gradient to a value from that to some rows of it, which may be of a wider type.
fn rows(w: &mut Walk, term: Rows, mut d: ValueId) -> ValueId {
    let Value { shape, dtype, .. } = w.b.program().value(term.value).clone();
    if w.b.program().value(d).dtype != dtype {
        d = w.push(Op::Elementwise(Elementwise::Cast { x: d, to: dtype }));
    }
    if w.b.shape(d)[0] < shape[0] {
        d = w.push(Op::Elementwise(Elementwise::Unslice { x: d, start: term.at, rows: shape[0] }));
    }
    d
}

fn update(w: &mut Walk, op: &Update, d_y: ValueId) -> Result<()> {
    match op {
        Update::Combine { terms, coefficients } => {
            constant(w, Op::Update(op.clone()), "to the coefficients of a combination", *coefficients)?;
            for (index, &term) in terms.iter().enumerate() {
                if w.wants(term.value) {
                    let scaled = w.push(Op::Update(Update::Scale { x: d_y, coefficients: *coefficients, index }));
                    let gradient = rows(w, term, scaled);
                    w.add(term.value, gradient);
                }
            }
        }
        Update::Scale { x, coefficients, index } => {
            constant(w, Op::Update(op.clone()), "to a coefficient", *coefficients)?;
            let (coefficients, index) = (*coefficients, *index);
            let d_x = w.push(Op::Update(Update::Scale { x: d_y, coefficients, index }));
            w.add(*x, d_x);
        }
        Update::AdamW { .. } | Update::RmsProp { .. } | Update::Nesterov { .. } => {
            return Err(w.no_derivative(&Op::Update(op.clone()), "of an optimiser's step"));
        }
        // A constant to every leaf.
        Update::Noise { .. } => {}
    }
    Ok(())
}
