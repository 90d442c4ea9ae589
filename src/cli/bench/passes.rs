//! The UNet forward and backward, and a method against the passes it was planned to make.

use super::Setup;
use super::measure::{Plan, Row};
use super::report::Case;
use crate::autodiff::{Cotangent, Request};
use crate::exec::{Data, ProgramId};
use crate::methods::generate::{Generator, Job};
use crate::methods::minority::{self, Minority};
use crate::methods::programs::pooled_width;
use crate::models::unet::{Added, Unet};
use crate::plan::{Planned, plan, plan_gradient};
use crate::program::{Builder, Node, Program};
use crate::{Error, Result};
use serde_json::json;

const PROMPT: &str = "a red star on a dark blue background";
const LATENTS: &str = "bench.latents";
const CONTEXT: &str = "bench.context";

/// One pass, and one with its gradient to the text states or to the latents.
pub fn gradients(setup: &mut Setup<'_>, batch: usize) -> Result<Case> {
    let rows = passes(setup, batch)?.into_iter().map(|(row, _)| row).collect();
    setup.executor.clear();
    Ok(Case { name: format!("UNet passes of batch {batch}"), rows, total: None, facts: json!({}) })
}

/// The passes, loaded and timed.
fn passes(setup: &mut Setup<'_>, batch: usize) -> Result<Vec<(Row, ProgramId)>> {
    let mut found = vec![];
    let names = ["unet forward", "  and backward to the text", "  and backward to the latents"];
    for (name, leaf) in names.into_iter().zip([None, Some(CONTEXT), Some(LATENTS)]) {
        let planned = pass(setup, batch, leaf)?;
        let (program, arena) = (planned.program.clone(), planned.plan.arena_bytes);
        let id = setup.executor.load(planned, &setup.pipeline.model)?;
        if leaf.is_none() {
            for (name, value) in [LATENTS, CONTEXT].into_iter().filter_map(|n| Some((n, program.input(n)?))) {
                setup.executor.write(name, Data::F32(&wave(program.value(value).len())))?;
            }
            setup.executor.write("bench.timestep", Data::F32(&[501.0]))?;
        }
        let times = setup.plan.time_program(&mut *setup.executor, id)?;
        let row = Row { arena_bytes: Some(arena), ..Row::of(name, 1, &program, times) };
        found.push((row, id));
    }
    Ok(found)
}

/// One UNet pass, and its gradient to one of its inputs.
fn pass(setup: &Setup<'_>, batch: usize, leaf: Option<&str>) -> Result<Planned> {
    let Setup { pipeline, settings, .. } = setup;
    let (config, (height, width)) = (&pipeline.config.unet, pipeline.latent_size(settings.width, settings.height)?);
    let unet = Unet::new(config);
    let mut b = Builder::new("pass", settings.dtype);
    let latents = b.wide_input(LATENTS, &[batch, height, width, config.in_channels]);
    let context = b.input(CONTEXT, &[batch, pipeline.tokens(), config.context_width]);
    let timestep = b.wide_input("bench.timestep", &[1]);
    let added = pooled_width(pipeline)?.map(|width| Added {
        pooled: b.input("bench.pooled", &[batch, width]),
        size_ids: b.wide_input("bench.size_ids", &[batch, 6]),
    });
    let has_added = added.is_some();
    let mut time = unet.time(&mut b, timestep, added);
    if has_added {
        let zero = b.input_i32("bench.zero", &[1]);
        time = b.select(time, zero);
    }
    let kv = unet.context_kv(&mut b, context);
    let output = unet.forward(&mut b, latents, kv, time);
    let squares = b.dot(output, output);
    b.output("bench.squares", squares);
    let program = b.finish()?;
    let workspace = |program: &Program, node: &Node| setup.executor.workspace(program, node);
    let Some(leaf) = leaf else { return Ok(plan(program, workspace)) };
    let leaves = program.input(leaf).map(|id| (id, format!("d.{leaf}"))).into_iter().collect();
    let request = Request { objectives: vec![(squares, Cotangent::Ones)], leaves };
    Ok(plan_gradient(&program, &request, usize::MAX, workspace)?.0)
}

fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// Plain sampling and MinorityPrompt with its defaults, in turn with the passes that the prediction is made of.
pub fn methods(setup: &mut Setup<'_>) -> Result<Case> {
    let (pipeline, images, runs) = (setup.pipeline, setup.settings.clone(), setup.plan);
    let planned =
        Minority::plan(pipeline, &*setup.executor, minority::Settings::of(pipeline, images.clone())?, &[PROMPT])?;
    setup.check_memory(&planned.footprint(), 1)?;
    let (passes_planned, generator) = (planned.passes(), Generator::plan(pipeline, &*setup.executor, images, 1)?);
    let alone = passes(setup, 1)?;
    setup.executor.clear();
    let job = || Job { prompt: PROMPT.into(), negative: None, seed: setup.seed, draws: vec![] };
    let plain = {
        let mut loaded = generator.load(&mut *setup.executor)?;
        runs.time(|| loaded.run(&[job()], &mut |_| Ok(())).map(|_| ()))?
    };
    setup.executor.clear();
    let optimised = {
        let mut loaded = planned.load(&mut *setup.executor)?;
        Plan { warmup: runs.warmup.min(1), ..runs }.time(|| loaded.run(&[job()], &[1], &mut |_| Ok(())).map(|_| ()))?
    };
    setup.executor.clear();
    let iterations = passes_planned.backward / 2;
    let [_, (to_context, _), (to_latents, _)] = &alone[..] else {
        return Err(Error::Usage("three passes are timed".into()));
    };
    let each = to_context.times.median() + to_latents.times.median();
    let predicted = plain.median() + iterations as f64 * each;
    let over = optimised.median() / predicted;
    let row = |name: &str, times| Row { name: name.into(), calls: 1, times, flops: 0, bytes: 0, arena_bytes: None };
    let mut rows: Vec<Row> = alone.into_iter().map(|(row, _)| row).collect();
    rows.extend([row("plain sampling", plain), row("minority", optimised)]);
    let facts = json!({
        "iterations": iterations, "forward": passes_planned.forward, "backward": passes_planned.backward,
        "predicted_ms": predicted, "found_over_predicted": over,
    });
    Ok(Case { name: "methods, one image".into(), rows, total: None, facts })
}
