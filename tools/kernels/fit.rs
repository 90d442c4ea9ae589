//! Fits the engine's table of rates (src/exec/cuda/rates.rs) to what cuts of products took on a GPU, by the engine's own model.
//!
//!     target/gpu-check/gpu_check sweep --out FILE      on the GPU
//!     tools/kernels/fit FILE [--write]                 here
//!
//! It minimises the mean squared logarithm of predicted over measured time, over rate, latency and ends of every tile, bandwidth and
//! launch, and takes for each of Hopper's tiles the ring that was fastest. A number keeps its value where that fits as well; the
//! output says which do. `resident` follows from registers and shared memory, and `CLOSE` is a choice, so both stay.
//!
//! The regret of a table is the time of the cut that it chooses over that of the best one measured. Even the truth has some: the
//! splits of a large batch are those of a small one, and of splits that are close the fewest are taken.

use clap::Parser;
use rarebit::exec::cuda::{Cut, Hopper, Lines, MULTIPROCESSORS, Rates, Shape, TABLE, Table, Tile};
use rarebit::program::DType;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Fit the table of rates to a sweep.
#[derive(Parser)]
struct Args {
    /// What `gpu_check sweep` wrote; its last line may be torn
    sweep: PathBuf,
    /// Put the new table into src/exec/cuda/rates.rs of this folder's checkout
    #[arg(long)]
    write: bool,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    match fit(&Args::parse()) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("fit: {error}");
            ExitCode::FAILURE
        }
    }
}

fn fit(args: &Args) -> Outcome<String> {
    let text =
        String::from_utf8_lossy(&std::fs::read(&args.sweep).map_err(|e| format!("{}: {e}", args.sweep.display()))?)
            .into_owned();
    let sweep = Sweep::parse(&text).map_err(|error| format!("{}: {error}", args.sweep.display()))?;
    let fitted = Fitted::new(&sweep, &TABLE);
    let mut told = fitted.report(&sweep, &TABLE);
    let lines = fitted.lines(&sweep);
    if args.write && sweep.device == "emulated" {
        return Err(format!("{}: the emulation's times say nothing of a GPU", args.sweep.display()).into());
    }
    if args.write {
        let path = Path::new("src/exec/cuda/rates.rs");
        let failed = |error: std::io::Error| format!("{}: {error}; run it in the checkout", path.display());
        let replaced = replace(&std::fs::read_to_string(path).map_err(failed)?, &lines)?;
        std::fs::write(path, replaced).map_err(failed)?;
        let _ = writeln!(told, "\nwritten to {}", path.display());
    } else {
        let _ = write!(told, "\n{lines}");
    }
    Ok(told)
}

/// One cut of one shape, as it was measured.
#[derive(Clone)]
struct Point {
    case: String,
    shape: Shape,
    cut: Cut,
    /// Of the cut's tile among [`tiles`].
    tile: usize,
    clocks: f64,
}

/// What a file holds.
struct Sweep {
    device: String,
    points: Vec<Point>,
    /// Lines of measurements that failed, and of cuts that this version has not.
    failed: usize,
    unknown: usize,
    clock: String,
}

/// The tiles of a table in one order.
fn tiles(table: &Table) -> Vec<Tile> {
    [&table.half[..], &table.hopper, &table.single].concat()
}

