//! A section is a list of items. Each is prepared on the CPU, ahead and in parallel, and then run on the device, one after another;
//! what happens is told as events, which cross from the process that runs a section to the one that reports it.

use crate::device::Device;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// One comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub section: String,
    pub name: String,
    pub dtype: String,
    /// Of the device; none where it gave no finite numbers.
    pub error: Option<f64>,
    pub allowed: Option<f64>,
    pub ok: bool,
    /// On the device, with its copies.
    pub milliseconds: f64,
    /// What the numbers measure, or what went wrong.
    pub what: String,
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
        Row {
            section: String::new(),
            name: name.into(),
            dtype: dtype.to_string(),
            error: Some(error).filter(|error| error.is_finite()),
            allowed: Some(allowed).filter(|allowed| allowed.is_finite()),
            ok: error <= allowed && allowed.is_finite(),
            milliseconds: 0.0,
            what: what.into(),
        }
    }

    /// Of what gave no number.
    pub fn failed(name: impl Into<String>, dtype: impl ToString, what: impl Into<String>) -> Row {
        Row { error: None, allowed: None, ok: false, ..Row::new(name, dtype, 0.0, 0.0, what) }
    }
}

/// What is left of an item once the CPU has done its part.
pub type OnDevice = Box<dyn FnOnce(&Device) -> rarebit::Result<Vec<Row>> + Send>;

pub struct Item {
    pub name: String,
    pub dtype: String,
    prepare: Box<dyn Fn() -> OnDevice + Send + Sync>,
}

impl Item {
    pub fn new<F>(
        name: impl Into<String>,
        dtype: impl ToString,
        prepare: impl Fn() -> F + Send + Sync + 'static,
    ) -> Item
    where
        F: FnOnce(&Device) -> rarebit::Result<Vec<Row>> + Send + 'static,
    {
        let prepare = Box::new(move || -> OnDevice { Box::new(prepare()) });
        Item { name: name.into(), dtype: dtype.to_string(), prepare }
    }
}

/// What happens while a section runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// There are so many items.
    Items(usize),
    /// Item `index` goes to the device; no answer for long means that the device hangs.
    Begin {
        index: usize,
        name: String,
        dtype: String,
    },
    End {
        index: usize,
        rows: Vec<Row>,
        kernels: Vec<String>,
    },
    /// The device works no more for this process.
    Lost(String),
    /// All items are done, or the time is up.
    Done,
}

/// Runs the items from number `from` on until the deadline. A row that fails stops nothing.
pub fn run(
    section: &str,
    items: &[Item],
    from: usize,
    device: &Device,
    deadline: Instant,
    emit: &mut dyn FnMut(Event),
) {
    emit(Event::Items(items.len()));
    let ahead = 4 * rayon::current_num_threads();
    for first in (from..items.len()).step_by(ahead) {
        let chunk = &items[first..items.len().min(first + ahead)];
        let prepare = |item: &Item| if Instant::now() < deadline { Some(guarded(|| (item.prepare)())) } else { None };
        let prepared: Vec<_> = chunk.par_iter().map(prepare).collect();
        for ((index, item), prepared) in (first..).zip(chunk).zip(prepared) {
            let Some(prepared) = prepared.filter(|_| Instant::now() < deadline) else {
                return emit(Event::Done);
            };
            emit(Event::Begin { index, name: item.name.clone(), dtype: item.dtype.clone() });
            let start = Instant::now();
            let outcome = prepared.and_then(|run| guarded(|| run(device))?.map_err(|error| error.to_string()));
            let elapsed = start.elapsed().as_secs_f64() * 1e3;
            let mut rows = outcome.unwrap_or_else(|what| vec![Row::failed(&item.name, &item.dtype, what)]);
            for row in &mut rows {
                row.section = section.to_string();
                if row.milliseconds == 0.0 {
                    row.milliseconds = elapsed;
                }
            }
            let lost = device.synchronize().err();
            emit(Event::End { index, rows, kernels: device.take_launched() });
            if let Some(error) = lost {
                return emit(Event::Lost(error.to_string()));
            }
        }
    }
    emit(Event::Done);
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
