//! A section is a list of items. Each is prepared on the CPU, ahead and in parallel, and becomes runs on the device, one after another:
//! one with the kernels for any GPU, one with those for Hopper. What happens is reported as events, which cross from the process that runs
//! a section to the one that reports it.

use crate::device::Device;
use crate::quarantine::{Doings, Incident, Outstanding};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Passed,
    Failed,
    /// It would have launched a kernel that is in quarantine.
    NotRun,
}

/// One comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub section: String,
    pub name: String,
    pub dtype: String,
    pub state: State,
    /// Of the device; none where it gave no finite numbers.
    pub error: Option<f64>,
    pub allowed: Option<f64>,
    /// On the device, with its copies.
    pub milliseconds: f64,
    /// What the numbers measure, or what went wrong.
    pub what: String,
    /// What its run launched.
    pub kernels: Vec<String>,
}

impl Row {
    /// Of an error and what is allowed.
    pub fn new(
        name: impl Into<String>,
        dtype: impl ToString,
        error: f64,
        allowed: f64,
        what: impl Into<String>,
    ) -> Row {
        let ok = error <= allowed && allowed.is_finite();
        Row {
            section: String::new(),
            name: name.into(),
            dtype: dtype.to_string(),
            state: if ok { State::Passed } else { State::Failed },
            error: Some(error).filter(|error| error.is_finite()),
            allowed: Some(allowed).filter(|allowed| allowed.is_finite()),
            milliseconds: 0.0,
            what: what.into(),
            kernels: vec![],
        }
    }

    /// Of what gave no number.
    pub fn failed(name: impl Into<String>, dtype: impl ToString, what: impl Into<String>) -> Row {
        Row { error: None, allowed: None, state: State::Failed, ..Row::new(name, dtype, 0.0, 0.0, what) }
    }

    fn not_run(name: impl Into<String>, dtype: impl ToString, kernel: &str) -> Row {
        Row { state: State::NotRun, ..Row::failed(name, dtype, format!("not run: kernel {kernel}")) }
    }

    pub fn is(&self, state: State) -> bool {
        self.state == state
    }
}

/// What is left of an item once the CPU has done its part.
type OnDevice = Box<dyn FnOnce(&Device) -> rarebit::Result<Vec<Row>> + Send>;

/// A part of an item that stands and falls by itself.
pub struct Run {
    name: String,
    /// The kernels that it is about; none of a whole network.
    about: Vec<String>,
    /// Left out where the device has no kernels for Hopper.
    hopper: bool,
    on_device: OnDevice,
}

impl Run {
    pub fn new(
        name: impl Into<String>,
        on_device: impl FnOnce(&Device) -> rarebit::Result<Vec<Row>> + Send + 'static,
    ) -> Run {
        Run { name: name.into(), about: vec![], hopper: false, on_device: Box::new(on_device) }
    }

    pub fn about(self, kernels: Vec<String>) -> Run {
        Run { about: kernels, ..self }
    }

    pub fn for_hopper(self, hopper: bool) -> Run {
        Run { hopper, ..self }
    }
}

pub struct Item {
    pub name: String,
    pub dtype: String,
    prepare: Box<Prepare>,
}

type Prepare = dyn Fn() -> rarebit::Result<Vec<Run>> + Send + Sync;

impl Item {
    pub fn new(
        name: impl Into<String>,
        dtype: impl ToString,
        prepare: impl Fn() -> rarebit::Result<Vec<Run>> + Send + Sync + 'static,
    ) -> Item {
        Item { name: name.into(), dtype: dtype.to_string(), prepare: Box::new(prepare) }
    }

    /// Its runs; where they could not be prepared, one that says so.
    fn runs(&self) -> Vec<Run> {
        let prepared = guarded(|| (self.prepare)()).and_then(|runs| runs.map_err(|error| error.to_string()));
        prepared.unwrap_or_else(|what| {
            let row = Row::failed(&self.name, &self.dtype, format!("the CPU's part: {what}"));
            vec![Run::new(&self.name, move |_| Ok(vec![row]))]
        })
    }
}

/// Where in a section: an item, and a run of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct At {
    pub item: usize,
    pub run: usize,
}