impl Sweep {
    fn parse(text: &str) -> Outcome<Sweep> {
        let mut sweep =
            Sweep { device: "an unknown device".into(), points: vec![], failed: 0, unknown: 0, clock: String::new() };
        let (mut header, mut measured) = (Value::Null, vec![]);
        // What follows the last line's end was torn.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for (number, line) in whole.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let line: Value = serde_json::from_str(line).map_err(|error| format!("line {}: {error}", number + 1))?;
            match () {
                () if line.get("sweep").is_some() => header = line,
                () if line.get("begin").is_some() => {}
                () if line.get("error").is_some() => sweep.failed += 1,
                () => {
                    let point = point(&line).ok_or_else(|| format!("line {}: no measurement", number + 1))?;
                    match point {
                        Some(point) => measured.push((point, line["mhz"].as_f64())),
                        None => sweep.unknown += 1,
                    }
                }
            }
        }
        if let Some(count) = header["multiprocessors"].as_u64().filter(|count| *count != MULTIPROCESSORS as u64) {
            return Err(format!("of a GPU of {count} multiprocessors, and the model is of {MULTIPROCESSORS}").into());
        }
        if measured.is_empty() {
            return Err("holds no measurement of a cut that this version has".into());
        }
        if let Some(device) = header["device"].as_str() {
            sweep.device = device.into();
        }
        let mut clocks: Vec<f64> = measured.iter().filter_map(|(_, mhz)| *mhz).collect();
        clocks.sort_by(f64::total_cmp);
        let median = clocks.get(clocks.len() / 2).copied();
        let mhz = median.or(header["gpu"]["sm_mhz"].as_f64());
        sweep.points = measured.into_iter().map(|(point, _)| point).collect();
        // Clocks in a millisecond. Where nothing tells, such that the present table is right on average.
        let on_average = || mean(sweep.points.iter().map(|point| log_ratio(point, &TABLE))).exp();
        let scale = mhz.map_or_else(on_average, |mhz| 1e3 * mhz);
        sweep.points.iter_mut().for_each(|point| point.clocks *= scale);
        let whence = if mhz.is_some() { "as measured" } else { "unknown: such that the old table is right on average" };
        sweep.clock = format!("{:.0} MHz, {whence}", scale / 1e3);
        Ok(sweep)
    }

    /// Points of each shape.
    fn cases(&self) -> BTreeMap<&str, Vec<&Point>> {
        let mut cases: BTreeMap<&str, Vec<&Point>> = BTreeMap::new();
        self.points.iter().for_each(|point| cases.entry(&point.case).or_default().push(point));
        cases
    }
}

/// A line's measurement, its time in milliseconds; `Some(None)` of a cut that this version has not.
fn point(line: &Value) -> Option<Option<Point>> {
    let number = |name: &str| Some(line[name].as_u64()? as usize);
    let dtype = match line["dtype"].as_str()? {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        _ => return None,
    };
    let boxes = match line["boxes"].as_str() {
        Some("reduced") => Some(Lines::Reduced),
        Some("across") => Some(Lines::Across),
        _ => None,
    };
    let shape = Shape {
        dtype,
        rows: number("rows")?,
        nominal_rows: number("nominal_rows")?,
        columns: number("columns")?,
        depth: number("depth")?,
        hopper: Hopper::Auto,
        boxes,
    };
    let (name, hopper) = (line["tile"].as_str()?, line["hopper"].as_bool()?);
    let (splits, stages) = (number("splits")?, number("stages")?);
    let ms = line["ms"].as_f64().filter(|ms| *ms > 0.0)?;
    let is_it = |cut: &Cut| (cut.tile.name, cut.tile.hopper, cut.splits, cut.stages) == (name, hopper, splits, stages);
    let Some(cut) = shape.legal().into_iter().find(is_it) else { return Some(None) };
    let tile = tiles(&TABLE).iter().position(|tile| *tile == cut.tile)?;
    Some(Some(Point { case: line["case"].as_str()?.into(), shape, cut, tile, clocks: ms }))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), x| (sum + x, count + 1));
    sum / f64::from(count.max(1))
}

/// The logarithm of predicted over measured.
fn log_ratio(point: &Point, table: &Table) -> f64 {
    residuals(std::slice::from_ref(point), table)[0]
}

/// The logarithms of all.
fn residuals(points: &[Point], table: &Table) -> Vec<f64> {
    let tiles = tiles(table);
    let of = |point: &Point| {
        let cut = Cut { tile: tiles[point.tile], ..point.cut };
        (table.clocks(&point.shape, &cut) / point.clocks).ln()
    };
    points.iter().map(of).collect()
}

fn loss(points: &[Point], table: &Table) -> f64 {
    mean(residuals(points, table).into_iter().map(|x| x * x))
}

/// The numbers that are fitted, with their names.
fn numbers(table: &mut Table) -> Vec<(String, &mut f64)> {
    let Table { half, hopper, single, bandwidth, launch } = table;
    let kinds = [("half", &mut half[..]), ("hopper", &mut hopper[..]), ("single", &mut single[..])];
    let mut all = vec![];
    for (kind, tile) in kinds.into_iter().flat_map(|(kind, tiles)| tiles.iter_mut().map(move |tile| (kind, tile))) {
        let name = format!("{kind} {}", tile.name);
        let Rates { rate, latency, ends, .. } = &mut tile.rates;
        let rates = [("rate", rate), ("latency", latency), ("ends", ends)];
        all.extend(rates.map(|(what, number)| (format!("{name} {what}"), number)));
    }
    all.push(("bandwidth".into(), bandwidth));
    all.push(("launch".into(), launch));
    all
}

