//! `rarebit score`: images, measured. `--shapes` holds images of the `shapes` world against its exact density.

use crate::cli::flags::device::DeviceFlags;
use crate::cli::flags::values;
use crate::cli::images::sheet::{self, Grid, Ink, Tile, words};
use crate::cli::paths::Paths;
use crate::cli::progress::Reporter;
use crate::cli::{machine, report};
use crate::data::images::{self, Picture};
use crate::metrics::shapes::{self, Instrument, Judge, Reader, Scored, Statement, World};
use crate::plan::Footprint;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Score {
    /// PNG, JPEG or WebP files, or folders of them
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Read what 64x64 images of the `shapes` world show: rarity, agreement with their prompts, diversity
    #[arg(long)]
    shapes: bool,
    /// The prompt of all images [default: the one each image carries]
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Stop at the first image that cannot be read; without, the others are measured, and the exit code is 1
    #[arg(long)]
    strict: bool,
    /// A line per image however many there are [default: for at most 32]
    #[arg(long)]
    each: bool,
    /// Write a contact sheet of the images and what was read, wrong readings in red
    #[arg(long, value_name = "FILE.png")]
    sheet: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceFlags,
    /// Images read together
    #[arg(long, default_value_t = 16, allow_negative_numbers = true, value_parser = values::count)]
    batch: usize,
    /// Worker threads, at most 1024 [default: one per core]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// No progress; warnings stay
    #[arg(long)]
    quiet: bool,
    /// An object per image and a summary as JSON lines on stdout
    #[arg(long)]
    json: bool,
}

impl Score {
    pub fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }
}

/// Most images that get a line each unless the user asks.
const FEW: usize = 32;

/// Characters of a prompt on the sheet.
const PROMPT_LENGTH: usize = 60;

pub fn run(args: &Score) -> Result<()> {
    if !args.shapes {
        return Err(Error::Usage("score: say what to measure; this version has --shapes".into()));
    }
    let world = World::embedded()?;
    let instrument = Instrument::embedded(&world)?;
    let mut unreadable = Unreadable::new(args.strict, Reporter::new(args.json, args.quiet));
    let mut paths = Vec::new();
    for path in &args.images {
        match images::find(std::slice::from_ref(path)) {
            Ok(found) => paths.extend(found),
            Err(error) => unreadable.add(path, error)?,
        }
    }
    if paths.is_empty() {
        return unreadable.outcome();
    }
    if let Some(path) = &args.sheet {
        let mut all = Paths::default();
        paths.iter().for_each(|image| all.input("score", image));
        all.output("--sheet", path)?;
        sheet::probe(path, "--sheet", [world.image_size; 2], paths.len())?;
    }
    let batch = args.batch.min(paths.len());
    let executor = args.device.executor(false)?;
    let planned = instrument.plan(&*executor, args.device.program_dtype()?, batch)?;
    machine::check_memory(
        args.device.memory_limit,
        executor.free_memory()?,
        &Footprint::of(&[&planned]),
        "a smaller --batch",
    )?;

    let mut run = Run {
        args,
        world: &world,
        reader: instrument.load(executor, planned)?,
        judge: Judge::new(&world),
        lines: (!args.json && (args.each || paths.len() <= FEW)).then(|| report::Lines::new(&world, &paths)),
        reporter: Reporter::new(args.json, args.quiet),
        unreadable,
        scored: Vec::new(),
        tiles: Vec::new(),
        not_captions: None,
    };
    run.read(&paths, batch)?;
    if !run.scored.is_empty() {
        run.summarise(&instrument)?;
    }
    run.unreadable.outcome()
}

/// Images that could not be read: a line each, and the last one's is the outcome.
struct Unreadable {
    /// The first one ends the run.
    strict: bool,
    reporter: Reporter,
    last: Option<Error>,
}

impl Unreadable {
    fn new(strict: bool, reporter: Reporter) -> Unreadable {
        Unreadable { strict, reporter, last: None }
    }

    fn add(&mut self, path: &Path, error: Error) -> Result<()> {
        if self.strict {
            return Err(error);
        }
        let (path, text) = (path.display().to_string(), error.to_string());
        self.reporter.event(json!({"event": "unreadable", "path": path, "error": text}))?;
        if let Some(before) = self.last.replace(error) {
            self.reporter.warn(&before.to_string());
        }
        Ok(())
    }

    fn outcome(self) -> Result<()> {
        self.last.map_or(Ok(()), Err)
    }
}

/// What is known of the images so far: a few numbers each, and with --sheet their pixels.
struct Run<'a> {
    args: &'a Score,
    world: &'a World,
    reader: Reader,
    judge: Judge<'a>,
    /// Where every image gets a line.
    lines: Option<report::Lines<'a>>,
    reporter: Reporter,
    unreadable: Unreadable,
    scored: Vec<Scored>,
    tiles: Vec<Tile>,
    /// How many prompts are outside the grammar, and why the first of them is.
    not_captions: Option<(usize, String)>,
}

