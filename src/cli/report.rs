//! The report of `rarebit score --shapes` as text: what the images show beside what the world holds.

use crate::cli::terminal::printable;
use crate::metrics::shapes::{AttributeReport, Estimate, Fraction, Reference, Report, Scored, World};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Width of the report in characters.
const WIDTH: usize = 120;

/// Most characters of the column of paths; a longer path moves what is beside it.
const PATH_WIDTH: usize = 120;

/// One line per image under a head line; every path has the width of the longest.
pub struct Lines<'w> {
    world: &'w World,
    path_width: usize,
}

impl Lines<'_> {
    pub fn new<'w>(world: &'w World, paths: &[PathBuf]) -> Lines<'w> {
        let width = |path: &PathBuf| printable(&path.display().to_string()).chars().count().min(PATH_WIDTH);
        Lines { world, path_width: paths.iter().map(width).max().unwrap_or(0).max("image".len()) }
    }

    pub fn head(&self) -> String {
        let names: Vec<&str> = self.world.attributes.iter().map(|a| a.name.as_str()).collect();
        format!(
            "{:width$}  log-density  aesthetic  confidence  {} (what the prompt states, where it differs)",
            "image",
            names.join(", "),
            width = self.path_width
        )
    }

    pub fn line(&self, path: &Path, image: &Scored) -> String {
        let read = |(index, &value): (usize, &usize)| {
            let names = &self.world.attributes[index].values;
            match image.states(index).filter(|_| image.is_wrong(index)) {
                Some(stated) => format!("{} ({})", names[value], names[stated]),
                None => names[value].clone(),
            }
        };
        let read: Vec<String> = image.reading.cell.iter().enumerate().map(read).collect();
        format!(
            "{:width$}  {:>11}  {:>9.2}  {:>10.3}  {}",
            printable(&path.display().to_string()),
            log_density(image),
            image.aesthetic,
            image.reading.confidence,
            read.join(", "),
            width = self.path_width
        )
    }
}

/// The log-density of an image's cell in nats.
pub fn log_density(image: &Scored) -> String {
    if image.is_possible() { format!("{:.2}", image.log_density) } else { "impossible".into() }
}

/// The report of a set; `not_captions` is how many prompts are outside the grammar and why the first of them is.
pub fn text(report: &Report, reference: Option<&Reference>, not_captions: &Option<(usize, String)>) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name:<14} {text}");
    };
    line("images", format!("{}, {} with a caption of the world", report.images, report.captioned));
    if let Some((count, why)) = not_captions {
        line("not captions", format!("{count} prompts, e.g. {why}"));
    }
    if let Some(stated) = report.stated.as_ref().filter(|stated| !stated.is_empty()) {
        let stated: Vec<String> = stated.iter().map(|(name, value)| format!("{name} {value}")).collect();
        line("all state", stated.join(", "));
    }
    if report.compared < report.images {
        let left_out = report.images - report.compared;
        line("left out", format!("{left_out} images whose prompts state what the world does not hold"));
    }
    let world = |value: Option<f64>, digits: usize| value.map_or(String::new(), |x| format!("   world {x:.digits$}"));
    line("log-density", format!("{} nats{}", estimate(report.log_density), world(report.expected_log_density, 2)));
    let tail = format!("{}{}", fraction(report.tail), world(report.expected_tail, 3));
    line("in the tail", format!("{tail}   and right {}", fraction(report.tail_and_right)));
    if report.captioned > 0 {
        let of = |a: &&AttributeReport| a.right.of > 0;
        let attributes = report.attributes.iter().filter(of).map(|a| format!("   {} {}", a.name, ratio(a.right)));
        line("agreement", format!("all {}{}", fraction(report.right), attributes.collect::<String>()));
    }
    line("cells", format!("{} distinct, impossible {}", report.distinct_cells, fraction(report.impossible)));
    line("aesthetic", estimate(report.aesthetic));
    match reference {
        None => line("reader", "not measured".into()),
        Some(reference) => {
            line("reader", show_reference(reference));
            line("", show_accuracy(reference, &report.attributes));
        }
    }
    if report.compared > 0 {
        out.push('\n');
        histograms(&mut out, &report.attributes);
    }
    out
}