/// With every number times the exponential of its move.
fn with(table: &Table, moves: &[f64]) -> Table {
    let mut table = *table;
    numbers(&mut table).into_iter().zip(moves).for_each(|((_, number), by)| *number *= by.exp());
    table
}

/// Moves of the free numbers that make the sum of squared residuals least. The model has corners: a wait that is short against the
/// products shows nowhere, and so does not say that it should be longer; from where the slopes lead each number is tried farther off.
fn search(start: &[f64], is_free: &[bool], residuals: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    const JUMPS: [f64; 10] = [0.1, -0.1, 0.2, -0.2, 0.35, -0.35, 0.5, -0.5, 0.7, -0.7];
    let mut best = descend(start, is_free, &residuals);
    loop {
        let mut at = best.clone();
        for (i, by) in (0..at.len()).filter(|i| is_free[*i]).flat_map(|i| JUMPS.map(|by| (i, by))) {
            let mut other = at.clone();
            other[i] += by;
            if squares(&residuals(&other)) < squares(&residuals(&at)) {
                at = other;
            }
        }
        let found = descend(&at, is_free, &residuals);
        if squares(&residuals(&found)) >= squares(&residuals(&best)) * (1.0 - 1e-6) {
            return best;
        }
        best = found;
    }
}

fn squares(residuals: &[f64]) -> f64 {
    residuals.iter().map(|x| x * x).sum()
}

/// Levenberg and Marquardt: steps of Gauss and Newton, the shorter the worse they serve.
fn descend(start: &[f64], is_free: &[bool], residuals: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    const APART: f64 = 1e-4;
    const LONGEST: f64 = 0.5;
    let free: Vec<usize> = (0..start.len()).filter(|i| is_free[*i]).collect();
    let (mut at, mut damping) = (start.to_vec(), 1e-3);
    let mut here = residuals(&at);
    while damping < 1e9 {
        let slope = |i: &usize| -> Vec<f64> {
            let beside = |by: f64| {
                let mut other = at.clone();
                other[*i] += by;
                residuals(&other)
            };
            beside(APART).iter().zip(beside(-APART)).map(|(after, before)| (after - before) / (2.0 * APART)).collect()
        };
        let slopes: Vec<Vec<f64>> = free.iter().map(slope).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        // Shorter steps until one serves.
        let mut served = false;
        while !served && damping < 1e9 {
            let row = |(i, a): (usize, &Vec<f64>)| -> Vec<f64> {
                let mut row: Vec<f64> = slopes.iter().map(|b| dot(a, b)).collect();
                row[i] = row[i] * (1.0 + damping) + 1e-12;
                row.push(-dot(a, &here));
                row
            };
            let steps = solve(slopes.iter().enumerate().map(row).collect());
            let mut other = at.clone();
            free.iter().zip(steps).for_each(|(i, step)| other[*i] += step.clamp(-LONGEST, LONGEST));
            let there = residuals(&other);
            served = squares(&there) < squares(&here) * (1.0 - 1e-9);
            if served {
                (at, here) = (other, there);
            }
            damping = if served { (damping / 3.0).max(1e-9) } else { damping * 4.0 };
        }
    }
    at
}

/// The solution of equations, each its factors and then its right side; the matrix is positive definite.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for i in 0..n {
        let pivot = rows[i].clone();
        for row in &mut rows[i + 1..] {
            let factor = row[i] / pivot[i];
            row.iter_mut().zip(&pivot).for_each(|(x, y)| *x -= factor * y);
        }
    }
    let mut found = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| rows[i][j] * found[j]).sum();
        found[i] = (rows[i][n] - known) / rows[i][i];
    }
    found
}

/// A logarithm.
const FURTHER: f64 = 0.3;

struct Fitted {
    table: Table,
    /// Numbers that keep their value, for it fits as well.
    kept: Vec<String>,
    /// Numbers of which one bound is known, where they are put.
    bounds: Vec<String>,
    rings: Vec<Ring>,
}

/// Another ring than the table's, of a tile of Hopper.
struct Ring {
    tile: &'static str,
    stages: usize,
    /// Measurements of both, of the same shape and splits.
    pairs: usize,
    /// Its time over that of the table's, in the geometric mean.
    ratio: f64,
}

