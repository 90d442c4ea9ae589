//! Checks every kernel on a GPU against the CPU, the host emulation and golden files, and writes a report (tools/gpu/README.md).

#[path = "../../tests/common"]
#[allow(dead_code)]
mod common {
    pub mod cases;
    pub mod emulated;
    pub mod golden;
    pub mod gradients;
    pub mod inputs;
    pub mod low_precision;
    pub mod minority;
    pub mod naive;
    pub mod optimised;
    pub mod products;
    pub mod real;
    pub mod speed;
    pub mod tolerance;
}
mod bench_worker;
mod conformance;
mod device;
mod journal;
mod kernels;
mod launches;
mod measure;
mod models;
mod ops;
mod profile;
mod quarantine;
mod report;
mod section;
mod sm90;
mod supervise;
mod sweep;

use clap::{Parser, Subcommand, ValueEnum};
use device::{Choice, Device};
use report::{Head, Report};
use section::Item;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use supervise::Check;

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
    /// The tests' models and golden files [default: tests/data of the checkout that this was built from]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the report's folder is made
    #[arg(long, default_value = ".", value_name = "DIR")]
    out: PathBuf,
    /// These sections only, separated by commas
    #[arg(long, value_name = "SECTION", value_delimiter = ',')]
    only: Vec<Section>,
    /// Only cases whose names contain one of these, separated by |
    #[arg(long, value_name = "TEXT", value_delimiter = '|')]
    cases: Vec<String>,
    /// A few cases of each kind
    #[arg(long)]
    subset: bool,
    /// Seconds; what was not reached is reported as not run
    #[arg(long, default_value_t = 540)]
    time_limit: u64,
    /// Seconds that a kernel may stay on the device; one that takes longer hangs [default: 8, on the emulation 300]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    patience: Option<Duration>,
    /// Kernels that are not to be launched, separated by commas
    #[arg(long, value_name = "KERNEL", value_delimiter = ',')]
    quarantine: Vec<String>,
    /// Go on launching kernels that compute something wrong; those that fault or hang are left out nevertheless
    #[arg(long)]
    keep_going: bool,
    /// Begin this file anew and write everything to it at once, a line of JSON each
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// Run all sections in this process, as debuggers and sanitizers like it
    #[arg(long)]
    one_process: bool,
    /// Run a section as requested on stdin and report events on stdout: how this program calls itself
    #[arg(long, hide = true)]
    tell: bool,
}

#[derive(Subcommand)]
enum Other {
    BenchWorker(bench_worker::BenchWorker),
    Sweep(sweep::Sweep),
    Profile(profile::Profile),
    /// Make the report of a journal, however the check that wrote it ended
    Report {
        journal: PathBuf,
        /// Where the report's folder is made
        #[arg(long, default_value = ".", value_name = "DIR")]
        out: PathBuf,
    },
}

/// In the order in which they run: broad before deep.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Section {
    Conformance,
    Kernels,
    /// Images and tiny networks, a few of each.
    Networks,
    Ops,
    Gradients,
    Products,
    Invariance,
    /// All of them.
    Models,
    Images,
}

impl Section {
    fn name(self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
    }

    fn named(name: &str) -> Option<Section> {
        Section::value_variants().iter().copied().find(|section| section.name() == name)
    }

    fn items(self, args: &Args, data: &Path) -> Vec<Item> {
        let mut items = match self {
            Section::Conformance => conformance::items(args.subset),
            Section::Kernels => kernels::items(args.subset),
            Section::Networks => [models::images(true), models::networks(data, true)].into_iter().flatten().collect(),
            Section::Ops => ops::ops(args.subset),
            Section::Gradients => ops::gradients(args.subset),
            Section::Products => ops::products(args.subset),
            Section::Invariance => ops::invariance(args.subset),
            Section::Models => models::networks(data, args.subset),
            Section::Images => models::images(args.subset),
        };
        items.retain(|item| args.cases.is_empty() || args.cases.iter().any(|part| item.name.contains(part)));
        items
    }
}

impl Args {
    fn sections(&self) -> Vec<Section> {
        let all = Section::value_variants().iter().copied();
        match self.only.is_empty() {
            false => all.filter(|section| self.only.contains(section)).collect(),
            // A few of each there have been by then.
            true => {
                all.filter(|section| !self.subset || !matches!(section, Section::Models | Section::Images)).collect()
            }
        }
    }

    /// Of this run, by the options that say what is checked.
    fn head(&self, device: &Device) -> Head {
        let mut command = format!("gpu_check --device {}", self.device);
        let only: Vec<String> = self.only.iter().map(|section| section.name()).collect();
        let lists = [("only", only.join(",")), ("quarantine", self.quarantine.join(","))];
        for (flag, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
            command += &format!(" --{flag} {list}");
        }
        if !self.cases.is_empty() {
            command += &format!(" --cases '{}'", self.cases.join("|"));
        }
        for (is_set, flag) in [(self.subset, " --subset"), (self.keep_going, " --keep-going")] {
            command += if is_set { flag } else { "" };
        }
        Head {
            date: report::today(),
            device: device.name.clone(),
            driver: device.version.clone(),
            revision: option_env!("RAREBIT_REVISION").unwrap_or("a working tree").into(),
            command,
        }
    }

    fn emulation(&self) -> PathBuf {
        self.emulation.clone().or_else(|| beside("emulation.so")).unwrap_or_else(common::emulated::build)
    }

    fn data(&self) -> PathBuf {
        self.data.clone().unwrap_or_else(|| common::golden::data_folder(""))
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match &args.other {
        Some(Other::BenchWorker(worker)) => bench_worker::serve(worker, || args.emulation()).map(|()| true),
        Some(Other::Sweep(sweep)) => sweep::run(sweep, || args.emulation()),
        Some(Other::Profile(profile)) => profile::run(profile, || args.emulation()),
        Some(Other::Report { journal, out }) => report_of(journal, out),
        None if args.tell => supervise::tell(&args, &args.data(), args.emulation()).map(|()| true),
        None => check(&args),
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

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().map_err(|_| format!("'{text}' is no number"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Something beside this program, if it is there.
fn beside(name: &str) -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.parent()?.join(name);
    path.exists().then_some(path)
}

fn check(args: &Args) -> Outcome<bool> {
    let device = Device::open(&args.device, || args.emulation())?;
    eprintln!("{}, {}", device.name, device.version);
    let check = Check::new(args, args.data(), &device)?;
    // The processes of the sections open it themselves.
    let device = args.one_process.then_some(device);
    if device.is_some() {
        section::quiet_panics();
    }
    let (folder, ok) = check.run(device.as_ref())?;
    println!("{}", folder.display());
    Ok(ok)
}

/// As [`check`] ends: the folder on stdout, and whether the check was finished and all of it passed.
fn report_of(journal: &Path, out: &Path) -> Outcome<bool> {
    let mut report = Report::default();
    journal::read(journal)?.into_iter().for_each(|entry| report.take(entry));
    let folder = report.write(out).map_err(|error| format!("{}: {error}", out.display()))?;
    eprintln!("{}", report.verdict());
    println!("{}", folder.display());
    Ok(report.ok)
}
