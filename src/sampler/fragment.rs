//! The ops of a sampler step: guidance and update as linear combinations whose coefficients the host writes before each run.

use super::Needs;
use crate::program::{Builder, ValueId};

/// Latents `[B, H, W, C]`, read and written by a step.
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

/// Appends guidance and the sampler's update to a step program and returns the new latents.
///
/// `x` is the program's input [`LATENTS`]; `e_cond` and `e_uncond` are the network's outputs, all of one shape.
/// Declares the inputs `needs` asks for (coefficients, [`NOISE`], [`HISTORY`]) and the outputs [`LATENTS`] and [`HISTORY`],
/// which carry the state to the next step. The history needs no initial value: coefficients of unfilled slots are zero.
/// A program that lacks a branch the needs ask for fails when it is finished.
#[track_caller]
pub fn append_update(b: &mut Builder, needs: Needs, x: ValueId, e_cond: ValueId, e_uncond: Option<ValueId>) -> ValueId {
    if needs.uncond != e_uncond.is_some() {
        b.fail(format!("sampler needs unconditional branch: {}, got: {}", needs.uncond, e_uncond.is_some()));
    }
    let shape = b.shape(x);
    let mut terms = vec![x, e_cond];
    terms.extend(e_uncond);
    if needs.noise {
        terms.push(b.input(NOISE, &shape));
    }
    let next = if needs.history == 0 { combine(b, UPDATE, &terms) } else { append_multistep(b, needs, &terms) };
    b.output(LATENTS, next);
    next
}

/// Stores this step's prediction, updates the latents from it and its predecessors, and shifts the history.
#[track_caller]
fn append_multistep(b: &mut Builder, needs: Needs, terms: &[ValueId]) -> ValueId {
    let (x, shape) = (terms[0], b.shape(terms[0]));
    let stored = combine(b, STORE, terms);
    let history: Vec<ValueId> = HISTORY[..needs.history].iter().map(|name| b.input(*name, &shape)).collect();
    let next = combine(b, UPDATE, &[&[x, stored], &history[..]].concat());
    let push = needs.switch.then(|| b.scalars(PUSH, 2));
    let newer = [&[stored], &history[..]].concat();
    for (slot, (&new, &old)) in newer.iter().zip(&history).enumerate() {
        let entry = match push {
            Some(push) => b.combine(&[new, old], push),
            None => new,
        };
        b.output(HISTORY[slot], entry);
    }
    next
}

#[track_caller]
fn combine(b: &mut Builder, coefficients: &'static str, terms: &[ValueId]) -> ValueId {
    let coefficients = b.scalars(coefficients, terms.len());
    b.combine(terms, coefficients)
}
