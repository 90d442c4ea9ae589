//! The journal of a check: one line of JSON for everything that is known, written at once, so that a report can be made of what there is
//! whenever the check was ended, and by whom.

use crate::Outcome;
use crate::quarantine::Incident;
use crate::report::{Head, Summary};
use crate::section::Row;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::Path;

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// What is checked; the first line.
    Head(Head),
    /// What became of a section until now; the last of its lines counts.
    Section(Summary),
    Row(Row),
    Incident(Incident),
    /// All that was asked for was tried; kernels that nothing launched, where all of them should have been.
    End {
        seconds: f64,
        never_launched: Vec<String>,
    },
}

/// Begins a journal anew.
pub fn create(path: &Path) -> Outcome<File> {
    File::create(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// One write per line: a process that is killed has written a line or not.
pub fn write(file: &mut File, entry: &Entry) -> Outcome<()> {
    let line = serde_json::to_string(entry)? + "\n";
    file.write_all(line.as_bytes()).map_err(|error| format!("the journal: {error}").into())
}

/// All entries. What is behind the last end of a line is a line that was torn.
pub fn read(path: &Path) -> Outcome<Vec<Entry>> {
    let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut entries = vec![];
    let whole = text.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
    for (number, line) in whole.enumerate() {
        let wrong = |error| format!("{}: line {}: {error}", path.display(), number + 1);
        entries.push(serde_json::from_slice(line).map_err(wrong)?);
    }
    match entries.first() {
        Some(Entry::Head(_)) => Ok(entries),
        _ => Err(format!("{}: is no journal of a check: it does not begin with its head", path.display()).into()),
    }
}
