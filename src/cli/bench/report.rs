//! What was measured as a table, as JSON, and against an earlier run.

use super::measure::Row;
use crate::plan::show_bytes;
use crate::{Error, Result, input};
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
        // A row without a median is an error of the file where it is read, and left out of no comparison.
        let median = |row: &Value| Some((name(row)?, row["latency_ms"]["p50"].as_f64().unwrap_or(f64::NAN)));
        found.extend(list(&case, "stages").iter().chain([&case["total"]]).filter_map(median));
    }
    found
}

/// Most bytes of a report: a thousand runs of a hundred rows take a few megabytes.
const MOST_BYTES: u64 = 256 << 20;

/// An earlier report. `Error::Usage` where it has another layout.
pub fn read(path: &Path) -> Result<Value> {
    let report = input::parse_json(path, &input::read(path, MOST_BYTES)?)?;
    match report["schema"].as_u64() {
        Some(schema) if schema == u64::from(SCHEMA) => Ok(report),
        Some(schema) => Err(Error::Usage(format!(
            "--baseline {}: has schema {schema}, this version writes schema {SCHEMA}; make it anew",
            path.display()
        ))),
        None => Err(Error::file(path, format!("is no report of bench with schema {SCHEMA}; make it anew"))),
    }
}

/// What must be the same for times to be compared, with its name.
const SAME: [(&str, &str); 9] = [
    ("/case/model", "model"),
    ("/case/model_hash", "weights"),
    ("/case/family", "family"),
    ("/case/width", "width"),
    ("/case/height", "height"),
    ("/case/dtype", "--dtype"),
    ("/case/sampler", "--sampler"),
    ("/case/steps", "--steps"),
    ("/case/guidance", "--guidance"),
];

/// The machine is what computes: a GPU is what it is in any machine, and a CPU is as many threads.
const SAME_GPU: [(&str, &str); 1] = [("/gpu/name", "GPU")];
const SAME_CPU: [(&str, &str); 2] = [("/host/cpu", "CPU"), ("/host/threads", "--threads")];

/// `Error::Usage` where an earlier report is not of what `header` says is going to be measured, of another machine, has none of these
/// cases, or no times; else those of the cases that it does not have.
pub fn comparable<'c>(path: &Path, baseline: &Value, header: &Value, cases: &'c [String]) -> Result<Vec<&'c String>> {
    let refuse = |what: String| Err(Error::Usage(format!("--baseline {}: {what}", path.display())));
    let is_cuda = |report: &Value| report["case"]["device"].as_str().is_some_and(|device| device.starts_with("cuda"));
    let kind = |report: &Value| if is_cuda(report) { "a GPU" } else { "the CPU" };
    if is_cuda(baseline) != is_cuda(header) {
        return refuse(format!("was measured on {}, this run is on {}", kind(baseline), kind(header)));
    }
    let machine = if is_cuda(header) { &SAME_GPU[..] } else { &SAME_CPU };
    for (at, name) in SAME.iter().chain(machine) {
        let of = |report: &Value| report.pointer(at).unwrap_or(&Value::Null).clone();
        let (was, is) = (of(baseline), of(header));
        if was != is {
            return refuse(format!("has another {name}: {was}, this run has {is}"));
        }
    }
    let medians = medians(baseline);
    if let Some((name, ms)) = medians.iter().find(|(_, ms)| !(ms.is_finite() && *ms > 0.0)) {
        return refuse(format!("'{name}' has a median of {ms} ms, which nothing can be held against"));
    }
    let has = |case: &&String| medians.iter().any(|(name, _)| name.starts_with(&format!("{case}: ")));
    let (_, missing): (Vec<&String>, Vec<&String>) = cases.iter().partition(has);
    match missing.len() == cases.len() {
        true => refuse(format!("has no times of '{}'; measure it in the same --mode and --batch", cases[0])),
        false => Ok(missing),
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

    /// A report of one case.
    fn report() -> Value {
        json!({
            "schema": 1, "host": {"cpu": "a", "threads": 2}, "gpu": null,
            "case": {
                "model": "shapes", "model_hash": "0", "family": "sd1", "device": "auto", "width": 64, "height": 64,
                "dtype": "f32", "sampler": "ddim", "steps": 4, "guidance": 7.5, "seed": 0
            },
            "cases": [{"name": "images of batch 1", "stages": [{"name": "unet step", "latency_ms": {"p50": 1.0}}],
                       "total": {"name": "image", "latency_ms": {"p50": 4.0}}}],
        })
    }

    #[test]
    fn only_reports_of_the_same_are_compared() {
        let names = ["images of batch 1", "images of batch 10"].map(String::from);
        let compare =
            |baseline: &Value, header: &Value, names| comparable(Path::new("b.json"), baseline, header, names);
        assert_eq!(compare(&report(), &report(), &names).unwrap(), [&names[1]]);
        let with = |at: &str, value: Value| {
            let mut report = report();
            *report.pointer_mut(at).unwrap() = value;
            report
        };
        for same in
            [with("/case/seed", json!(9)), with("/case/device", json!("cpu")), with("/gpu", json!({"name": "x"}))]
        {
            assert!(compare(&same, &report(), &names).is_ok());
        }
        let p50 = "/cases/0/stages/0/latency_ms/p50";
        for (at, value, what) in [
            ("/case/model", json!("other"), "has another model: \"other\", this run has \"shapes\""),
            ("/case/model_hash", json!("1"), "another weights"),
            ("/case/model_hash", json!(null), "another weights: null"),
            ("/case", json!({}), "another model: null"),
            ("/case/width", json!(128), "another width: 128"),
            ("/case/steps", json!(5), "another --steps"),
            ("/case/sampler", json!("euler"), "another --sampler"),
            ("/case/dtype", json!("f64"), "another --dtype"),
            ("/case/guidance", json!(1.0), "another --guidance"),
            ("/host/cpu", json!("b"), "another CPU"),
            ("/host/threads", json!(4), "another --threads: 4"),
            ("/case/device", json!("cuda(0)"), "was measured on a GPU, this run is on the CPU"),
            ("/cases", json!([]), "has no times of 'images of batch 1'"),
            ("/cases/0/name", json!("images of batch 11"), "has no times of 'images of batch 1'"),
            (p50, json!("NaN"), "'images of batch 1: unet step' has a median of NaN ms"),
            (p50, json!(null), "a median of NaN ms"),
            (p50, json!(-1.0), "a median of -1 ms"),
            (p50, json!(0), "a median of 0 ms"),
        ] {
            let error = compare(&with(at, value), &report(), &names).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(what), "{error}");
            assert!(error.to_string().starts_with("--baseline b.json: "), "{error}");
        }
        let on = |gpu: &str| {
            let mut report = with("/case/device", json!("cuda(1)"));
            (report["gpu"], report["host"]["cpu"]) = (json!({"name": gpu}), json!(gpu));
            report
        };
        assert!(compare(&on("x"), &on("y"), &names).unwrap_err().to_string().contains("another GPU"));
        assert!(compare(&on("x"), &with_gpu(on("x")), &names).is_ok());
    }

    /// The same GPU in another machine.
    fn with_gpu(mut report: Value) -> Value {
        (report["host"]["cpu"], report["case"]["device"]) = (json!("other"), json!("cuda(0)"));
        report
    }
}
