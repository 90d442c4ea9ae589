//! What each method of a comparison cost and what its images are worth: a line of a table, an event, the foot of a sheet's column.

use crate::cli::images::scores::Score;
use crate::methods::ImageMethod;
use crate::metrics::shapes::ShapesScore;
use crate::optimize::objective::Nfe;
use crate::plan::show_bytes;
use serde_json::{Value, json};

/// Forwards that a backward counts as: the usual count, of one that also computes gradients to weights. Ours compute none.
pub const BACKWARD: usize = 2;

/// One method's.
pub struct Ledger {
    pub title: String,
    images: usize,
    /// UNet calls of all images.
    nfe: Nfe,
    /// Of all images, without loading.
    seconds: f64,
    /// Planned weights, buffers and arena.
    peak_bytes: usize,
    /// Means over the images; of the log-density over the possible ones.
    log_density: Option<f64>,
    impossible: Option<usize>,
    agreement: Option<f64>,
    scores: Vec<(Score, Option<f64>)>,
}

/// What making one method's images cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub nfe: Nfe,
    pub seconds: f64,
    pub peak_bytes: usize,
}

impl Ledger {
    /// `shapes_scores` and each score have a value per image, `shapes_scores` where the images are of the `shapes` world.
    pub fn new(
        title: String,
        images: usize,
        cost: Cost,
        shapes_scores: Option<Vec<ShapesScore>>,
        scores: &[(Score, Vec<f64>)],
    ) -> Ledger {
        let seen = shapes_scores.as_deref().unwrap_or_default();
        let possible: Vec<f64> =
            seen.iter().map(|shapes_score| shapes_score.log_density).filter(|x| x.is_finite()).collect();
        let stated: Vec<f64> =
            seen.iter().filter(|shapes_score| shapes_score.stated > 0).map(ShapesScore::agreement).collect();
        Ledger {
            title,
            images,
            nfe: cost.nfe,
            seconds: cost.seconds,
            peak_bytes: cost.peak_bytes,
            log_density: mean(&possible),
            impossible: shapes_scores.as_ref().map(|shapes_scores| shapes_scores.len() - possible.len()),
            agreement: mean(&stated),
            scores: scores.iter().map(|(score, values)| (*score, mean(values))).collect(),
        }
    }

    fn per_image(&self, count: usize) -> f64 {
        count as f64 / self.images as f64
    }

    /// UNet calls in forwards.
    fn equivalents(&self) -> usize {
        self.nfe.forward + BACKWARD * self.nfe.backward
    }

    pub fn event(&self, method: &dyn ImageMethod, negative: Option<&str>) -> Value {
        let mut event = json!({
            "event": "method", "name": self.title, "method": method.name(), "options": method.options(),
            "negative": negative, "images": self.images, "log_density": self.log_density,
            "impossible": self.impossible, "agreement": self.agreement,
            "per_image": {
                "forwards": self.per_image(self.nfe.forward), "backwards": self.per_image(self.nfe.backward),
                "forward_equivalents": self.per_image(self.equivalents()),
                "seconds": self.seconds / self.images as f64
            },
            "peak_bytes": self.peak_bytes
        });
        for (score, value) in &self.scores {
            event[score.name()] = json!(value);
        }
        event
    }

    /// A column's foot on the sheet.
    pub fn foot(&self) -> Vec<String> {
        let seconds = self.seconds / self.images as f64;
        let mut lines = vec![
            format!("forwards {}", round(self.per_image(self.nfe.forward))),
            format!("backwards {}", round(self.per_image(self.nfe.backward))),
            format!("equivalents {}", round(self.per_image(self.equivalents()))),
            format!("s/image {seconds:.2}"),
            format!("memory {}", show_bytes(self.peak_bytes)),
        ];
        if self.impossible.is_some() {
            lines.push(format!("log-density {}", show(self.log_density, 2)));
            lines.push(format!("agreement {}", show(self.agreement, 3)));
        }
        lines.extend(self.scores.iter().map(|(score, value)| format!("{} {}", score.label(), show(*value, 4))));
        lines
    }
}