impl Fitted {
    fn new(sweep: &Sweep, old: &Table) -> Fitted {
        let points = &sweep.points;
        let names: Vec<String> = numbers(&mut { *old }).into_iter().map(|(name, _)| name).collect();
        let of = |moves: &[f64]| loss(points, &with(old, moves));
        let mut is_free = vec![true; names.len()];
        let all = |moves: &[f64]| residuals(points, &with(old, moves));
        let mut moves = search(&vec![0.0; names.len()], &is_free, all);
        // Within two standard errors one number is as good as another.
        let least = of(&moves);
        let fits_as_well = |i: usize, by: f64| {
            let mut other = moves.clone();
            other[i] = by;
            points.len() as f64 * (of(&other) - least) <= 4.0 * least.max(1e-9)
        };
        let (mut kept, mut bounds) = (vec![], vec![]);
        let mut settled = moves.clone();
        for (i, name) in names.into_iter().enumerate() {
            let moved = moves[i];
            if fits_as_well(i, 0.0) {
                settled[i] = 0.0;
                kept.push(name);
            } else if fits_as_well(i, moved + moved.signum() * FURTHER) {
                // Only that it is no nearer to the old one is known.
                let (mut near, mut far) = (0.0, moved);
                for _ in 0..30 {
                    let middle = (near + far) / 2.0;
                    *(if fits_as_well(i, middle) { &mut far } else { &mut near }) = middle;
                }
                settled[i] = far;
                bounds.push(format!("{name} {}", if moved < 0.0 { "at most" } else { "at least" }));
            } else {
                continue;
            }
            is_free[i] = false;
        }
        moves = search(&settled, &is_free, all);
        let mut table = with(old, &moves);
        let rings = rings(sweep, old);
        for tile in &mut table.hopper {
            let others = rings.iter().filter(|ring| ring.tile == tile.name && ring.pairs >= 5 && ring.ratio < 0.99);
            if let Some(best) = others.min_by(|a, b| a.ratio.total_cmp(&b.ratio)) {
                tile.stages = best.stages;
            }
        }
        Fitted { table, kept, bounds, rings }
    }

    fn report(&self, sweep: &Sweep, old: &Table) -> String {
        let Sweep { device, points, failed, unknown, clock } = sweep;
        let mut told = format!(
            "{} measurements of {} shapes on {device}; {failed} failed, {unknown} of cuts that this version has not\n{clock}\n\n",
            points.len(),
            sweep.cases().len()
        );
        for (when, table) in [("before", old), ("after", &self.table)] {
            let worst = points.iter().max_by(|a, b| log_ratio(a, table).abs().total_cmp(&log_ratio(b, table).abs()));
            let error = mean(points.iter().map(|point| log_ratio(point, table).abs())).exp();
            let _ = write!(told, "{when:<7} predicted over measured, either way: {error:.3} in the geometric mean");
            if let Some(worst) = worst {
                let ratio = log_ratio(worst, table).exp();
                let Cut { tile, splits, stages, .. } = worst.cut;
                let hopper = if tile.hopper { "hopper " } else { "" };
                let _ = write!(
                    told,
                    ", worst {ratio:.2} ({}, tile {hopper}{}, {splits} splits, {stages} stages)",
                    worst.case, tile.name
                );
            }
            let regret = Regret::of(sweep, table);
            let _ =
                write!(told, "\n        regret: {:.3} in the geometric mean of {} shapes", regret.mean, regret.shapes);
            if let Some((case, ratio)) = &regret.worst {
                let _ = write!(told, ", worst {ratio:.2} ({case})");
            }
            let _ = writeln!(told, "; of {} the chosen cut was not measured", regret.missing);
        }
        told.push('\n');
        for (what, numbers) in [("kept, for the old number fits as well", &self.kept), ("bounds", &self.bounds)] {
            if !numbers.is_empty() {
                let _ = writeln!(told, "{what}: {}", numbers.join(", "));
            }
        }
        for Ring { tile, stages, pairs, ratio } in &self.rings {
            let _ = writeln!(
                told,
                "hopper {tile}: a ring of {stages} takes {ratio:.3} of the time of the table's ({pairs} pairs)"
            );
        }
        told
    }

