//! A method's work on a list of targets: planned batch by batch before anything is loaded.

use crate::Result;
use crate::cli::flags::device::{self, DeviceFlags};
use crate::cli::flags::images::Noise;
use crate::cli::images::targets::Target;
use crate::cli::machine;
use crate::cli::progress::Reporter;
use crate::cli::terminal::shorten;
use crate::exec::Executor;
use crate::methods::{ImageMethod, PlannedMethod, Request};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{Job, Settings};
use crate::text::Position;
use serde_json::json;
use std::slice::Chunks;

/// What stays the same for all images of a method.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    pub pipeline: &'a Pipeline,
    pub settings: &'a Settings,
    pub method: &'a dyn ImageMethod,
}

/// Characters of a prompt, or of a list, in a message.
const SHOWN: usize = 200;

/// Batches of one size with the programs that make them.
pub struct Part<'a, 't> {
    pub planned: Box<dyn PlannedMethod + 'a>,
    pub batches: Chunks<'t, Target>,
}

impl<'a> Work<'a> {
    /// Plans every batch of the targets and refuses what does not fit the memory; whole batches share one set of programs, a smaller
    /// last one gets its own.
    pub fn plan<'t>(
        &self,
        flags: &DeviceFlags,
        executor: &dyn Executor,
        targets: &'t [Target],
        batch: usize,
    ) -> Result<Vec<Part<'a, 't>>> {
        let (limit, free) = (flags.memory_limit, executor.free_memory()?);
        let mut parts = Vec::new();
        for (targets, batch) in groups(targets, batch) {
            self.method.check(batch)?;
            let prompts: Vec<&str> = targets.iter().map(|target| target.prompt.as_str()).collect();
            let request = Request { settings: self.settings, batch, prompts: &prompts, memory: limit.or(free) };
            let planned = self.method.plan(self.pipeline, executor, &request)?;
            machine::check_memory(limit, free, &planned.footprint(), device::smaller_plan(batch))?;
            parts.push(Part { planned, batches: targets.chunks(batch) });
        }
        Ok(parts)
    }
}

/// Targets in whole batches, and those of a smaller last one; with the batch size. None is empty.
fn groups(targets: &[Target], batch: usize) -> impl Iterator<Item = (&[Target], usize)> {
    let (whole, rest) = targets.split_at(targets.len() - targets.len() % batch);
    [(whole, batch), (rest, rest.len())].into_iter().filter(|(targets, _)| !targets.is_empty())
}

/// `Error::Usage` where the method cannot make one of the batches.
pub fn check(method: &dyn ImageMethod, targets: &[Target], batch: usize) -> Result<()> {
    groups(targets, batch).try_for_each(|(_, batch)| method.check(batch))
}

/// What a method is asked for.
pub fn job(target: &Target, negative: Option<&str>, noise: &Noise) -> Job {
    Job {
        prompt: target.prompt.clone(),
        negative: negative.map(str::to_string),
        seed: target.seed,
        draws: noise.iter().map(|rows| rows[target.index].clone()).collect(),
    }
}

/// Says which learned tokens no prompt names, and what of their files is not used.
pub fn warn_of_learned_tokens<'a>(
    pipeline: &Pipeline,
    prompts: impl Iterator<Item = &'a str>,
    reporter: &Reporter,
) -> Result<()> {
    for token in pipeline.learned.iter().filter(|token| !token.unused.is_empty()) {
        let tensors = token.unused.join(", ");
        reporter.warn(&format!("--token {}: not used of the file: {}", token.name, shorten(&tensors, SHOWN)));
    }
    for token in pipeline.unnamed(prompts)? {
        let words: Vec<String> = token.words.iter().map(|word| format!("'{}'", word.text)).collect();
        let words = words.join(" or ");
        reporter.warn(&format!("--token {}: no prompt names it; write {}", token.name, shorten(&words, SHOWN)));
    }
    Ok(())
}

/// Says which prompts do not fit the model, and what of them is cut.
pub fn warn_of_cut_tokens<'a>(
    work: &Work<'_>,
    prompts: impl Iterator<Item = &'a str>,
    negatives: impl IntoIterator<Item = &'a str>,
    reporter: &Reporter,
) -> Result<()> {
    let (pipeline, reserved) = (work.pipeline, work.method.reserved_tokens());
    // The unconditional branch holds no learnable token.
    let negatives = negatives.into_iter().map(|negative| (negative, 0));
    let mut texts: Vec<(&str, usize)> = prompts.map(|prompt| (prompt, reserved)).chain(negatives).collect();
    texts.dedup();
    for (prompt, reserved) in texts {
        let cut = pipeline.add_special_tokens(prompt, reserved, Position::End)?.swap_remove(0).0.truncated;
        if !cut.is_empty() {
            let kept = (pipeline.tokens() - 2).saturating_sub(reserved);
            let (shown, words) = (shorten(prompt, SHOWN), cut.join(" "));
            reporter.warn(&format!("'{shown}': only {kept} tokens fit, cut: {}", shorten(&words, SHOWN)));
            reporter.event(json!({"event": "cut", "prompt": prompt, "tokens": cut}))?;
        }
    }
    Ok(())
}
