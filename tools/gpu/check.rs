//! Checks every kernel on a GPU against the CPU, the host emulation and golden files, and writes a report (tools/gpu/README.md).
//!
//! Each section runs in a process of its own, started from this one: a kernel that faults or hangs takes its process along, is
//! reported, and the section goes on behind it in a new one.

#[path = "../../tests/common"]
#[allow(dead_code)]
mod common {
    pub mod cases;
    pub mod emulated;
    pub mod feed;
    pub mod golden;
    pub mod gradients;
    pub mod minority;
    pub mod naive;
    pub mod optimised;
    pub mod products;
    pub mod rounded;
    pub mod speed;
    pub mod storage;
}
mod conformance;
mod device;
mod hopper;
mod measure;
mod models;
mod ops;
mod profile;
mod report;
mod section;
mod sweep;
mod turns;

use clap::{Parser, Subcommand, ValueEnum};
use device::{Choice, Device};
use report::{Report, Summary};
use section::{Event, Item, Row};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Check every kernel on a GPU and write a report.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    other: Option<Other>,
    /// cuda:N, or emulated
    #[arg(long, default_value = "cuda:0")]
    device: Choice,
    /// The kernels compiled for the host [default: emulation.so beside this program, else compiled now]
    #[arg(long, value_name = "LIBRARY")]
    emulation: Option<PathBuf>,
    /// The tests' models and golden files [default: data beside this program, else tests/data of the checkout]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the report's folder is made
    #[arg(long, default_value = ".", value_name = "DIR")]
    out: PathBuf,
    /// One section only
    #[arg(long, value_name = "SECTION")]
    only: Option<Section>,
    /// Only cases whose names contain this
    #[arg(long, value_name = "TEXT")]
    cases: Option<String>,
    /// A few cases of each kind
    #[arg(long)]
    subset: bool,
    /// Seconds; what was not reached is reported as not run
    #[arg(long, default_value_t = 540)]
    time_limit: u64,
    /// Run all sections in this process, as debuggers and sanitizers like it
    #[arg(long)]
    one_process: bool,
    /// Tell events on stdout, from this item of `--only` on: how this program calls itself
    #[arg(long, hide = true)]
    from: Option<usize>,
}

#[derive(Subcommand)]
enum Other {
    Turns(turns::Turns),
    Sweep(sweep::Sweep),
    Profile(profile::Profile),
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Section {
    Conformance,
    Ops,
    Gradients,
    Products,
    Invariance,
    Models,
    Images,
}

impl Section {
    fn name(self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
    }

    fn items(self, args: &Args, data: &Path) -> Vec<Item> {
        let mut items = match self {
            Section::Conformance => conformance::items(args.subset),
            Section::Ops => ops::ops(args.subset),
            Section::Gradients => ops::gradients(args.subset),
            Section::Products => ops::products(args.subset),
            Section::Invariance => ops::invariance(args.subset),
            Section::Models => models::networks(data, args.subset),
            Section::Images => models::images(args.subset),
        };
        items.retain(|item| args.cases.as_ref().is_none_or(|part| item.name.contains(part)));
        items
    }
}

/// A GPU that says nothing for so long hangs; no kernel of the check needs a second.
const SILENCE: Duration = Duration::from_secs(60);
/// What a process may take to end by itself once the time is up: the references of a chunk of items.
const GRACE: Duration = Duration::from_secs(15);
/// A section is begun anew so many times behind a fault.
const RESTARTS: usize = 8;

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match (&args.other, args.from) {
        (Some(Other::Turns(turns)), _) => turns::serve(turns, || emulation(&args)).map(|()| true),
        (Some(Other::Sweep(sweep)), _) => sweep::run(sweep, || emulation(&args)),
        (Some(Other::Profile(profile)), _) => profile::run(profile, || emulation(&args)),
        (None, Some(from)) => tell(&args, from).map(|()| true),
        (None, None) => check(&args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu_check: {error}");
            ExitCode::FAILURE
        }
    }
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Something beside this program, if it is there.
fn beside(name: &str) -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.parent()?.join(name);
    path.exists().then_some(path)
}

fn emulation(args: &Args) -> PathBuf {
    args.emulation.clone().or_else(|| beside("emulation.so")).unwrap_or_else(common::emulated::build)
}

fn data(args: &Args) -> PathBuf {
    args.data.clone().or_else(|| beside("data")).unwrap_or_else(|| common::golden::data_folder(""))
}