impl Run<'_> {
    fn read(&mut self, paths: &[PathBuf], batch: usize) -> Result<()> {
        if let Some(lines) = &self.lines {
            self.reporter.line(&lines.head())?;
        }
        self.reporter.start("image", paths.len());
        self.unreadable.reporter = self.reporter.clone();
        for paths in paths.chunks(batch) {
            let mut pictures: Vec<(&PathBuf, Picture)> = Vec::with_capacity(paths.len());
            for path in paths {
                match images::read_square(path, self.world.image_size) {
                    Ok(picture) => pictures.push((path, picture)),
                    Err(error) => {
                        self.unreadable.add(path, error)?;
                        self.reporter.step();
                    }
                }
            }
            if pictures.is_empty() {
                continue;
            }
            let pixels: Vec<u8> = pictures.iter().flat_map(|(_, picture)| &picture.rgb).copied().collect();
            let readings = self.reader.read(&pixels)?;
            for ((path, picture), reading) in pictures.into_iter().zip(readings) {
                let prompt = self.args.prompt.clone().or(picture.prompt);
                let stated = prompt.as_ref().and_then(|prompt| self.parse(prompt));
                let image = self.judge.judge(reading, stated);
                self.show(path, prompt.as_deref(), &image)?;
                if self.args.sheet.is_some() {
                    self.tiles.push(tile(self.world, picture.rgb, prompt.as_deref(), &image));
                }
                self.scored.push(image);
                self.reporter.step();
            }
        }
        self.reporter.finish();
        Ok(())
    }

    /// The sheet and the report.
    fn summarise(&self, instrument: &Instrument) -> Result<()> {
        if let Some(path) = &self.args.sheet {
            sheet::write(path, [self.world.image_size; 2], &self.tiles, &Grid::Square)?;
        }
        let summary = shapes::report(self.world, &self.scored);
        let not_captions = &self.not_captions;
        if self.args.json {
            let mut event = json!({"event": "summary", "report": summary, "reader": instrument.reference});
            let count = |(n, why): &(usize, String)| json!({"prompts": n, "first": why});
            event["not_captions"] = not_captions.as_ref().map_or(Value::Null, count);
            return self.reporter.event(event);
        }
        let text = report::text(&summary, instrument.reference.as_ref(), not_captions);
        let gap = if self.lines.is_some() { "\n" } else { "" };
        self.reporter.text(&format!("{gap}{text}"))
    }

    /// What the prompt states; a prompt outside the grammar is counted.
    fn parse(&mut self, prompt: &str) -> Option<Statement> {
        match self.world.parse(prompt) {
            Ok(stated) => Some(stated),
            Err(why) => {
                self.not_captions.get_or_insert_with(|| (0, format!("'{}': {why}", shorten(prompt)))).0 += 1;
                None
            }
        }
    }

    fn show(&self, path: &Path, prompt: Option<&str>, image: &Scored) -> Result<()> {
        if let Some(lines) = &self.lines {
            self.reporter.line(&lines.line(path, image))?;
        }
        let attributes = || self.world.attributes.iter().enumerate();
        let stated = image.stated.as_ref().map(|_| {
            let named = attributes().filter_map(|(i, a)| Some((a.name.clone(), json!(a.values[image.states(i)?]))));
            named.collect::<Map<_, _>>()
        });
        let read: Map<String, Value> =
            attributes().map(|(i, a)| (a.name.clone(), json!(a.values[image.reading.cell[i]]))).collect();
        let wrong: Vec<&str> = attributes().filter(|(i, _)| image.is_wrong(*i)).map(|(_, a)| a.name.as_str()).collect();
        self.reporter.event(json!({
            "event": "image", "path": path.display().to_string(), "prompt": prompt, "stated": stated, "read": read,
            "wrong": wrong, "confidence": image.reading.confidence, "impossible": !image.is_possible(),
            "log_density": image.is_possible().then_some(image.log_density), "in_tail": image.in_tail(),
            "aesthetic": image.aesthetic
        }))
    }
}

/// An image of the sheet: what was read, the log-density, the prompt.
fn tile(world: &World, rgb: Vec<u8>, prompt: Option<&str>, image: &Scored) -> Tile {
    let read = world.attributes.iter().zip(&image.reading.cell).enumerate().flat_map(|(index, (attribute, &value))| {
        words(&attribute.values[value], if image.is_wrong(index) { Ink::Wrong } else { Ink::Plain })
    });
    let label = if image.is_possible() { "log-density " } else { "" };
    let density = words(&format!("{label}{}", report::log_density(image)), Ink::Plain);
    let prompt = words(&prompt.map(shorten).unwrap_or_default(), Ink::Faint);
    Tile { rgb, text: vec![read.collect(), density, prompt] }
}

/// The start of a prompt, on one line.
fn shorten(prompt: &str) -> String {
    let line = prompt.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(PROMPT_LENGTH) {
        None => line,
        Some((end, _)) => format!("{}...", &line[..end]),
    }
}