fn show_reference(reference: &Reference) -> String {
    format!(
        "on reconstructions of {} renders: all right {:.3}, log-density {:.2} read for {:.2}, impossible {:.3}",
        reference.images,
        reference.all,
        reference.mean_log_density_read,
        reference.mean_log_density_true,
        reference.impossible
    )
}

fn show_accuracy(reference: &Reference, attributes: &[AttributeReport]) -> String {
    let right = |a: &AttributeReport| Some(format!("{} {:.3}", a.name, reference.accuracy.get(&a.name)?));
    attributes.iter().filter_map(right).collect::<Vec<_>>().join("   ")
}

/// A block per attribute: distances on the left, frequencies beside probabilities on the right.
fn histograms(out: &mut String, attributes: &[AttributeReport]) {
    let head = format!("{:<10} {:>7} {:>7} {:>7} {:>7}  ", "attribute", "entropy", "world", "TV", "chance");
    let _ = writeln!(out, "{head}share of images / of the world, %");
    for attribute in attributes {
        let distance = |x: Option<f64>| x.map_or("stated".into(), |x| format!("{x:.3}"));
        let mut left = format!(
            "{:<10} {:>7.2} {:>7.2} {:>7} {:>7}  ",
            attribute.name,
            attribute.entropy,
            attribute.expected_entropy,
            distance(attribute.total_variation),
            attribute.chance_total_variation.map_or(String::new(), |x| format!("{x:.3}")),
        );
        let total = attribute.counts.iter().sum::<usize>().max(1) as f64;
        let name_width = attribute.values.iter().map(String::len).max().unwrap_or(0);
        // What was neither seen nor to be expected says nothing.
        let values: Vec<String> = (0..attribute.values.len())
            .filter(|&i| attribute.counts[i] > 0 || attribute.expected[i] > 0.0)
            .map(|i| {
                let percent = |fraction: f64| 100.0 * fraction;
                let (name, seen) = (&attribute.values[i], percent(attribute.counts[i] as f64 / total));
                format!("{name:<name_width$} {seen:>5.1}/{:<5.1}", percent(attribute.expected[i]))
            })
            .collect();
        let per_line = ((WIDTH - head.len()) / (name_width + 14)).max(1);
        for values in values.chunks(per_line) {
            let _ = writeln!(out, "{left}{}", values.join("  ").trim_end());
            left = " ".repeat(head.len());
        }
    }
}

fn estimate(estimate: Option<Estimate>) -> String {
    match estimate {
        None => "none".into(),
        Some(Estimate { mean, standard_error: None }) => format!("{mean:.2}"),
        Some(Estimate { mean, standard_error: Some(error) }) => format!("{mean:.2} ± {error:.2}"),
    }
}

fn ratio(fraction: Fraction) -> String {
    if fraction.of == 0 { "none".into() } else { format!("{:.3}", fraction.count as f64 / fraction.of as f64) }
}

fn fraction(fraction: Fraction) -> String {
    format!("{} ({} of {})", ratio(fraction), fraction.count, fraction.of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::shapes::report;

    #[test]
    fn the_reader_is_always_spoken_of() {
        let empty = report(&World::embedded().unwrap(), &[]);
        assert!(text(&empty, None, &None).contains("reader         not measured"));
        let reference = r#"{"images": 2000, "accuracy": {"shape": 0.99, "frame": 1}, "all": 0.93, "impossible": 0.002,
            "mean_log_density_true": -10.7, "mean_log_density_read": -10.6, "command": "evaluate.py reader"}"#;
        let shown = text(&empty, Some(&serde_json::from_str(reference).unwrap()), &None);
        let at = shown.lines().position(|line| line.starts_with("reader")).unwrap();
        let lines: Vec<&str> =
            shown.lines().skip(at).take(2).map(|line| line.trim_start_matches("reader").trim()).collect();
        let expected =
            "on reconstructions of 2000 renders: all right 0.930, log-density -10.60 read for -10.70, impossible 0.002";
        assert_eq!(lines, [expected, "shape 0.990   frame 1.000"]);
    }
}
