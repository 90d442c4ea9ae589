//! The same seeds by several methods, side by side on one labelled sheet, with what each method cost.

use crate::cli::flags::images::{Noise, RunFlags};
use crate::cli::flags::method::Context;
use crate::cli::images::ledger::{self, Cost, Ledger};
use crate::cli::images::scores::{PlannedScore, Score};
use crate::cli::images::sheet::{self, Grid, Ink, Tile, words};
use crate::cli::images::targets::{Selection, Target, Targets};
use crate::cli::images::work::{self, Part, Work};
use crate::cli::machine;
use crate::cli::progress::Reporter;
use crate::exec::Executor;
use crate::methods::{Chosen, ImageMethod, LoadedMethod};
use crate::metrics::shapes::{ShapesScore, ShapesScorer};
use crate::optimize::objective::Nfe;
use crate::pipeline::Progress;
use crate::pipeline::generate::{Image, Job};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What is compared, and where the sheet goes.
pub struct Comparison<'a> {
    pub prompt: &'a str,
    /// A column each.
    pub methods: &'a [Box<dyn ImageMethod>],
    /// A PNG.
    pub path: &'a Path,
    /// The flag that names it.
    pub flag: &'a str,
    /// What each method cost stands in the table and under its column.
    pub ledger: bool,
    pub scores: &'a [Score],
}

/// Seeds where --count does not say.
const SEEDS: usize = 4;

/// An image of the sheet.
struct Cell {
    image: Image,
    /// Where there is a reader, what it sees.
    shapes_score: Option<ShapesScore>,
    /// One per score asked for.
    scores: Vec<f64>,
}

pub fn run(flags: &RunFlags, context: &Context<'_>, comparison: &Comparison<'_>) -> Result<()> {
    let pipeline = context.pipeline;
    let settings = flags.settings(pipeline)?;
    let size = [settings.width, settings.height];
    let seeds = flags.count.unwrap_or(SEEDS);
    sheet::probe(comparison.path, comparison.flag, size, comparison.methods.len() * seeds)?;
    // Each image, its copy on its way to the sheet, and the sheet.
    let bytes = Some(3 * 3 * size[0] * size[1] * comparison.methods.len() * seeds);
    machine::check_host_memory(flags.device.memory_limit, bytes, "what the sheet shows")?;
    let all = Targets::for_prompt(comparison.prompt, flags.sampling.seed(), seeds, comparison.path)?;
    let targets: Vec<Target> = all.iter().collect();
    let noise = flags.noise(pipeline, &settings, seeds)?;
    let of_the_world = context.embedded && size == [pipeline.config.image_size; 2];
    let shapes_scorer = of_the_world.then(|| ShapesScorer::open(settings.width, settings.height)).transpose()?;
    let opened: Vec<_> = comparison.scores.iter().map(|score| score.open(pipeline)).collect::<Result<_>>()?;
    let reporter = Reporter::new(flags.json, flags.quiet);
    let interrupt = machine::catch_interrupt()?;
    let mut run = Run { flags, comparison, targets: &targets, noise, shapes_scorer, reporter, interrupt };
    let methods = comparison.methods.iter().map(|method| &**method);
    let works: Vec<Work<'_>> = methods.map(|method| Work { pipeline, settings: &settings, method }).collect();
    run.warn(&works)?;

    // Every method is planned before the first one starts: what does not fit the memory is not found out after hours.
    let mut executor = flags.device.executor(flags.check_finite)?;
    let selection = Selection::all_of(&all);
    let planned = works.iter().map(|work| work.plan(&flags.device, &*executor, &selection, flags.batch));
    let parts: Vec<Vec<Part<'_>>> = planned.collect::<Result<_>>()?;
    let planned = opened.iter().map(|score| score.plan(&flags.device, &*executor, &settings));
    let scores: Vec<PlannedScore<'_>> = planned.collect::<Result<_>>()?;
    let (mut columns, costs) = run.make(&mut *executor, parts)?;
    run.score(&mut *executor, scores, &mut columns)?;
    let ledgers = run.ledgers(&columns, &costs);
    run.write_sheet(size, &columns, &ledgers)?;
    let path = comparison.path;
    run.reporter.image(path, json!({"event": "sheet", "path": path.display().to_string()}))?;
    run.summarise(&ledgers)
}

struct Run<'a> {
    flags: &'a RunFlags,
    comparison: &'a Comparison<'a>,
    /// A row each.
    targets: &'a [Target],
    noise: Noise,
    /// Where the images are of the `shapes` world.
    shapes_scorer: Option<ShapesScorer>,
    reporter: Reporter,
    interrupt: Arc<AtomicBool>,
}

