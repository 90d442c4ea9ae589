//! The UNet forward and backward, and a method against the passes it was planned to make.

use super::measure::{Plan, Row, Times, wave};
use super::report::Case;
use super::setup::{PROMPT, Setup};
use crate::Result;
use crate::autodiff::{Cotangent, Request};
use crate::exec::Data;
use crate::methods::minority::{self, Minority};
use crate::models::unet::{Added, Unet};
use crate::optimize::objective::Nfe;
use crate::pipeline::generate::{Generator, Job};
use crate::pipeline::programs::{check_pixels, pooled_width};
use crate::plan::{Footprint, Planned, plan, plan_gradient};
use crate::program::{Builder, Node, Program};
use serde_json::json;

const LATENTS: &str = "bench.latents";
const CONTEXT: &str = "bench.context";

/// Of the case of [`gradients`].
pub fn name(batch: usize) -> String {
    format!("UNet passes of batch {batch}")
}

/// Of the case of [`methods`].
pub const METHODS: &str = "methods, one image";

/// One pass, and one with its gradient to the text states or to the latents.
pub fn gradients(setup: &mut Setup<'_>, batch: usize) -> Result<Case> {
    let rows = passes(setup, batch, setup.plan)?;
    setup.executor.clear();
    Ok(Case { name: name(batch), rows, total: None, facts: json!({}) })
}

/// The passes, loaded and timed.
fn passes(setup: &mut Setup<'_>, batch: usize, runs: Plan) -> Result<Vec<Row>> {
    let mut found = vec![];
    let names = ["unet forward", "  and backward to the text", "  and backward to the latents"];
    let leaves = [None, Some(CONTEXT), Some(LATENTS)];
    let planned = leaves.map(|leaf| pass(setup, batch, leaf)).into_iter().collect::<Result<Vec<_>>>()?;
    setup.check_memory(&Footprint::of(&planned.iter().collect::<Vec<_>>()), batch)?;
    for ((name, leaf), planned) in names.into_iter().zip(leaves).zip(planned) {
        let (program, arena) = (planned.program.clone(), planned.plan.arena_bytes);
        let id = setup.executor.load(planned, &setup.pipeline.model)?;
        if leaf.is_none() {
            for (name, value) in [LATENTS, CONTEXT].into_iter().filter_map(|n| Some((n, program.input(n)?))) {
                setup.executor.write(name, Data::F32(&wave(program.value(value).len())))?;
            }
            setup.executor.write("bench.timestep", Data::F32(&[501.0]))?;
        }
        let times = runs.time_program(&mut *setup.executor, id)?;
        found.push(Row { arena_bytes: Some(arena), ..Row::of(name, 1, &program, times) });
    }
    Ok(found)
}

/// One UNet pass, and its gradient to one of its inputs.
fn pass(setup: &Setup<'_>, batch: usize, leaf: Option<&str>) -> Result<Planned> {
    let Setup { pipeline, settings, .. } = setup;
    let (config, (height, width)) = (&pipeline.config.unet, pipeline.latent_size(settings.width, settings.height)?);
    let unet = Unet::new(config);
    check_pixels(settings.width, settings.height, batch)?;
    let mut b = Builder::new("pass", settings.dtype);
    let latents = b.accumulator_input(LATENTS, &[batch, height, width, config.in_channels]);
    let context = b.input(CONTEXT, &[batch, pipeline.tokens(), config.context_width]);
    let timestep = b.accumulator_input("bench.timestep", &[1]);
    let added = pooled_width(pipeline)?.map(|width| Added {
        pooled: b.input("bench.pooled", &[batch, width]),
        size_ids: b.accumulator_input("bench.size_ids", &[batch, 6]),
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

/// Plain sampling and MinorityPrompt with its defaults, round by round between the passes that the prediction is made of: machines
/// change their pace, and a ratio is of one round.
pub fn methods(setup: &mut Setup<'_>) -> Result<Case> {
    let (pipeline, rounds) = (setup.pipeline, setup.plan.runs);
    let job = Job { prompt: PROMPT.into(), negative: None, seed: setup.seed, draws: vec![] };
    let once = Plan { runs: 1, warmup: 0 };
    let mut counted = Nfe::default();
    let (mut rows, mut ratios): (Vec<Row>, Vec<f64>) = (vec![], vec![]);
    for _ in 0..rounds {
        let planned = minority::Settings::of(pipeline, setup.settings.clone())?;
        let planned = Minority::plan(pipeline, &*setup.executor, planned, &[PROMPT])?;
        setup.check_memory(&planned.footprint(), 1)?;
        counted = planned.nfe();
        let generator = Generator::plan(pipeline, &*setup.executor, setup.settings.clone(), 1)?;
        setup.check_memory(&generator.footprint(), 1)?;
        let mut round: Vec<Row> = passes(setup, 1, Plan { runs: 3, warmup: 0 })?;
        setup.executor.clear();
        let plain = {
            let mut loaded = generator.load(&mut *setup.executor)?;
            let mut make = || loaded.run(std::slice::from_ref(&job), &mut |_| Ok(())).map(|_| ());
            Plan { warmup: 1, ..once }.time(&mut make)?
        };
        setup.executor.clear();
        let optimised = {
            let mut loaded = planned.load(&mut *setup.executor)?;
            once.time(|| loaded.run(std::slice::from_ref(&job), &[1], &mut |_| Ok(())).map(|_| ()))?
        };
        setup.executor.clear();
        let iterations = (counted.backward / 2) as f64;
        let each: f64 = round[1..].iter().map(|row| row.times.median()).sum();
        ratios.push(optimised.median() / (plain.median() + iterations * each));
        let row = |name: &str, times| Row { name: name.into(), calls: 1, times, flops: 0, bytes: 0, arena_bytes: None };
        round.extend([row("plain sampling", plain), row("minority", optimised)]);
        for (index, row) in round.into_iter().enumerate() {
            match rows.get_mut(index) {
                Some(sum) => sum.times.ms.extend(row.times.ms),
                None => rows.push(row),
            }
        }
    }
    let facts = json!({
        "iterations": counted.backward / 2, "forward": counted.forward, "backward": counted.backward,
        "found_over_predicted": Times { ms: ratios.clone() }.median(), "raw_found_over_predicted": ratios,
    });
    Ok(Case { name: METHODS.into(), rows, total: None, facts })
}