    /// What stands between the marks in rates.rs.
    fn lines(&self, sweep: &Sweep) -> String {
        let regret = Regret::of(sweep, &self.table);
        let error = mean(sweep.points.iter().map(|point| log_ratio(point, &self.table).abs())).exp();
        let list = |of: &[String]| if of.is_empty() { "none".into() } else { of.join(", ") };
        let (kept, bounds) = (list(&self.kept), list(&self.bounds));
        let mut lines = comment(&format!(
            "fit: by tools/kernels/fit to {} measurements of {} shapes on {}: predicted over measured {error:.3}, regret {:.3}, in the \
             geometric mean. Kept, for the old number fits as well: {kept}. Bounds: {bounds}.",
            sweep.points.len(),
            sweep.cases().len(),
            sweep.device,
            regret.mean,
        ));
        lines += &show(&self.table);
        lines + "// fit: end\n"
    }
}

/// Lines of a comment.
fn comment(text: &str) -> String {
    let mut lines = String::from("//");
    let mut width = lines.len();
    for word in text.split(' ') {
        if width + 1 + word.len() > 120 {
            lines += "\n//";
            width = 2;
        }
        lines = lines + " " + word;
        width += 1 + word.len();
    }
    lines + "\n"
}

fn rings(sweep: &Sweep, table: &Table) -> Vec<Ring> {
    let of = |tile: &Tile| {
        let mut times: BTreeMap<(&str, usize), BTreeMap<usize, f64>> = BTreeMap::new();
        for point in sweep.points.iter().filter(|point| point.cut.tile.hopper && point.cut.tile.name == tile.name) {
            times.entry((&point.case, point.cut.splits)).or_default().insert(point.cut.stages, point.clocks);
        }
        let mut ratios: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for same in times.values() {
            let Some(own) = same.get(&tile.stages) else { continue };
            for (stages, clocks) in same.iter().filter(|(stages, _)| **stages != tile.stages) {
                ratios.entry(*stages).or_default().push((clocks / own).ln());
            }
        }
        let name = tile.name;
        ratios.into_iter().map(move |(stages, of)| {
            let (pairs, ratio) = (of.len(), mean(of.into_iter()).exp());
            Ring { tile: name, stages, pairs, ratio }
        })
    };
    table.hopper.iter().flat_map(of).collect()
}

/// How much longer the cuts that a table chooses take than the best.
struct Regret {
    mean: f64,
    shapes: usize,
    worst: Option<(String, f64)>,
    /// Shapes whose chosen cut was not measured.
    missing: usize,
}

impl Regret {
    fn of(sweep: &Sweep, table: &Table) -> Regret {
        let mut all: Vec<(String, f64)> = vec![];
        let cases = sweep.cases();
        for (case, points) in &cases {
            let chosen = points[0].shape.cut_by(table);
            let is_chosen = |point: &&&Point| {
                let Cut { tile, splits, stages, .. } = point.cut;
                (tile.name, tile.hopper, splits, stages)
                    == (chosen.tile.name, chosen.tile.hopper, chosen.splits, chosen.stages)
            };
            let best = points.iter().map(|point| point.clocks).fold(f64::INFINITY, f64::min);
            all.extend(points.iter().find(is_chosen).map(|point| (case.to_string(), point.clocks / best)));
        }
        Regret {
            mean: mean(all.iter().map(|(_, ratio)| ratio.ln())).exp(),
            shapes: all.len(),
            missing: cases.len() - all.len(),
            worst: all.into_iter().max_by(|(_, a), (_, b)| a.total_cmp(b)),
        }
    }
}

/// The table as Rust.
fn show(table: &Table) -> String {
    let tile = |tile: &Tile| {
        let Tile { name, hopper, rows, columns, stages, rates, .. } = tile;
        let Rates { resident, rate, latency, ends } = rates;
        let (make, ring) = if *hopper { ("on_hopper", format!(" {stages},")) } else { ("tile", String::new()) };
        format!(
            "{make}(\"{name}\", [{rows}, {columns}],{ring} Rates {{ resident: {resident}, rate: {rate:.1}, latency: \
             {latency:.1}, ends: {ends:.1} }})"
        )
    };
    let list = |tiles: &[Tile]| tiles.iter().map(|of| format!("        {},\n", tile(of))).collect::<String>();
    format!(
        "pub const TABLE: Table = Table {{\n    half: [\n{}    ],\n    hopper: [\n{}    ],\n    single: [{}],\n    bandwidth: {:.1},\n    \
         launch: {:.1},\n}};\n",
        list(&table.half),
        list(&table.hopper),
        tile(&table.single[0]),
        table.bandwidth,
        table.launch
    )
}

