//! `rarebit minority --compare`: the same seeds by MinorityPrompt and its rivals, side by side on one labelled sheet.

use crate::cli::generate::RivalFlags;
use crate::cli::images::run::{self, ImageFlags, Noise, Work};
use crate::cli::images::sheet::{self, Grid, Ink, Tile, words};
use crate::cli::images::targets::{self, Target};
use crate::cli::machine;
use crate::cli::method::{Method, Planned};
use crate::cli::minority::Options;
use crate::cli::progress::Reporter;
use crate::exec::Executor;
use crate::metrics::shapes::{Eye, Sight};
use crate::pipeline::Pipeline;
use crate::pipeline::Progress;
use crate::pipeline::generate::Job;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::slice::Chunks;
use std::sync::atomic::Ordering;

#[derive(clap::Args)]
#[command(mut_group("RivalFlags", |group| group.requires("compare")))]
#[command(mut_arg("cads", |flag| flag.hide(true)))]
pub struct CompareFlags {
    /// Make the images of --count seeds [default: 4] by plain sampling, null-prompted, CADS, SGMS and this method, and
    /// write them side by side on one sheet
    #[arg(long, value_name = "FILE.png", help_heading = "Comparison")]
    pub compare: Option<PathBuf>,
    /// What the null-prompted images should not show [default: the typical image; its words are ours]
    #[arg(long, value_name = "TEXT", requires = "compare", help_heading = "Comparison")]
    null_prompt: Option<String>,
    #[command(flatten, next_help_heading = "Comparison")]
    rivals: RivalFlags,
}

/// Seeds where --count does not say.
const SEEDS: usize = 4;

/// What null-prompted images should not show. The paper does not print its words; these are ours.
const TYPICAL: &str = "a typical, ordinary image";

/// The same for the embedded model, in words it was trained on.
const TYPICAL_SHAPE: &str = "a picture of a medium flat plain shape in the center on a flat white background";

/// A column of the sheet.
struct Rival {
    name: &'static str,
    method: Method,
    negative: Option<String>,
}

impl CompareFlags {
    fn rivals(&self, images: &ImageFlags, options: Options) -> Vec<Rival> {
        let typical = if images.model.model.is_none() { TYPICAL_SHAPE } else { TYPICAL };
        let typical = self.null_prompt.as_deref().unwrap_or(typical).to_string();
        let negative = || images.sampling.negative.clone();
        let rival = |name, method, negative| Rival { name, method, negative };
        vec![
            rival("DDIM", Method::Plain, negative()),
            rival("null-prompted", Method::Plain, Some(typical)),
            rival("CADS", Method::Cads(self.rivals.cads()), negative()),
            rival("SGMS", Method::Sgms(self.rivals.sgms()), negative()),
            rival("MinorityPrompt", Method::Minority(options), negative()),
        ]
    }
}

/// An image of the sheet and, where there is a reader, what it sees.
struct Cell {
    rgb: Vec<u8>,
    sight: Option<Sight>,
}

/// What one method makes with one batch size: planned, and the targets in batches.
struct Part<'a> {
    rival: usize,
    planned: Planned<'a>,
    batches: Chunks<'a, Target>,
}

pub fn run(args: &ImageFlags, flags: &CompareFlags, path: &Path, pipeline: &Pipeline, options: Options) -> Result<()> {
    let prompt = args.prompt.as_deref().unwrap_or_default();
    let settings = args.sampling.settings(pipeline, args.device.program_dtype()?)?;
    let size = [settings.width, settings.height];
    let rivals = flags.rivals(args, options);
    let seeds = args.count.unwrap_or(SEEDS);
    sheet::probe(path, "--compare", size, rivals.len() * seeds)?;
    let targets = targets::for_prompt(prompt, args.sampling.seed, seeds, path);
    let noise = args.noise(pipeline, &settings, seeds)?;
    let of_the_world = args.model.model.is_none() && size == [pipeline.config.image_size; 2];
    let eye = of_the_world.then(|| Eye::open(settings.width, settings.height)).transpose()?;
    let mut run = Run { args, prompt, noise, eye, reporter: Reporter::new(args.json, args.quiet), rivals: &rivals };
    let works: Vec<Work> =
        rivals.iter().map(|rival| Work { pipeline, settings: &settings, method: &rival.method }).collect();
    run.warn(pipeline, &works)?;

    // Every method is planned before the first one starts: what does not fit the memory is not found out after hours.
    let executor = args.device.executor(args.check_finite)?;
    let mut parts = Vec::new();
    for (rival, work) in works.iter().enumerate() {
        for batches in run::groups(&targets, args.batch) {
            let first = batches.clone().next().unwrap_or_default();
            parts.push(Part { rival, planned: work.plan(&args.device, &*executor, first)?, batches });
        }
    }
    let columns = run.make(executor, parts)?;
    run.write_sheet(path, size, &targets, &columns)?;
    run.reporter.image(path, json!({"event": "sheet", "path": path.display().to_string()}))?;
    run.summarise(&columns)
}

struct Run<'a> {
    args: &'a ImageFlags,
    prompt: &'a str,
    noise: Noise,
    /// Where the images are of the `shapes` world.
    eye: Option<Eye>,
    reporter: Reporter,
    rivals: &'a [Rival],
}