impl Run<'_> {
    fn negative<'m>(&'m self, method: &'m dyn ImageMethod) -> Option<&'m str> {
        method.negative(self.flags.sampling.negative.as_deref())
    }

    fn warn(&self, works: &[Work<'_>]) -> Result<()> {
        let Some(most_reserved) = works.iter().max_by_key(|work| work.method.reserved_tokens()) else { return Ok(()) };
        let negatives = || works.iter().filter_map(|work| self.negative(work.method));
        let prompt = [self.comparison.prompt].into_iter();
        let pipeline = most_reserved.pipeline;
        work::warn_of_learned_tokens(pipeline, prompt.clone().chain(negatives()), &self.reporter)?;
        work::warn_of_cut_tokens(most_reserved, prompt, negatives(), &self.reporter)?;
        let remarks = self.flags.remarks(pipeline, self.targets.len());
        let of_methods = works.iter().flat_map(|work| work.method.remarks(work.settings));
        remarks.into_iter().chain(of_methods).for_each(|remark| self.reporter.warn(&remark));
        let sampling = &self.flags.sampling;
        let replaces_negative = |work: &Work<'_>| work.method.negative(None).is_some();
        if sampling.guidance == Some(1.0) && !sampling.cfg_pp && works.iter().any(replaces_negative) {
            self.reporter.warn("--guidance 1 uses no negative prompt: the null-prompted images are the plain ones");
        }
        Ok(())
    }

    /// The images of each method, seed by seed, and their cost. Programs of one method at a time are loaded; the weights stay.
    fn make(&mut self, executor: &mut dyn Executor, parts: Vec<Vec<Part<'_>>>) -> Result<(Vec<Vec<Cell>>, Vec<Cost>)> {
        self.reporter.start("step", parts.iter().flatten().map(Part::progress_units).fold(0, usize::saturating_add));
        let (mut columns, mut costs) = (Vec::new(), Vec::new());
        for (method, parts) in self.comparison.methods.iter().zip(parts) {
            let (mut cells, mut cost) = (Vec::new(), Cost::default());
            for part in parts {
                executor.clear();
                let Nfe { forward, backward } = part.nfe();
                cost.nfe.forward += forward;
                cost.nfe.backward += backward;
                let Part { planned, batches } = part;
                cost.peak_bytes = cost.peak_bytes.max(planned.footprint().total());
                let mut loaded = planned.load(executor)?;
                for positions in batches.iter() {
                    let targets = &self.targets[positions];
                    let started = Instant::now();
                    let images = self.make_batch(&mut *loaded, targets)?;
                    cost.seconds += started.elapsed().as_secs_f64();
                    for (index, (target, image)) in targets.iter().zip(images).enumerate() {
                        let shapes_scorer = self.shapes_scorer.as_mut();
                        let shapes_score = shapes_scorer
                            .map(|shapes_scorer| shapes_scorer.score(&target.prompt, &image.rgb))
                            .transpose()?;
                        self.tell(&method.title(), target.seed, shapes_score, loaded.chosen(index))?;
                        cells.push(Cell { image, shapes_score, scores: vec![] });
                    }
                }
            }
            columns.push(cells);
            costs.push(cost);
        }
        self.reporter.finish();
        Ok((columns, costs))
    }

    fn make_batch(&self, loaded: &mut dyn LoadedMethod, targets: &[Target]) -> Result<Vec<Image>> {
        let negative = self.flags.sampling.negative.as_deref();
        let jobs: Vec<Job> = targets.iter().map(|target| work::job(target, negative, &self.noise)).collect();
        loaded.run_checked(&jobs, &mut |progress| {
            match progress {
                Progress::Step { .. } | Progress::Iteration(_) => self.reporter.step(),
                Progress::Remark { text, .. } => self.reporter.warn(text),
                Progress::Image { .. } | Progress::Preview { .. } | Progress::Again => {}
            }
            if self.interrupt.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
        })
    }

    fn tell(&self, name: &str, seed: u64, shapes_score: Option<ShapesScore>, chosen: Option<Chosen>) -> Result<()> {
        let seen = |get: fn(&ShapesScore) -> Value| shapes_score.as_ref().map_or(Value::Null, get);
        self.reporter.event(json!({
            "event": "compared", "name": name, "seed": seed,
            "log_density": seen(|shapes_score| json!(shapes_score.log_density.is_finite().then_some(shapes_score.log_density))),
            "impossible": seen(|shapes_score| json!(shapes_score.log_density.is_infinite())),
            "stated": seen(|shapes_score| json!(shapes_score.stated)), "wrong": seen(|shapes_score| json!(shapes_score.wrong)),
            "chosen_seed": chosen.and_then(|chosen| chosen.seed)
        }))
    }

    /// Every score of every image.
    fn score(
        &self,
        executor: &mut dyn Executor,
        scores: Vec<PlannedScore<'_>>,
        columns: &mut [Vec<Cell>],
    ) -> Result<()> {
        for planned in scores {
            let name = planned.score.name();
            let images = columns.iter().flat_map(|cells| self.targets.iter().zip(cells.iter().map(|cell| &cell.image)));
            let values = planned.run(executor, images, &self.interrupt)?;
            for (cells, values) in columns.iter_mut().zip(values.chunks(self.targets.len())) {
                cells.iter_mut().zip(values).for_each(|(cell, value)| cell.scores.push(*value));
            }
            for (method, cells) in self.comparison.methods.iter().zip(columns.iter()) {
                for (target, cell) in self.targets.iter().zip(cells) {
                    let (title, value) = (method.title(), cell.scores.last());
                    self.reporter.event(json!({"event": "scored", "name": title, "seed": target.seed, name: value}))?;
                }
            }
        }
        Ok(())
    }

    fn ledgers(&self, columns: &[Vec<Cell>], costs: &[Cost]) -> Vec<Ledger> {
        let mut ledgers = Vec::new();
        for (index, (cells, cost)) in columns.iter().zip(costs).enumerate() {
            let shapes_scores =
                self.shapes_scorer.is_some().then(|| cells.iter().filter_map(|cell| cell.shapes_score).collect());
            let values = |i: usize| cells.iter().map(|cell| cell.scores[i]).collect();
            let scores: Vec<_> = self.comparison.scores.iter().enumerate().map(|(i, s)| (*s, values(i))).collect();
            let title = self.comparison.methods[index].title();
            ledgers.push(Ledger::new(title, cells.len(), *cost, shapes_scores, &scores));
        }
        ledgers
    }

    fn write_sheet(&self, size: [usize; 2], columns: &[Vec<Cell>], ledgers: &[Ledger]) -> Result<()> {
        let Comparison { prompt, methods, path, ledger, scores, .. } = self.comparison;
        let cells = (0..self.targets.len()).flat_map(|row| columns.iter().map(move |column| &column[row]));
        let tile = |cell: &Cell| Tile { rgb: cell.image.rgb.clone(), text: captions(cell, scores) };
        let tiles: Vec<Tile> = cells.map(tile).collect();
        let columns: Vec<String> = methods.iter().map(|method| method.title()).collect();
        let rows: Vec<String> = self.targets.iter().map(|target| format!("seed {}", target.seed)).collect();
        let feet: Vec<Vec<String>> = if *ledger { ledgers.iter().map(Ledger::foot).collect() } else { vec![] };
        sheet::write(path, size, &tiles, &Grid::Table { title: prompt, columns: &columns, rows: &rows, feet: &feet })
    }

    /// A line per method.
    fn summarise(&self, ledgers: &[Ledger]) -> Result<()> {
        for (method, ledger) in self.comparison.methods.iter().zip(ledgers) {
            self.reporter.event(ledger.event(&**method, self.negative(&**method)))?;
        }
        if !self.flags.json && (self.comparison.ledger || self.shapes_scorer.is_some()) {
            let lines = ledger::table(ledgers, self.comparison.ledger);
            lines.iter().try_for_each(|line| self.reporter.line(line))?;
        }
        self.reporter.event(json!({"event": "done"}))
    }
}

/// What stands under an image: how rare it is, its scores, and in red how much of the prompt it lacks.
fn captions(cell: &Cell, scores: &[Score]) -> Vec<Vec<(String, Ink)>> {
    let scored = scores.iter().zip(&cell.scores);
    let scored = scored.map(|(score, x)| words(&format!("{} {x:.4}", score.label()), Ink::Plain));
    let Some(ShapesScore { log_density, stated, wrong }) = cell.shapes_score else { return scored.collect() };
    let density =
        if log_density.is_finite() { format!("log-density {log_density:.2}") } else { "impossible".to_string() };
    let mistakes = if wrong > 0 { format!("{wrong} of {stated} wrong") } else { String::new() };
    [words(&density, Ink::Plain)].into_iter().chain(scored).chain([words(&mistakes, Ink::Wrong)]).collect()
}