/// What happens while a section runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// There are so many items.
    Items(usize),
    /// A run begins, and which is next after it.
    Begin {
        name: String,
        dtype: String,
        next: At,
    },
    /// This kernel goes to the device, or a graph of several; nothing but the device is waited for until it is back.
    Launch(Option<String>),
    Back,
    /// The run has ended.
    End {
        rows: Vec<Row>,
        incident: Option<Incident>,
    },
    /// The device works no more for this process.
    Lost(String),
    /// All items are done, or the time is up.
    Done,
}

/// Where and how long a section runs.
#[derive(Clone, Copy)]
pub struct Span {
    pub from: At,
    pub deadline: Instant,
    /// Kernels that compute something wrong are launched again nevertheless.
    pub keep_going: bool,
}

/// Runs the items. A row that fails stops nothing.
pub fn run(section: &str, items: &[Item], span: Span, device: &Device, emit: &mut dyn FnMut(Event)) {
    emit(Event::Items(items.len()));
    let ahead = 4 * rayon::current_num_threads();
    let in_time = || Instant::now() < span.deadline;
    for first in (span.from.item..items.len()).step_by(ahead) {
        let chunk = &items[first..items.len().min(first + ahead)];
        let prepared: Vec<_> = chunk.par_iter().map(|item| in_time().then(|| item.runs())).collect();
        for ((index, item), runs) in (first..).zip(chunk).zip(prepared) {
            let Some(runs) = runs else { return emit(Event::Done) };
            let (count, done) = (runs.len(), if index == span.from.item { span.from.run } else { 0 });
            for (number, run) in runs.into_iter().enumerate().skip(done) {
                if !in_time() {
                    return emit(Event::Done);
                }
                let last = number + 1 == count;
                let next = if last { At { item: index + 1, run: 0 } } else { At { item: index, run: number + 1 } };
                emit(Event::Begin { name: run.name.clone(), dtype: item.dtype.clone(), next });
                let (rows, incident) = one(section, &item.dtype, run, device, span.keep_going);
                emit(Event::End { rows, incident });
                if let Err(error) = device.synchronize() {
                    return emit(Event::Lost(error.to_string()));
                }
            }
        }
    }
    emit(Event::Done);
}

/// Does a run and takes up what it says of kernels.
fn one(section: &str, dtype: &str, run: Run, device: &Device, keep_going: bool) -> (Vec<Row>, Option<Incident>) {
    let Run { name, about, hopper, on_device } = run;
    if hopper && !device.hopper() {
        return (vec![], None);
    }
    device.kernels.borrow_mut().doings = Doings::default();
    let start = Instant::now();
    let outcome = guarded(|| on_device(device)).and_then(|rows| rows.map_err(|error| error.to_string()));
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    let mut kernels = device.kernels.borrow_mut();
    let Doings { launched, outstanding, refused } = std::mem::take(&mut kernels.doings);
    let mut rows = match (outcome, refused) {
        (_, Some(kernel)) => vec![Row::not_run(&name, dtype, &kernel)],
        (Ok(rows), None) => rows,
        (Err(what), None) => vec![Row::failed(&name, dtype, what)],
    };
    for row in &mut rows {
        (row.section, row.milliseconds) = (section.to_string(), milliseconds);
        row.kernels.clone_from(&launched);
    }
    let known = &mut kernels.known;
    let Some(failed) = rows.iter().find(|row| row.is(State::Failed)) else {
        if rows.iter().any(|row| row.is(State::Passed)) {
            known.proven.extend(launched);
        }
        return (rows, None);
    };
    let (kernel, quarantined, how) = match outstanding {
        Some(Outstanding::Kernel(kernel)) => (Some(kernel), true, "faults"),
        Some(Outstanding::Graph) => (None, false, "a graph faults"),
        None => match known.blame(&launched, &about) {
            Some(kernel) => (Some(kernel.clone()), !keep_going, "disagrees"),
            None => return (rows, None),
        },
    };
    let what = format!("{how}: {}", failed.what);
    let name = format!("{} {dtype}", failed.name);
    let incident = Incident { section: section.to_string(), name, kernel, quarantined, what };
    known.take(&incident);
    (rows, Some(incident))
}

thread_local! {
    /// Where this thread last panicked.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics are rows, not noise.
pub fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        PLACE.with_borrow_mut(|last| *last = place);
    }));
}

/// A panic as an error.
fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    let words = |payload: Box<dyn Any + Send>| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string())).unwrap_or_default();
        format!("panicked: {text}{}", PLACE.with_borrow(String::clone))
    };
    catch_unwind(AssertUnwindSafe(f)).map_err(words)
}
