//! The ops of a sampler step: guidance and update as linear combinations whose coefficients the host writes before each run.

use super::Needs;
use crate::program::{Builder, Rows, ValueId};

/// Latents `[B, H, W, C]`, read and written by a step; like all that is carried from step to step of the accumulator type.
pub const LATENTS: &str = "latents";
/// Fresh unit noise shaped like the latents.
pub const NOISE: &str = "noise";
/// Stored predictions of earlier steps, the newest first, shaped like the latents.
pub const HISTORY: [&str; 3] = ["history.1", "history.2", "history.3"];
/// Coefficients of the stored quantity over `[x, e_c, e_u?]`.
pub const STORE: &str = "sampler.store";
/// Coefficients of the new latents over `[x, e_c, e_u?, noise?]`, or over `[x, stored, history…]`.
pub const UPDATE: &str = "sampler.update";
/// Weights of the new and the old entry in every slot of the history.
pub const PUSH: &str = "sampler.push";

/// What a sampler carries from step to step: the latents, and the stored predictions of earlier steps, the newest first.
#[derive(Clone, Debug)]
pub struct State {
    pub latents: ValueId,
    pub history: Vec<ValueId>,
}

/// Appends guidance and the sampler's update to a step program and returns the new latents.
///
/// `x` is the program's input [`LATENTS`]; `e_cond` and `e_uncond` are rows of the network's output, each as
/// many as there are latents, of the accumulator type or the program's own: one kernel casts, guides and steps.
/// Declares the inputs `needs` asks for (coefficients, [`NOISE`], [`HISTORY`]) and the outputs [`LATENTS`] and [`HISTORY`],
/// which carry the state to the next step. The history needs no initial value: coefficients of unfilled slots are zero.
/// A program that lacks a branch the needs ask for fails when it is finished.
#[track_caller]
pub fn append_update(b: &mut Builder, needs: Needs, x: ValueId, e_cond: Rows, e_uncond: Option<Rows>) -> ValueId {
    let shape = b.shape(x);
    let history = HISTORY[..needs.history].iter().map(|name| b.accumulator_input(*name, &shape)).collect();
    let next = update(b, needs, &State { latents: x, history }, e_cond, e_uncond, "");
    b.output(LATENTS, next.latents);
    for (name, &entry) in HISTORY.iter().zip(&next.history) {
        b.output(*name, entry);
    }
    next.latents
}

/// Guidance and update of one step as part of a longer program: from one state to the next. The names of its coefficients and of
/// its noise end in `suffix`.
#[track_caller]
pub fn update(
    b: &mut Builder,
    needs: Needs,
    state: &State,
    e_cond: Rows,
    e_uncond: Option<Rows>,
    suffix: &str,
) -> State {
    if needs.uncond != e_uncond.is_some() {
        b.fail(format!("sampler needs unconditional branch: {}, got: {}", needs.uncond, e_uncond.is_some()));
    }
    let x = state.latents;
    let mut terms = vec![x.into(), e_cond];
    terms.extend(e_uncond);
    if needs.noise {
        let shape = b.shape(x);
        terms.push(b.accumulator_input(format!("{NOISE}{suffix}"), &shape).into());
    }
    if needs.history == 0 {
        return State { latents: combine(b, UPDATE, suffix, &terms), history: vec![] };
    }
    // Stores this step's prediction, updates the latents from it and its predecessors, and shifts the history.
    let stored = combine(b, STORE, suffix, &terms);
    let latents = combine(b, UPDATE, suffix, &[&[x, stored], &state.history[..]].concat());
    let push = needs.switch.then(|| b.scalars(format!("{PUSH}{suffix}"), 2));
    let newer = [&[stored], &state.history[..]].concat();
    let history = newer.iter().zip(&state.history).map(|(&new, &old)| match push {
        Some(push) => b.combine(&[new, old], push),
        None => new,
    });
    State { latents, history: history.collect() }
}

#[track_caller]
fn combine(b: &mut Builder, coefficients: &str, suffix: &str, terms: &[impl Into<Rows> + Copy]) -> ValueId {
    let coefficients = b.scalars(format!("{coefficients}{suffix}"), terms.len());
    b.combine(terms, coefficients)
}
