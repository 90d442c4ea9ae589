//! What is kept of a check: every row as JSON, and a page for people.

use crate::journal::Entry;
use crate::quarantine::Incident;
use crate::section::{Row, State};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What was checked, where and how.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Head {
    pub date: String,
    pub device: String,
    pub driver: String,
    /// Of the source, where the build knows it.
    pub revision: String,
    pub command: String,
}

/// What became of a section.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Summary {
    pub section: String,
    pub items: usize,
    /// Items of which all that could be done was.
    pub reached: usize,
    pub rows: usize,
    pub failed: usize,
    /// Rows that would have launched a kernel in quarantine.
    pub not_run: usize,
    pub seconds: f64,
}

#[derive(Default, Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub head: Head,
    pub seconds: f64,
    /// Whether all that was asked for was tried; else this was written on the way.
    pub finished: bool,
    pub ok: bool,
    pub sections: Vec<Summary>,
    pub incidents: Vec<Incident>,
    /// Kernels of the build that no launch named; listed only after a check of all kernels.
    pub never_launched: Vec<String>,
    pub rows: Vec<Row>,
}

impl Report {
    /// Takes up a line of the journal.
    pub fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Head(head) => self.head = head,
            Entry::Section(summary) => {
                match self.sections.iter_mut().find(|section| section.section == summary.section) {
                    Some(section) => *section = summary,
                    None => self.sections.push(summary),
                }
                self.seconds = self.sections.iter().map(|section| section.seconds).sum();
            }
            Entry::Row(row) => {
                if let Some(section) = self.sections.iter_mut().find(|section| section.section == row.section) {
                    section.rows += 1;
                    section.failed += usize::from(row.is(State::Failed));
                    section.not_run += usize::from(row.is(State::NotRun));
                }
                self.rows.push(row);
            }
            Entry::Incident(incident) => self.incidents.push(incident),
            Entry::End { seconds, never_launched } => {
                (self.seconds, self.never_launched, self.finished) = (seconds, never_launched, true);
                let all = self.unreached() == 0 && self.incidents.is_empty() && self.never_launched.is_empty();
                self.ok = all && !self.rows.is_empty() && self.rows.iter().all(|row| row.is(State::Passed));
            }
        }
    }

    /// Kernels that rows launched.
    pub fn launched(&self) -> BTreeSet<&str> {
        self.rows.iter().flat_map(|row| row.kernels.iter().map(String::as_str)).collect()
    }

    /// Items that the time did not allow.
    pub fn unreached(&self) -> usize {
        self.sections.iter().map(|section| section.items - section.reached).sum()
    }

    /// What came of it, in a line.
    pub fn verdict(&self) -> String {
        let count = |state| self.rows.iter().filter(|row| row.is(state)).count();
        let verdict = match (self.finished, self.ok) {
            (false, _) => "not finished",
            (true, true) => "all passed",
            (true, false) => "NOT PASSED",
        };
        format!(
            "{verdict}: {} rows, {} failed, {} not run, {} items not reached",
            self.rows.len(),
            count(State::Failed),
            count(State::NotRun),
            self.unreached()
        )
    }

    /// Writes `check.json` and `check.md` into a folder of the day and the device, and returns the folder.
    pub fn write(&self, parent: &Path) -> std::io::Result<PathBuf> {
        let folder = parent.join(format!("{}-{}", self.head.date, slug(&self.head.device)));
        std::fs::create_dir_all(&folder)?;
        let json = serde_json::to_string_pretty(self)?;
        for (name, text) in [("check.json", json + "\n"), ("check.md", self.page())] {
            let partial = folder.join(format!(".{name}.{}.part", std::process::id()));
            let mut file = std::fs::File::create(&partial)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&partial, folder.join(name))?;
        }
        Ok(folder)
    }

    fn page(&self) -> String {
        let Head { date, device, driver, revision, command } = &self.head;
        let mut page = format!("# {date}, {device}\n\n");
        let _ = writeln!(page, "Driver: {driver}. Source: {revision}. `{command}`, {:.0} s.\n", self.seconds);
        let _ = writeln!(page, "**{}**\n", self.verdict());
        page += "| section | items | not reached | rows | failed | not run | largest error/allowed | seconds |\n";
        page += "|---|---|---|---|---|---|---|---|\n";
        for s in &self.sections {
            let ratios = self.rows.iter().filter(|row| row.section == s.section).filter_map(ratio);
            let largest = ratios.fold(None, |most: Option<f64>, x| Some(most.map_or(x, |most| most.max(x))));
            let largest = largest.map_or("-".into(), |x| format!("{x:.2}"));
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} | {largest} | {:.1} |",
                s.section,
                s.items,
                s.items - s.reached,
                s.rows,
                s.failed,
                s.not_run,
                s.seconds
            );
        }
        if !self.incidents.is_empty() {
            page += "\n## Incidents\n\n| kernel | launched again | section | what | |\n|---|---|---|---|---|\n";
        }
        for Incident { section, name, kernel, quarantined, what } in &self.incidents {
            let kernel = kernel.as_deref().unwrap_or("-");
            let again = if *quarantined { "no" } else { "yes" };
            let _ = writeln!(page, "| {kernel} | {again} | {section} | {} | {} |", cell(name), cell(what));
        }
        self.failures(&mut page);
        if !self.never_launched.is_empty() {
            let _ = writeln!(page, "\nKernels of the build that nothing launched: {}.", self.never_launched.join(", "));
        }
        let mut closest: Vec<&Row> =
            self.rows.iter().filter(|row| row.is(State::Passed) && ratio(row).is_some()).collect();
        closest.sort_by(|a, b| ratio(b).partial_cmp(&ratio(a)).unwrap_or(std::cmp::Ordering::Equal));
        if !closest.is_empty() {
            page += "\n## Passed, nearest to their limits\n\n| section | what | type | error | allowed | |\n|---|---|---|---|---|---|\n";
            closest.iter().take(12).for_each(|row| line(&mut page, row));
        }
        page
    }

    /// Every failed row, and how many were not run for each kernel.
    fn failures(&self, page: &mut String) {
        let failed: Vec<&Row> = self.rows.iter().filter(|row| row.is(State::Failed)).collect();
        if !failed.is_empty() {
            *page += "\n## Failed\n\n| section | what | type | error | allowed | |\n|---|---|---|---|---|---|\n";
            failed.into_iter().for_each(|row| line(page, row));
        }
        let skipped = self.rows.iter().filter(|row| row.is(State::NotRun)).map(|row| &row.what[..]);
        let reasons: BTreeSet<&str> = skipped.clone().collect();
        if !reasons.is_empty() {
            *page += "\n## Not run\n\n";
        }
        for reason in reasons {
            let _ = writeln!(page, "- {reason}: {} rows", skipped.clone().filter(|what| *what == reason).count());
        }
    }
}

/// An error as a share of what is allowed, where that is not nothing.
fn ratio(row: &Row) -> Option<f64> {
    row.error.zip(row.allowed).filter(|(_, allowed)| *allowed > 0.0).map(|(error, allowed)| error / allowed)
}

fn line(page: &mut String, row: &Row) {
    let number = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.3e}"));
    let _ = writeln!(
        page,
        "| {} | {} | {} | {} | {} | {} |",
        row.section,
        cell(&row.name),
        row.dtype,
        number(row.error),
        number(row.allowed),
        cell(&row.what)
    );
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// Of `cuda:0 (NVIDIA H200, sm_90)`: `nvidia-h200`.
fn slug(device: &str) -> String {
    let model = device.split_once('(').map_or(device, |(_, rest)| rest.split(", sm_").next().unwrap_or(rest));
    let words = model.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join("-")
}

/// Today in UTC, as `2026-01-31`.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date(seconds as i64 / 86_400)
}

/// Of a day since 1970 (Hinnant, "chrono-compatible low-level date algorithms").
fn date(days: i64) -> String {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let of_era = z.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}
