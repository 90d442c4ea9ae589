//! A method's work on a list of targets: planned batch by batch before anything is loaded.

use crate::Result;
use crate::cli::flags::device::{self, DeviceFlags};
use crate::cli::flags::images::Noise;
use crate::cli::images::targets::{Selection, Target};
use crate::cli::machine;
use crate::cli::progress::Reporter;
use crate::cli::terminal::shorten;
use crate::exec::Executor;
use crate::methods::{ImageMethod, PlannedMethod, Request};
use crate::optimize::objective::Nfe;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{Job, Settings};
use crate::text::Position;
use serde_json::json;
use std::ops::Range;

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
pub struct Part<'a> {
    pub planned: Box<dyn PlannedMethod + 'a>,
    pub batches: Batches,
}

impl Part<'_> {
    /// Of all its batches.
    pub fn progress_units(&self) -> usize {
        let of_batches = self.planned.progress_units().saturating_mul(self.batches.len());
        of_batches.saturating_add(self.planned.shared_units())
    }

    /// UNet calls of all its batches.
    pub fn nfe(&self) -> Nfe {
        let (each, shared, batches) = (self.planned.nfe(), self.planned.shared_nfe(), self.batches.len());
        Nfe { forward: shared.forward + batches * each.forward, backward: shared.backward + batches * each.backward }
    }
}

/// Positions in a selection, in batches of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Batches {
    pub positions: Range<usize>,
    pub size: usize,
}

impl Batches {
    pub fn len(&self) -> usize {
        self.positions.len() / self.size
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<usize>> {
        self.positions.clone().step_by(self.size).map(|first| first..first + self.size)
    }

    /// The prompts of the batches one after the other, without batches of the same prompts as the one before.
    fn prompts<'t>(&self, selection: &Selection<'t>) -> Vec<&'t str> {
        let mut prompts: Vec<&str> = Vec::new();
        for positions in self.iter() {
            let before = prompts.len();
            prompts.extend(selection.prompts(positions).map(|prompt| &**prompt));
            let (before, batch) = prompts.split_at(before);
            let is_known = before.len() >= batch.len()
                && before.iter().rev().zip(batch.iter().rev()).all(|(a, b)| std::ptr::eq(*a, *b));
            if is_known {
                prompts.truncate(before.len());
            }
        }
        prompts
    }
}

impl<'a> Work<'a> {
    /// Plans every batch of the images and refuses what does not fit the memory; whole batches share one set of programs, a smaller
    /// last one gets its own.
    pub fn plan(
        &self,
        flags: &DeviceFlags,
        executor: &dyn Executor,
        selection: &Selection<'_>,
        batch: usize,
    ) -> Result<Vec<Part<'a>>> {
        let (limit, free) = (flags.memory_limit, executor.free_memory()?);
        let mut parts = Vec::new();
        for batches in groups(selection.len(), batch) {
            let batch = batches.size;
            self.method.check(batch)?;
            let prompts = batches.prompts(selection);
            let request = Request { settings: self.settings, batch, prompts: &prompts, memory: limit.or(free) };
            let planned = self.method.plan(self.pipeline, executor, &request)?;
            machine::check_memory(limit, free, &planned.footprint(), device::smaller_plan(batch))?;
            parts.push(Part { planned, batches });
        }
        Ok(parts)
    }
}

/// So many images in whole batches, and those of a smaller last one. None is empty.
fn groups(images: usize, batch: usize) -> impl Iterator<Item = Batches> {
    let whole = images - images % batch;
    let groups = [(0..whole, batch), (whole..images, images - whole)];
    groups
        .into_iter()
        .map(|(positions, size)| Batches { positions, size })
        .filter(|batches| !batches.positions.is_empty())
}

/// `Error::Usage` where the method cannot make one of the batches.
pub fn check(method: &dyn ImageMethod, images: usize, batch: usize) -> Result<()> {
    groups(images, batch).try_for_each(|batches| method.check(batches.size))
}

/// What a method is asked for.
pub fn job(target: &Target, negative: Option<&str>, noise: &Noise) -> Job {
    Job {
        prompt: target.prompt.to_string(),
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
    for (prompt, reserved) in prompts.map(|prompt| (prompt, reserved)).chain(negatives) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::images::targets::Targets;
    use std::path::Path;

    #[test]
    fn batches_cover_all_images() {
        for (images, batch) in [(1, 1), (7, 3), (6, 3), (2, 9), (1_000_000, 7)] {
            let groups: Vec<Batches> = groups(images, batch).collect();
            assert!(groups.iter().all(|batches| batches.size <= batch && batches.iter().count() == batches.len()));
            let covered: Vec<Range<usize>> = groups.iter().flat_map(Batches::iter).collect();
            assert_eq!((covered[0].start, covered[covered.len() - 1].end), (0, images));
            assert!(covered.windows(2).all(|two| two[0].end == two[1].start));
        }
        assert_eq!(groups(0, 3).count(), 0);
    }

    /// A run with a million images is planned for the few batches that differ.
    #[test]
    fn batches_of_the_same_prompts_are_named_once() {
        let prompts = vec![(1, "x".to_string()), (2, "y".to_string())];
        let targets = Targets::for_file(prompts, 0, 500_001, Path::new("d")).unwrap();
        let batches = groups(targets.len(), 2).next().unwrap();
        assert_eq!(batches.prompts(&Selection::all_of(&targets)), ["x", "x", "x", "y", "y", "y"]);
    }
}