/// A source with other lines between its marks.
fn replace(source: &str, lines: &str) -> Result<String, String> {
    const END: &str = "// fit: end\n";
    let begin = source.find("// fit: ").ok_or("src/exec/cuda/rates.rs has no line '// fit: ...'")?;
    let end = source.find(END).ok_or("src/exec/cuda/rates.rs has no line '// fit: end'")? + END.len();
    Ok(format!("{}{lines}{}", &source[..begin], &source[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Of one in [0, 1), a function of the number.
    fn random(number: usize) -> f64 {
        let z = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    const MHZ: f64 = 1700.0;

    /// Rows of a sample, columns, depth, and whether Hopper can, as Stable Diffusion has them.
    const SHAPES: [([usize; 3], bool); 16] = [
        ([4096, 320, 2880], true),
        ([4096, 320, 320], true),
        ([4096, 2560, 320], true),
        ([4096, 320, 1280], true),
        ([1024, 640, 5760], true),
        ([1024, 640, 640], true),
        ([1024, 640, 2560], true),
        ([256, 1280, 11520], true),
        ([256, 10240, 1280], true),
        ([256, 1280, 5120], true),
        ([64, 1280, 11520], true),
        ([64, 1280, 1280], true),
        ([4096, 4, 2880], false),
        ([77, 1280, 2048], true),
        // Shallow: little but a block's ends.
        ([4096, 64, 64], false),
        ([1024, 320, 32], false),
    ];

    /// Times as a table would have them, with up to so much noise.
    fn made_up(table: &Table, noise: f64) -> String {
        let mut text = json!({"sweep": 1, "device": "made up", "multiprocessors": MULTIPROCESSORS}).to_string() + "\n";
        let mut number = 0;
        for (dtype, batch) in [(DType::BF16, 2), (DType::BF16, 16), (DType::F32, 2)] {
            for ([rows, columns, depth], can) in SHAPES {
                let shape = Shape::of_samples(dtype, &[batch, rows, 1], columns, depth);
                let shape = shape.on_hopper(Hopper::Auto, Lines::Reduced, can);
                for cut in shape.legal() {
                    number += 1;
                    let place = tiles(&TABLE).iter().position(|tile| *tile == cut.tile).unwrap();
                    let clocks = table.clocks(&shape, &Cut { tile: tiles(table)[place], ..cut });
                    let ms = clocks / MHZ / 1e3 * (1.0 + noise * (2.0 * random(number) - 1.0));
                    let line = json!({
                        "case": format!("{batch}x{rows}x{columns}x{depth} {dtype}"), "tile": cut.tile.name,
                        "hopper": cut.tile.hopper, "splits": cut.splits, "stages": cut.stages, "dtype": dtype.to_string(),
                        "rows": shape.rows, "nominal_rows": shape.nominal_rows, "columns": columns, "depth": depth,
                        "boxes": shape.boxes.map(|_| "reduced"), "ms": ms, "mhz": MHZ,
                    });
                    text += &format!("{}\n{line}\n", json!({"begin": {}}));
                }
            }
        }
        text
    }

    /// Another GPU's: every number is off, by a third to a half.
    fn truth(seed: usize) -> Table {
        let mut truth = TABLE;
        for (number, (_, value)) in numbers(&mut truth).into_iter().enumerate() {
            *value *= if random(1000 * seed + number) < 0.5 { 0.65 } else { 1.5 };
        }
        truth
    }

    #[test]
    fn rates_come_back_through_noise() {
        (0..4).for_each(come_back);
    }

    fn come_back(seed: usize) {
        let mut truth = truth(seed);
        let sweep = Sweep::parse(&made_up(&truth, 0.05)).unwrap();
        let fitted = Fitted::new(&sweep, &TABLE);
        let mut table = fitted.table;
        let told = fitted.report(&sweep, &TABLE);
        assert!(loss(&sweep.points, &table) < 1.02 * loss(&sweep.points, &truth), "{told}");
        for ((name, found), (_, value)) in numbers(&mut table).into_iter().zip(numbers(&mut truth)) {
            if fitted.bounds.contains(&format!("{name} at most")) {
                assert!(*found > 0.9 * *value, "{name}: {found}, {value}\n{told}");
            } else if !fitted.kept.contains(&name) {
                assert!((*found / *value).ln().abs() < 0.1, "{name}: {found}, {value}\n{told}");
            }
        }
        // A wait shows only where products do not take longer.
        assert!(fitted.kept.iter().chain(&fitted.bounds).all(|name| name.contains("latency")), "{told}");
        let [before, after, least] = [&TABLE, &table, &truth].map(|table| Regret::of(&sweep, table));
        assert_eq!([before.missing, after.missing, least.missing], [0; 3]);
        assert!(after.mean < 1.01 * least.mean && before.mean > after.mean, "{}\n{told}", least.mean);
        assert!(told.contains("before") && told.contains("1700 MHz, as measured"), "{told}");
    }

    #[test]
    fn what_is_not_measured_keeps_its_rates() {
        let text = made_up(&truth(0), 0.0);
        let some: String = text
            .lines()
            .filter(|line| !line.contains("f32") && !line.contains("\"160\""))
            .map(|line| format!("{line}\n"))
            .collect();
        let fitted = Fitted::new(&Sweep::parse(&some).unwrap(), &TABLE);
        assert_eq!(fitted.table.single, TABLE.single);
        assert_eq!(fitted.table.hopper[0], TABLE.hopper[0]);
        assert!(fitted.kept.contains(&"single 64 rate".into()) && !fitted.kept.contains(&"hopper 128 rate".into()));
    }

    #[test]
    fn the_true_table_is_kept_whole() {
        let sweep = Sweep::parse(&made_up(&TABLE, 0.0)).unwrap();
        assert_eq!(Fitted::new(&sweep, &TABLE).table, TABLE);
    }

    #[test]
    fn torn_lines_other_versions_and_failures_are_told() {
        let text = made_up(&TABLE, 0.0);
        let points = Sweep::parse(&text).unwrap().points.len();
        let torn = Sweep::parse(&text[..text.len() - 9]).unwrap();
        assert_eq!(torn.points.len(), points - 1);
        let last = text.lines().last().unwrap();
        let more = [
            text.as_str(),
            &last.replace("\"splits\":", "\"splits\":7"),
            "\n",
            "{\"case\":\"\",\"error\":\"faulted\"}\n",
        ]
        .concat();
        let sweep = Sweep::parse(&more).unwrap();
        assert_eq!((sweep.points.len(), sweep.unknown, sweep.failed), (points, 1, 1));
        for (bad, why) in [
            (text.replace(&format!(":{MULTIPROCESSORS}"), ":108"), "108 multiprocessors"),
            (text.replacen("\"ms\"", "\"s\"", 1), "line 3: no measurement"),
            (text.replacen("{\"", "{", 1), "line 1: "),
            (String::new(), "no measurement"),
        ] {
            let told = Sweep::parse(&bad).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn a_clock_that_is_not_known_is_fitted() {
        let text = made_up(&TABLE, 0.0).replace(",\"mhz\":1700.0", "");
        assert!(Sweep::parse(&text).unwrap().clock.starts_with("1700 MHz, unknown"));
    }

    #[test]
    fn the_fastest_ring_is_taken() {
        let mut sweep = Sweep::parse(&made_up(&TABLE, 0.0)).unwrap();
        for Point { cut, clocks, .. } in &mut sweep.points {
            let faster = cut.tile.hopper && cut.tile.name == "160" && cut.stages == 4;
            *clocks *= if faster { 0.9 } else { 1.0 };
        }
        let fitted = Fitted::new(&sweep, &TABLE);
        assert_eq!(fitted.table.hopper.map(|tile| tile.stages), [4, TABLE.hopper[1].stages]);
    }

    /// What is written back is what rustfmt would leave of it.
    #[test]
    fn the_table_is_written_as_it_stands() {
        let source = include_str!("../../src/exec/cuda/rates.rs");
        assert!(source.contains(&show(&TABLE)), "{}", show(&TABLE));
        let lines = format!("// fit: anew\n{}// fit: end\n", show(&TABLE));
        let replaced = replace(source, &lines).unwrap();
        assert!(replaced.contains("// fit: anew\npub const TABLE") && replaced.matches("pub const TABLE").count() == 1);
        assert_eq!(replace(&replaced, &lines).unwrap(), replaced);
        assert!(replace("", &lines).is_err());
    }
}
