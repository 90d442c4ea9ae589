//! An executor that counts and times the runs of every program of another one.

use crate::Result;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::pipeline::programs::{buffer, input_names};
use crate::plan::Planned;
use crate::program::{Node, Program};
use crate::weights::Model;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

/// A program and its runs so far. Those of other sizes under the same name are others.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    pub name: String,
    /// Of one run: floating-point operations of its products, and UNet calls on one image's latents.
    pub flops: u64,
    pub calls: usize,
    pub runs: usize,
    pub seconds: f64,
}

/// What a stopwatch has seen.
pub type Times = Rc<RefCell<Vec<Timed>>>;

pub struct Stopwatch {
    executor: Box<dyn Executor>,
    /// Of each loaded program, its place among the times.
    loaded: Vec<usize>,
    times: Times,
}

impl Stopwatch {
    pub fn new(executor: Box<dyn Executor>, times: Times) -> Stopwatch {
        Stopwatch { executor, loaded: vec![], times }
    }
}

/// UNet calls of one run: rows of the text's keys and values, by steps. All names may have a prefix ([`crate::exec::scoped`]).
fn calls(program: &Program) -> usize {
    let Some(kv) = input_names(program).find(|name| name.ends_with(buffer::KV)) else { return 0 };
    let prefix = kv.strip_suffix(buffer::KV).unwrap_or_default();
    let rows = program.input(&kv).map_or(0, |kv| program.shape(kv)[0]);
    let is_step = |name: &String| name.strip_prefix(prefix).and_then(|own| own.split('.').next()) == Some(buffer::STEP);
    rows * input_names(program).filter(is_step).count()
}

impl Executor for Stopwatch {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        self.executor.workspace(program, node)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.executor.free_memory()
    }

    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        let Program { name, .. } = &planned.program;
        let new = Timed {
            name: name.clone(),
            flops: planned.program.flops(),
            calls: calls(&planned.program),
            runs: 0,
            seconds: 0.0,
        };
        let id = self.executor.load(planned, weights)?;
        let mut times = self.times.borrow_mut();
        let known = times.iter().position(|known| (&known.name, known.flops) == (&new.name, new.flops));
        let place = known.unwrap_or(times.len());
        if known.is_none() {
            times.push(new);
        }
        // Programs are numbered as they are loaded.
        self.loaded.truncate(id.0);
        self.loaded.push(place);
        Ok(id)
    }

    fn clear(&mut self) {
        self.executor.clear();
        self.loaded.clear();
    }

    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        self.executor.write(buffer, data)
    }

    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        self.executor.copy(from, to, len)
    }

    /// Waits, so that a run's time is its own.
    fn run(&mut self, program: ProgramId) -> Result<()> {
        let started = Instant::now();
        self.executor.run(program)?;
        self.executor.wait()?;
        let mut times = self.times.borrow_mut();
        if let Some(timed) = self.loaded.get(program.0).and_then(|place| times.get_mut(*place)) {
            timed.runs += 1;
            timed.seconds += started.elapsed().as_secs_f64();
        }
        Ok(())
    }

    fn set_check_finite(&mut self, on: bool) {
        self.executor.set_check_finite(on);
    }

    fn wait(&self) -> Result<()> {
        self.executor.wait()
    }

    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        self.executor.read(buffer, out)
    }
}