/// The lines of a table: of cost, if asked for, and of what the images are worth.
pub fn table(ledgers: &[Ledger], with_cost: bool) -> Vec<String> {
    let mut columns: Vec<Column> = vec![Column { head: "method", width: 14, left: true, cell: |l| l.title.clone() }];
    if with_cost {
        columns.extend([
            Column::right("forwards", 8, |l| round(l.per_image(l.nfe.forward))),
            Column::right("backwards", 9, |l| round(l.per_image(l.nfe.backward))),
            Column::right("equivalents", 11, |l| round(l.per_image(l.equivalents()))),
            Column::right("s/image", 8, |l| format!("{:.2}", l.seconds / l.images as f64)),
            Column::right("memory", 10, |l| show_bytes(l.peak_bytes)),
        ]);
    }
    if ledgers.iter().any(|ledger| ledger.impossible.is_some()) {
        columns.extend([
            Column::right("log-density", 11, |l| show(l.log_density, 2)),
            Column::right("impossible", 10, |l| l.impossible.map_or("none".into(), |n| n.to_string())),
            Column::right("agreement", 9, |l| show(l.agreement, 3)),
        ]);
    }
    let scores: Vec<Score> =
        ledgers.first().map_or(vec![], |ledger| ledger.scores.iter().map(|(score, _)| *score).collect());
    let line = |cells: Vec<String>| cells.join("  ").trim_end().to_string();
    let head = columns.iter().map(|c| c.pad(c.head)).chain(scores.iter().map(|s| format!("{:>14}", s.label())));
    let rows = ledgers.iter().map(|ledger| {
        let scored = ledger.scores.iter().map(|(_, value)| format!("{:>14}", show(*value, 4)));
        line(columns.iter().map(|c| c.pad(&(c.cell)(ledger))).chain(scored).collect())
    });
    let head = line(head.collect());
    std::iter::once(head).chain(rows).collect()
}

struct Column {
    head: &'static str,
    width: usize,
    left: bool,
    cell: fn(&Ledger) -> String,
}

impl Column {
    fn right(head: &'static str, width: usize, cell: fn(&Ledger) -> String) -> Column {
        Column { head, width, left: false, cell }
    }

    fn pad(&self, text: &str) -> String {
        let width = self.width;
        if self.left { format!("{text:<width$}") } else { format!("{text:>width$}") }
    }
}

fn show(x: Option<f64>, digits: usize) -> String {
    x.map_or("none".into(), |x| format!("{x:.digits$}"))
}

/// A count per image, whole where it is.
fn round(x: f64) -> String {
    if x.fract() == 0.0 { format!("{x:.0}") } else { format!("{x:.1}") }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(shapes_scores: Option<Vec<ShapesScore>>, scores: &[(Score, Vec<f64>)]) -> Ledger {
        let cost = Cost { nfe: Nfe { forward: 201, backward: 50 }, seconds: 3.0, peak_bytes: 3 << 20 };
        Ledger::new("MinorityPrompt".into(), 2, cost, shapes_scores, scores)
    }

    #[test]
    fn a_backward_counts_as_two_forwards() {
        let shapes_score = |log_density, stated, wrong| ShapesScore { log_density, stated, wrong };
        let shapes_scores = vec![shapes_score(-4.0, 4, 1), shapes_score(f64::NEG_INFINITY, 4, 3)];
        let lines = table(&[ledger(Some(shapes_scores), &[(Score::DenoisingLoss, vec![0.5, 0.25])])], true);
        let cells: Vec<Vec<&str>> = lines.iter().map(|line| line.split_whitespace().collect()).collect();
        let head =
            "method forwards backwards equivalents s/image memory log-density impossible agreement denoising-loss";
        assert_eq!(cells[0], head.split(' ').collect::<Vec<_>>());
        let row = "MinorityPrompt 100.5 25 150.5 1.50 3.0 MiB -4.00 1 0.500 0.3750";
        assert_eq!(cells[1], row.split(' ').collect::<Vec<_>>());
    }

    #[test]
    fn tables_show_what_is_known() {
        let lines = table(&[ledger(None, &[])], true);
        assert!(lines[0].ends_with("memory") && lines[1].ends_with("3.0 MiB"), "{lines:?}");
        let foot = ledger(None, &[]).foot();
        assert_eq!(foot, ["forwards 100.5", "backwards 25", "equivalents 150.5", "s/image 1.50", "memory 3.0 MiB"]);
    }
}