/// Runs one section and prints its events, a line of JSON each.
fn tell(args: &Args, from: usize) -> Outcome<()> {
    section::quiet_panics();
    let section = args.only.ok_or("--from needs --only")?;
    let deadline = Instant::now() + Duration::from_secs(args.time_limit);
    let device = Device::open(&args.device, || emulation(args))?;
    let mut failed = None;
    let mut print = |event: Event| {
        let mut line = serde_json::to_string(&event).unwrap_or_default();
        line.push('\n');
        let mut out = std::io::stdout().lock();
        failed = failed.take().or(out.write_all(line.as_bytes()).and_then(|()| out.flush()).err());
    };
    section::run(&section.name(), &section.items(args, &data(args)), from, &device, deadline, &mut print);
    // What the device still holds after a fault is the driver's to free.
    std::mem::forget(device);
    Ok(failed.map_or(Ok(()), Err)?)
}

/// Everything that is known while the check runs.
struct Check {
    start: Instant,
    deadline: Instant,
    sections: Vec<Summary>,
    rows: Vec<Row>,
    launched: BTreeSet<String>,
    spoke: Instant,
}

impl Check {
    /// Takes up an event of the last section; what is at work on the device from then on.
    fn take(&mut self, event: Event, busy: &mut Option<(usize, Row)>, next: &mut usize) -> Option<String> {
        let summary = self.sections.last_mut()?;
        match event {
            Event::Items(count) => {
                (summary.items, summary.not_run) = (count, count - *next);
            }
            Event::Begin { index, name, dtype } => *busy = Some((index, Row::failed(name, dtype, ""))),
            Event::End { index, rows, kernels } => {
                (*busy, *next) = (None, index + 1);
                summary.not_run = summary.items - *next;
                self.launched.extend(kernels);
                rows.into_iter().for_each(|row| self.add(row));
            }
            Event::Lost(why) => return Some(why),
            Event::Done => {}
        }
        self.progress(false);
        None
    }

    /// Puts what is known so far into a report.
    fn fill(&self, report: &mut Report) {
        report.seconds = self.start.elapsed().as_secs_f64();
        report.sections.clone_from(&self.sections);
        report.rows.clone_from(&self.rows);
    }

    fn add(&mut self, row: Row) {
        let Some(summary) = self.sections.last_mut() else { return };
        summary.rows += 1;
        if !row.ok {
            summary.failed += 1;
            if summary.failed <= 20 {
                let numbers =
                    row.error.zip(row.allowed).map(|(error, allowed)| format!("{error:.3e} of {allowed:.3e}, "));
                eprintln!(
                    "FAILED {} {} {}: {}{}",
                    row.section,
                    row.name,
                    row.dtype,
                    numbers.unwrap_or_default(),
                    row.what
                );
            }
        }
        self.rows.push(row);
    }

    fn progress(&mut self, always: bool) {
        let Some(Summary { section, items, not_run, failed, .. }) = self.sections.last() else { return };
        if always || self.spoke.elapsed() > Duration::from_secs(2) {
            self.spoke = Instant::now();
            let seconds = self.start.elapsed().as_secs();
            eprintln!("{seconds:4} s  {section}: {} of {items}, {failed} rows failed", items - not_run);
        }
    }
}

fn check(args: &Args) -> Outcome<bool> {
    let start = Instant::now();
    let data = data(args);
    let opened = Device::open(&args.device, || emulation(args))?;
    let (name, version, emulation) = (opened.name.clone(), opened.version.clone(), opened.emulation.clone());
    eprintln!("{name}, {version}");
    let mut check = Check {
        start,
        deadline: start + Duration::from_secs(args.time_limit),
        sections: vec![],
        rows: vec![],
        launched: BTreeSet::new(),
        spoke: start,
    };
    let device = args.one_process.then_some(opened);
    if device.is_some() {
        section::quiet_panics();
    }
    let mut report = Report {
        date: report::today(),
        device: name,
        driver: version,
        revision: option_env!("RAREBIT_REVISION").unwrap_or("a working tree").into(),
        command: command(args),
        ..Report::default()
    };
    let write = |report: &Report| report.write(&args.out).map_err(|error| format!("{}: {error}", args.out.display()));
    let mut gone = None;
    for &section in Section::value_variants().iter().filter(|section| args.only.is_none_or(|only| only == **section)) {
        let began = Instant::now();
        check.sections.push(Summary { section: section.name(), ..Summary::default() });
        match &device {
            Some(device) => {
                let items = section.items(args, &data);
                if gone.is_none() {
                    gone = here(&mut check, section, &items, device);
                } else if let Some(summary) = check.sections.last_mut() {
                    (summary.items, summary.not_run) = (items.len(), items.len());
                }
            }
            None => apart(args, &mut check, section, &emulation, &data)?,
        }
        if let Some(summary) = check.sections.last_mut() {
            summary.seconds = began.elapsed().as_secs_f64();
        }
        check.progress(true);
        // Whoever runs this may end it before it ends itself.
        check.fill(&mut report);
        write(&report)?;
    }

    let everything = args.only.is_none() && args.cases.is_none() && !args.subset;
    if everything && check.sections.iter().all(|section| section.not_run == 0) {
        let all = device::all_kernels(&args.device, &emulation)?;
        report.never_launched = all.difference(&check.launched).cloned().collect();
    }
    check.fill(&mut report);
    report.finished = true;
    let complete = report.sections.iter().all(|s| s.not_run == 0 && s.incidents.is_empty());
    let passed = !report.rows.is_empty() && report.rows.iter().all(|row| row.ok);
    report.ok = complete && passed && report.never_launched.is_empty();
    let folder = write(&report)?;
    let failed = report.rows.iter().filter(|row| !row.ok).count();
    let not_run: usize = report.sections.iter().map(|s| s.not_run).sum();
    let verdict = if report.ok { "passed" } else { "NOT PASSED" };
    eprintln!(
        "{verdict}: {} rows, {failed} failed, {not_run} items not run, {:.0} s",
        report.rows.len(),
        report.seconds
    );
    println!("{}", folder.display());
    Ok(report.ok)
}

