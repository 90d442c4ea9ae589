//! What is kept of a check: every row as JSON, and a page for people.

use crate::section::Row;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What became of a section.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    pub section: String,
    pub items: usize,
    /// Items that were not reached.
    pub not_run: usize,
    pub rows: usize,
    pub failed: usize,
    pub seconds: f64,
    /// What ended it early or began it anew, a line each.
    pub incidents: Vec<String>,
}

#[derive(Default, Serialize)]
pub struct Report {
    pub date: String,
    pub device: String,
    pub driver: String,
    /// Of the source, where the build knows it.
    pub revision: String,
    pub command: String,
    pub seconds: f64,
    /// Whether all that was asked for was tried; else this was written on the way.
    pub finished: bool,
    pub ok: bool,
    pub sections: Vec<Summary>,
    /// Kernels of the build that no launch named; listed only after a check of everything.
    pub never_launched: Vec<String>,
    pub rows: Vec<Row>,
}

impl Report {
    /// Writes `check.json` and `check.md` into a folder of the day and the device, and returns the folder.
    pub fn write(&self, parent: &Path) -> std::io::Result<PathBuf> {
        let folder = parent.join(format!("{}-{}", self.date, slug(&self.device)));
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
        let Report { date, device, driver, revision, command, seconds, .. } = self;
        let mut page = format!("# {date}, {device}\n\n");
        let _ = writeln!(page, "Driver: {driver}. Source: {revision}. `{command}`, {seconds:.0} s.\n");
        let (rows, failed) = (self.rows.len(), self.rows.iter().filter(|row| !row.ok).count());
        let not_run: usize = self.sections.iter().map(|section| section.not_run).sum();
        let verdict = match (self.finished, self.ok) {
            (false, _) => "**Not finished**",
            (true, true) => "**All passed**",
            (true, false) => "**Not passed**",
        };
        let _ = writeln!(page, "{verdict}: {rows} rows, {failed} failed, {not_run} items not run.\n");
        page += "| section | items | not run | rows | failed | largest error/allowed | seconds |\n|---|---|---|---|---|---|---|\n";
        for s in &self.sections {
            let ratios = self.rows.iter().filter(|row| row.section == s.section).filter_map(ratio);
            let largest = ratios.fold(None, |most: Option<f64>, x| Some(most.map_or(x, |most| most.max(x))));
            let largest = largest.map_or("-".into(), |x| format!("{x:.2}"));
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {largest} | {:.1} |",
                s.section, s.items, s.not_run, s.rows, s.failed, s.seconds
            );
        }
        for section in &self.sections {
            for incident in &section.incidents {
                let _ = writeln!(page, "\n{}: {}", section.section, cell(incident));
            }
        }
        if let Some(first) = self.rows.iter().find(|row| !row.ok) {
            let _ = writeln!(
                page,
                "\nFirst failure: {}, {}, {}: {}",
                first.section,
                first.name,
                first.dtype,
                cell(&first.what)
            );
            page += "\n## Failed\n\n| section | what | type | error | allowed | |\n|---|---|---|---|---|---|\n";
            for row in self.rows.iter().filter(|row| !row.ok) {
                line(&mut page, row);
            }
        }
        if !self.never_launched.is_empty() {
            let _ = writeln!(page, "\nKernels of the build that nothing launched: {}.", self.never_launched.join(", "));
        }
        let mut closest: Vec<&Row> = self.rows.iter().filter(|row| row.ok && ratio(row).is_some()).collect();
        closest.sort_by(|a, b| ratio(b).partial_cmp(&ratio(a)).unwrap_or(std::cmp::Ordering::Equal));
        if !closest.is_empty() {
            page += "\n## Passed, nearest to their limits\n\n| section | what | type | error | allowed | |\n|---|---|---|---|---|---|\n";
            closest.iter().take(12).for_each(|row| line(&mut page, row));
        }
        page
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
