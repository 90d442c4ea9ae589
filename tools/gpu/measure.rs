//! What `sweep` and `profile` have in common: a device that is timed, and a file of JSON lines that holds what was measured whatever
//! happens next.

use crate::Outcome;
use crate::device::Choice;
use clap::Args;
use rarebit::exec::cuda::{Cuda, Emulated, Gpu, NvmlDevice, Settings};
use rarebit::exec::{Executor, ProgramId};
use rarebit::program::DType;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Timed runs, of which the median counts.
const RUNS: usize = 5;
/// What a GPU needs to come to its clock.
const WARM_UP: Duration = Duration::from_millis(300);

pub fn dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err("one of f32, f16, bf16".into()),
    }
}

/// A device under the clock.
pub struct Bench {
    pub is_gpu: bool,
    /// For the first line of a file.
    pub facts: Value,
    nvml: NvmlDevice,
    is_warm: bool,
}

impl Bench {
    pub fn open(choice: &Choice, emulation: impl FnOnce() -> PathBuf) -> rarebit::Result<(Cuda, Bench)> {
        match choice {
            Choice::Cuda(ordinal) => {
                let (gpu, nvml) = (Gpu::new(*ordinal)?, NvmlDevice::of(*ordinal)?);
                let name = rarebit::exec::cuda::Driver::name(&gpu);
                let facts = json!({"device": name, "multiprocessors": gpu.multiprocessors()?, "gpu": nvml.json()});
                Ok((Cuda::new(Box::new(gpu)), Bench { is_gpu: true, facts, nvml, is_warm: false }))
            }
            Choice::Emulated => {
                let emulated = Emulated::open(&emulation(), Settings::default())?;
                let bench = Bench {
                    is_gpu: false,
                    facts: json!({"device": "emulated"}),
                    nvml: NvmlDevice::none(),
                    is_warm: true,
                };
                Ok((Cuda::new(Box::new(emulated)), bench))
            }
        }
    }

    /// Milliseconds of one run of a loaded program, and MHz of the multiprocessors meanwhile.
    pub fn time(&mut self, executor: &mut dyn Executor, id: ProgramId) -> rarebit::Result<(f64, Option<u32>)> {
        let mut once = || {
            let started = Instant::now();
            executor.run(id)?;
            executor.wait()?;
            rarebit::Result::Ok(1e3 * started.elapsed().as_secs_f64())
        };
        // Started launch by launch, then recorded, then replayed; the emulation does the same each time.
        (0..if self.is_gpu { 3 } else { 1 }).try_for_each(|_| once().map(drop))?;
        let began = Instant::now();
        while !self.is_warm && began.elapsed() < WARM_UP {
            once()?;
        }
        self.is_warm = true;
        let mut times =
            (0..if self.is_gpu { RUNS } else { 1 }).map(|_| once()).collect::<rarebit::Result<Vec<f64>>>()?;
        times.sort_by(f64::total_cmp);
        Ok((times[times.len() / 2], self.nvml.clock()))
    }
}

/// Where measurements go.
#[derive(Args)]
pub struct To {
    /// Begin this file anew
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Go on with this one: what it holds, and what ended its process, is not measured again
    #[arg(long, value_name = "FILE", conflicts_with = "out")]
    resume: Option<PathBuf>,
}

/// A file of JSON lines, each of which outlives this process once [`Lines::write`] returns. Before each measurement is a `begin` with what
/// names it.
pub struct Lines {
    path: PathBuf,
    file: File,
}

impl Lines {
    /// A file that begins with `first`, and the names of what was measured before. One that began and did not end took its process along, and
    /// is given its line.
    pub fn open(to: &To, first: &Value) -> Outcome<(Lines, HashSet<String>)> {
        let (mut lines, held) = match (&to.resume, &to.out) {
            (Some(path), _) => Lines::resume(path)?,
            (None, Some(path)) => (Lines::create(path)?, vec![]),
            (None, None) => return Err("give --out or --resume".into()),
        };
        if held.is_empty() {
            lines.write(first)?;
        }
        let begun = |line: &Value| line.get("begin").cloned();
        if let Some(mut open) = held.last().and_then(begun) {
            open["error"] = json!("its process ended");
            lines.write(&open)?;
        }
        Ok((lines, held.iter().filter_map(begun).map(|name| name.to_string()).collect()))
    }

    fn create(path: &Path) -> Outcome<Lines> {
        let file = File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Lines { path: path.into(), file })
    }

    /// Goes on behind the whole lines of a file, and returns them; what a process that was killed left of another is cut off.
    fn resume(path: &Path) -> Outcome<(Lines, Vec<Value>)> {
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        let (held, whole) = read(path)?;
        let file = OpenOptions::new().append(true).open(path).map_err(failed)?;
        file.set_len(whole as u64).map_err(failed)?;
        Ok((Lines { path: path.into(), file }, held))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn write(&mut self, line: &Value) -> Outcome<()> {
        let written = self.file.write_all(format!("{line}\n").as_bytes());
        Ok(written.map_err(|error| format!("{}: {error}", self.path.display()))?)
    }
}

/// The whole lines of a file, and how many bytes they are.
pub fn read(path: &Path) -> Outcome<(Vec<Value>, usize)> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let lines = bytes[..whole].split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    let parse = |(number, line)| {
        serde_json::from_slice(line).map_err(|error| format!("{}:{}: {error}", path.display(), number + 1))
    };
    Ok((lines.map(parse).collect::<Result<Vec<Value>, String>>()?, whole))
}
