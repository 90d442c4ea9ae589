//! Whole images: how long one takes or how many a second gives, and where the time goes.

use super::measure::{Plan, Row, Times};
use super::report::Case;
use super::setup::{PROMPT, Setup};
use crate::exec::cuda::{AHEAD, NvmlDevice};
use crate::pipeline::Progress;
use crate::pipeline::generate::{Generator, Image, Job};
use crate::plan::Planned;
use crate::weights::fingerprint;
use crate::{Error, Result};
use serde_json::json;
use std::time::Instant;

/// Of the case.
pub fn name(batch: usize) -> String {
    format!("images of batch {batch}")
}

/// A batch of images, its programs alone, and what that cost.
pub fn run(setup: &mut Setup<'_>, nvml: &NvmlDevice, batch: usize) -> Result<Case> {
    let images = setup.settings.clone();
    let (seed, runs) = (setup.seed, setup.plan);
    let generator = Generator::plan(setup.pipeline, &*setup.executor, images, batch)?;
    setup.check_memory(&generator.footprint(), batch)?;
    let (footprint, steps) = (generator.footprint(), generator.calls());
    let programs = generator.programs().all().map(Clone::clone);

    let started = Instant::now();
    let mut loaded = generator.load(&mut *setup.executor)?;
    let load = started.elapsed().as_secs_f64();
    let jobs = |run: usize| -> Vec<Job> {
        let job = |i| Job {
            prompt: PROMPT.into(),
            negative: None,
            seed: seed.wrapping_add((run * batch + i) as u64),
            draws: vec![],
        };
        (0..batch).map(job).collect()
    };
    let mut first: Option<Image> = None;
    let mut starts = Starts::default();
    let mut make = |run: usize| -> Result<()> {
        starts.last = None;
        let made = loaded.run(&jobs(run), &mut |progress| {
            starts.see(&progress);
            Ok(())
        })?;
        first = first.take().or(made.into_iter().next());
        Ok(())
    };
    let started = Instant::now();
    make(0)?;
    let first_image = started.elapsed().as_secs_f64();
    let mut number = 0;
    (1..runs.warmup).try_for_each(|_| make(0))?;
    let energy = nvml.energy();
    let wall = Instant::now();
    let times = Plan { warmup: 0, ..runs }.time(|| {
        number += 1;
        make(number - 1)
    })?;
    let seconds = wall.elapsed().as_secs_f64();
    let joules = nvml.energy().zip(energy).map(|(after, before)| after - before);
    let held = setup.free.zip(setup.executor.free_memory()?).map(|(before, after)| before.saturating_sub(after));

    let rows = stages(setup, programs, [batch, 1, steps, batch])?;
    setup.executor.clear();
    let flops = rows.iter().map(|row| row.flops * row.calls as u64).sum();
    let bytes = rows.iter().map(|row| row.bytes * row.calls).sum();
    let what = if batch == 1 { "image" } else { "batch" };
    let total = Row { name: what.into(), calls: 1, times, flops, bytes, arena_bytes: None };
    let image = first.ok_or_else(|| Error::Usage("no image was made".into()))?;
    let made = (runs.runs * batch) as f64;
    Ok(Case {
        name: name(batch),
        facts: json!({
            "images_per_s": made / seconds,
            "flops_per_image": flops / batch as u64,
            "mem": {
                "planned": footprint.total(), "weights": footprint.weight_bytes, "activations": footprint.arena_bytes,
                "buffers": footprint.buffer_bytes, "held": held,
            },
            "energy": {"joules_per_image": joules.map(|j| j / made), "avg_w": joules.map(|j| j / seconds)},
            // On the CPU the host does the work itself.
            "host_us_per_step": setup.free.and_then(|_| starts.median_us()),
            "open_s": setup.open_s,
            "load_s": load,
            "first_image_s": first_image,
            "determinism": {"image_hash": format!("{:016x}", fingerprint(image.rgb))},
        }),
        rows,
        total: Some(total),
    })
}

/// When the host starts the first steps of an image, which do not wait for the device: later ones wait until there is room there.
#[derive(Default)]
struct Starts {
    last: Option<Instant>,
    seconds: Vec<f64>,
}

impl Starts {
    fn see(&mut self, progress: &Progress<'_>) {
        if let Progress::Step { done, .. } = progress {
            let now = Instant::now();
            let before = self.last.replace(now).filter(|_| *done <= AHEAD);
            self.seconds.extend(before.map(|before| (now - before).as_secs_f64()));
        }
    }

    /// Microseconds from one to the next.
    fn median_us(&self) -> Option<f64> {
        let times = Times { ms: self.seconds.iter().map(|seconds| 1e3 * seconds).collect() };
        (!times.ms.is_empty()).then(|| 1e3 * times.median())
    }
}

/// Every program alone, on what the last image left in its buffers; `calls` are those of one batch.
fn stages(setup: &mut Setup<'_>, programs: [Planned; 4], calls: [usize; 4]) -> Result<Vec<Row>> {
    let names = ["text encode", "condition", "unet step", "vae decode"];
    let mut rows = vec![];
    for (planned, (name, calls)) in programs.into_iter().zip(names.into_iter().zip(calls)) {
        let program = planned.program.clone();
        let id = setup.executor.load(planned, &setup.pipeline.model)?;
        let times = setup.plan.time_program(&mut *setup.executor, id)?;
        rows.push(Row::of(name, calls, &program, times));
    }
    Ok(rows)
}
