//! What a run says while it works: a bar with it/s and ETA on stderr, paths or JSON events on stdout.

use crate::Result;
use crate::cli::terminal::{print_json, print_line, print_text, say};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::path::Path;

/// Copies are of one bar.
#[derive(Clone)]
pub struct Reporter {
    json: bool,
    quiet: bool,
    bar: ProgressBar,
}

impl Reporter {
    pub fn new(json: bool, quiet: bool) -> Reporter {
        Reporter { json, quiet, bar: ProgressBar::hidden() }
    }

    /// A remark for a person; not shown by `--quiet`.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.bar.suspend(|| say(text));
        }
    }

    /// A warning for a person; always shown.
    pub fn warn(&self, text: &str) {
        self.bar.suspend(|| say(&format!("rarebit: {text}")));
    }

    /// A machine-readable line on stdout, with `--json`.
    pub fn event(&self, event: serde_json::Value) -> Result<()> {
        if self.json { self.bar.suspend(|| print_json(&event)) } else { Ok(()) }
    }

    /// Starts the bar: `total` times a `unit`, say "step".
    pub fn start(&mut self, unit: &str, total: usize) {
        if self.quiet {
            return;
        }
        self.bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
        let style = format!("{{bar:32}} {unit} {{pos}}/{{len}}  {{per_sec}}  eta {{eta}}  {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&style) {
            let per_sec = |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                // A bar that cannot be drawn is no reason to stop.
                let _ = write!(out, "{:.2} it/s", state.per_sec());
            };
            self.bar.set_style(style.with_key("per_sec", per_sec));
        }
    }

    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// A finished image.
    pub fn image(&self, path: &Path, event: serde_json::Value) -> Result<()> {
        if self.json {
            return self.event(event);
        }
        self.line(&path.display().to_string())
    }

    /// A line of a result for a person, on stdout.
    pub fn line(&self, text: &str) -> Result<()> {
        self.bar.suspend(|| print_line(text))
    }

    /// Several of them.
    pub fn text(&self, text: &str) -> Result<()> {
        self.bar.suspend(|| print_text(text))
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