impl Run<'_> {
    fn warn(&self, pipeline: &Pipeline, works: &[Work<'_>]) -> Result<()> {
        let most_reserved = works.iter().max_by_key(|work| work.method.reserved_tokens());
        let negatives = self.rivals.iter().filter_map(|rival| rival.negative.as_deref());
        most_reserved.map_or(Ok(()), |work| {
            run::warn_of_cut_tokens(work, [self.prompt].into_iter(), negatives, &self.reporter)
        })?;
        self.args.sampling.remarks(pipeline).iter().for_each(|remark| self.reporter.warn(remark));
        if self.args.sampling.guidance == Some(1.0) && !self.args.sampling.cfg_pp {
            self.reporter.warn("--guidance 1 hears no negative prompt: the null-prompted images are the plain ones");
        }
        Ok(())
    }

    /// The images of each method, seed by seed. Programs of one method at a time are loaded; the weights stay.
    fn make(&mut self, mut executor: Box<dyn Executor>, parts: Vec<Part<'_>>) -> Result<Vec<Vec<Cell>>> {
        let interrupt = machine::catch_interrupt()?;
        let ticks = parts.iter().map(|part| part.planned.ticks() * part.batches.len()).sum();
        self.reporter.start("step", ticks);
        let mut columns: Vec<Vec<Cell>> = self.rivals.iter().map(|_| Vec::new()).collect();
        for Part { rival, planned, batches } in parts {
            executor.clear();
            let mut loaded = planned.load(&mut *executor)?;
            for targets in batches {
                let negative = self.rivals[rival].negative.as_deref();
                let jobs: Vec<Job> = targets.iter().map(|target| run::job(target, negative, &self.noise)).collect();
                let images = loaded.run(&jobs, &mut |progress| {
                    match progress {
                        Progress::Step { .. } | Progress::Iteration(_) => self.reporter.step(),
                        Progress::Image { .. } | Progress::Again => {}
                    }
                    if interrupt.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
                })?;
                for (target, image) in targets.iter().zip(images) {
                    let eye = self.eye.as_mut();
                    let sight = eye.map(|eye| eye.look(&target.prompt, &image.rgb)).transpose()?;
                    self.tell(self.rivals[rival].name, target.seed, sight)?;
                    columns[rival].push(Cell { rgb: image.rgb, sight });
                }
            }
        }
        self.reporter.finish();
        Ok(columns)
    }

    fn tell(&self, name: &str, seed: u64, sight: Option<Sight>) -> Result<()> {
        let seen = |get: fn(&Sight) -> Value| sight.as_ref().map_or(Value::Null, get);
        self.reporter.event(json!({
            "event": "compared", "name": name, "seed": seed,
            "log_density": seen(|sight| json!(sight.log_density.is_finite().then_some(sight.log_density))),
            "impossible": seen(|sight| json!(sight.log_density.is_infinite())),
            "stated": seen(|sight| json!(sight.stated)), "wrong": seen(|sight| json!(sight.wrong))
        }))
    }

    fn write_sheet(&self, path: &Path, size: [usize; 2], targets: &[Target], columns: &[Vec<Cell>]) -> Result<()> {
        let cells = (0..targets.len()).flat_map(|row| columns.iter().map(move |column| &column[row]));
        let tiles: Vec<Tile> = cells.map(|cell| Tile { rgb: cell.rgb.clone(), text: captions(cell.sight) }).collect();
        let columns: Vec<String> = self.rivals.iter().map(|rival| rival.name.to_string()).collect();
        let rows: Vec<String> = targets.iter().map(|target| format!("seed {}", target.seed)).collect();
        sheet::write(path, size, &tiles, &Grid::Table { title: self.prompt, columns: &columns, rows: &rows })
    }

    /// A line per method.
    fn summarise(&self, columns: &[Vec<Cell>]) -> Result<()> {
        if self.eye.is_some() && !self.args.json {
            self.reporter.line("method          log-density  impossible  agreement")?;
        }
        for (rival, cells) in self.rivals.iter().zip(columns) {
            let sights: Vec<Sight> = cells.iter().filter_map(|cell| cell.sight).collect();
            let possible: Vec<f64> = sights.iter().map(|sight| sight.log_density).filter(|x| x.is_finite()).collect();
            let impossible = sights.len() - possible.len();
            let stated: Vec<f64> = sights.iter().filter(|sight| sight.stated > 0).map(Sight::agreement).collect();
            let (log_density, agreement) = (mean(&possible), mean(&stated));
            self.reporter.event(json!({
                "event": "method", "name": rival.name, "method": rival.method.name(), "options": rival.method.options(),
                "negative": rival.negative, "images": cells.len(), "log_density": log_density,
                "impossible": self.eye.is_some().then_some(impossible), "agreement": agreement
            }))?;
            if self.eye.is_some() && !self.args.json {
                let show = |x: Option<f64>, digits: usize| x.map_or("none".into(), |x| format!("{x:.digits$}"));
                let (name, log_density, agreement) = (rival.name, show(log_density, 2), show(agreement, 3));
                self.reporter.line(&format!("{name:<14}  {log_density:>11}  {impossible:>10}  {agreement:>9}"))?;
            }
        }
        self.reporter.event(json!({"event": "done"}))
    }
}

/// What stands under an image: how rare it is, and in red how much of the prompt it lacks.
fn captions(sight: Option<Sight>) -> Vec<Vec<(String, Ink)>> {
    let Some(Sight { log_density, stated, wrong }) = sight else { return vec![] };
    let density =
        if log_density.is_finite() { format!("log-density {log_density:.2}") } else { "impossible".to_string() };
    let mistakes = if wrong > 0 { format!("{wrong} of {stated} wrong") } else { String::new() };
    vec![words(&density, Ink::Plain), words(&mistakes, Ink::Wrong)]
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