/// The options that say what was checked.
fn command(args: &Args) -> String {
    let mut command = format!("gpu_check --device {}", args.device);
    if let Some(only) = args.only {
        command += &format!(" --only {}", only.name());
    }
    if let Some(cases) = &args.cases {
        command += &format!(" --cases '{cases}'");
    }
    command + if args.subset { " --subset" } else { "" }
}

/// Runs a section in this process; why the device is lost, if it is.
fn here(check: &mut Check, section: Section, items: &[Item], device: &Device) -> Option<String> {
    let (mut busy, mut next, mut lost) = (None, 0, None);
    let deadline = check.deadline;
    let mut take = |event| lost = lost.take().or(check.take(event, &mut busy, &mut next));
    section::run(&section.name(), items, 0, device, deadline, &mut take);
    if let (Some(why), Some(summary)) = (&lost, check.sections.last_mut()) {
        summary.incidents.push(why.clone());
    }
    lost
}

/// Runs a section in processes of its own.
fn apart(args: &Args, check: &mut Check, section: Section, emulation: &Path, data: &Path) -> Outcome<()> {
    let (mut next, mut restarts) = (0, 0);
    loop {
        let left = check.deadline.saturating_duration_since(Instant::now());
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--device", &args.device.to_string(), "--only", &section.name(), "--from", &next.to_string()]);
        command.arg("--emulation").arg(emulation).arg("--data").arg(data);
        command.args(["--time-limit", &left.as_secs().to_string()]);
        if let Some(cases) = &args.cases {
            command.args(["--cases", cases]);
        }
        if args.subset {
            command.arg("--subset");
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut busy = None;
        let outcome = watch(&mut child, check, &mut busy, &mut next, args.device != Choice::Emulated);
        // Dead or done; in either case it is waited for, so that it holds the device no longer.
        let _ = child.kill();
        let status = child.wait()?;
        let why = match outcome {
            Watched::Done => return Ok(()),
            Watched::Lost(why) => why,
            Watched::Silent => format!("no answer for {} s", SILENCE.as_secs()),
            Watched::TimeUp => "killed: the time was up".into(),
            Watched::Ended => format!("its process ended: {status}"),
        };
        let mut incident = why.clone();
        if let Some((index, row)) = busy {
            incident = format!("{} {}: {why}", row.name, row.dtype);
            let row = Row { section: section.name(), what: why, ..row };
            check.add(row);
            next = index + 1;
        }
        let out_of_time = Instant::now() >= check.deadline;
        let Some(summary) = check.sections.last_mut() else { return Ok(()) };
        summary.not_run = summary.items - next;
        summary.incidents.push(incident);
        restarts += 1;
        // A process that did not even begin would not another time.
        if out_of_time || restarts > RESTARTS || summary.items == 0 || next == summary.items {
            return Ok(());
        }
    }
}

enum Watched {
    Done,
    Lost(String),
    Silent,
    TimeUp,
    Ended,
}

/// Takes up what a process tells until it is done or given up.
fn watch(
    child: &mut Child,
    check: &mut Check,
    busy: &mut Option<(usize, Row)>,
    next: &mut usize,
    gpu: bool,
) -> Watched {
    let events = events(child);
    let mut heard = Instant::now();
    loop {
        match events.recv_timeout(Duration::from_millis(200)) {
            Ok(Event::Done) => return Watched::Done,
            Ok(event) => {
                heard = Instant::now();
                if let Some(why) = check.take(event, busy, next) {
                    return Watched::Lost(why);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Watched::Ended,
            Err(RecvTimeoutError::Timeout) => {
                if gpu && busy.is_some() && heard.elapsed() > SILENCE {
                    return Watched::Silent;
                }
                if Instant::now() > check.deadline + GRACE {
                    return Watched::TimeUp;
                }
            }
        }
    }
}

/// What a process prints, as it comes.
fn events(child: &mut Child) -> Receiver<Event> {
    let (sender, receiver) = channel();
    if let Some(out) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let Ok(event) = serde_json::from_str(&line) else { continue };
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}
