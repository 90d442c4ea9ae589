//! What was measured as a table, as JSON, and against an earlier run.

use super::measure::Row;
use crate::plan::show_bytes;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::path::Path;

/// The layout of the file; raised when a key changes its meaning.
pub const SCHEMA: u32 = 1;

/// Something measured under one set of flags.
pub struct Case {
    pub name: String,
    pub rows: Vec<Row>,
    /// What the rows are parts of.
    pub total: Option<Row>,
    /// Beside the times.
    pub facts: Value,
}

impl Case {
    /// Of the whole, in `0..=1`; parts are timed alone and need not add up.
    fn fraction(&self, row: &Row) -> f64 {
        let of = |row: &Row| row.calls as f64 * row.times.median();
        let whole = self.total.as_ref().map_or_else(|| self.rows.iter().map(of).sum(), of);
        of(row) / whole
    }

    pub fn text(&self) -> String {
        let all = || self.rows.iter().chain(&self.total);
        let width = all().map(|row| row.name.chars().count()).max().unwrap_or(0).max(self.name.chars().count());
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{:width$}  {:>5} {:>10} {:>10} {:>10} {:>9} {:>8} {:>7}",
            self.name, "calls", "p50 ms", "p90", "p99", "TFLOP/s", "GB/s", "share"
        );
        for row in all() {
            let rate = |known: bool, rate: f64| if known { format!("{rate:.3}") } else { String::new() };
            let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|fraction| row.times.percentile(fraction));
            let _ = write!(
                out,
                "{:width$}  {:>5} {p50:>10.3} {p90:>10.3} {p99:>10.3} {:>9} {:>8} {:>6.1}%",
                row.name,
                row.calls,
                rate(row.flops > 0, row.teraflops()),
                rate(row.bytes > 0, row.gigabytes()),
                100.0 * self.fraction(row)
            );
            let _ = match row.arena_bytes {
                Some(bytes) => writeln!(out, "  arena {}", show_bytes(bytes)),
                None => writeln!(out),
            };
        }
        out + &self.summary()
    }

    /// The facts that a person asks for first.
    fn summary(&self) -> String {
        let number = |path: &str| self.facts.pointer(path).and_then(Value::as_f64);
        let mut words = vec![];
        words.extend(number("/images_per_s").map(|x| format!("{x:.3} images/s")));
        words.extend(number("/mem/planned").map(|x| format!("planned {}", show_bytes(x as usize))));
        words.extend(number("/mem/held").map(|x| format!("held {}", show_bytes(x as usize))));
        words.extend(number("/energy/joules_per_image").map(|x| format!("{x:.1} J/image")));
        words.extend(number("/energy/avg_w").map(|x| format!("{x:.0} W")));
        words.extend(number("/host_us_per_step").map(|x| format!("host {x:.0} us/step")));
        words.extend(number("/open_s").map(|x| format!("open {x:.2} s")));
        words.extend(number("/load_s").map(|x| format!("load {x:.2} s")));
        words.extend(number("/first_image_s").map(|x| format!("first {x:.2} s")));
        words.extend(
            number("/found_over_predicted").map(|x| format!("minority takes {x:.3} of what its passes predict")),
        );
        if words.is_empty() { String::new() } else { words.join(" | ") + "\n" }
    }

    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({
                "name": row.name.trim(), "calls": row.calls, "latency_ms": row.times.json(), "raw_ms": row.times.ms,
                "flops": row.flops, "bytes": row.bytes, "arena": row.arena_bytes,
                "tflops": row.teraflops(), "gbps": row.gigabytes(), "share": self.fraction(row),
            })
        };
        let mut all = Map::from_iter([
            ("name".to_string(), json!(self.name)),
            ("stages".to_string(), self.rows.iter().map(row).collect()),
            ("total".to_string(), self.total.as_ref().map_or(Value::Null, row)),
        ]);
        all.extend(self.facts.as_object().cloned().unwrap_or_default());
        Value::Object(all)
    }
}

/// Every median that is more than `fraction` above that of an earlier report, as lines; what only one of them has is left out.
pub fn regressions(baseline: &Value, report: &Value, fraction: f64) -> Vec<String> {
    let before = medians(baseline);
    let worse = |(name, ms): (String, f64)| {
        let (_, was) = before.iter().find(|(found, _)| *found == name)?;
        let line = || format!("{name}: {ms:.3} ms, {:+.1} % of {was:.3} ms", 100.0 * (ms / was - 1.0));
        (ms > was * (1.0 + fraction)).then(line)
    };
    medians(report).into_iter().filter_map(worse).collect()
}

/// `case: row` and its median.
fn medians(report: &Value) -> Vec<(String, f64)> {
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let mut found = vec![];
    for case in list(report, "cases") {
        let name = |row: &Value| Some(format!("{}: {}", case["name"].as_str()?, row["name"].as_str()?));
        let median = |row: &Value| Some((name(row)?, row["latency_ms"]["p50"].as_f64()?));
        found.extend(list(&case, "stages").iter().chain([&case["total"]]).filter_map(median));
    }
    found
}

/// An earlier report.
pub fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let report: Value =
        serde_json::from_str(&text).map_err(|error| Error::file(path, format!("is no report of bench: {error}")))?;
    match report["schema"].as_u64() {
        Some(schema) if schema == u64::from(SCHEMA) => Ok(report),
        _ => Err(Error::file(path, format!("is no report of bench with schema {SCHEMA}; make it anew"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_got_slower_is_told() {
        let report = |a: f64, b: f64| {
            let row = |name: &str, ms: f64| json!({"name": name, "latency_ms": {"p50": ms}});
            json!({"cases": [{"name": "x", "stages": [row("a", a), row("b", b)], "total": row("all", a + b)}]})
        };
        assert_eq!(regressions(&report(1.0, 1.0), &report(1.04, 0.5), 0.05), Vec::<String>::new());
        let worse = regressions(&report(1.0, 1.0), &report(1.06, 1.0), 0.05);
        assert_eq!(worse, ["x: a: 1.060 ms, +6.0 % of 1.000 ms"]);
        assert_eq!(regressions(&json!({"cases": []}), &report(9.0, 9.0), 0.05).len(), 0);
    }
}
