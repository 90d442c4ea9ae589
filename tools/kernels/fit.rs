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

#[path = "fit_search.rs"]
mod search;
#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;

use clap::Parser;
use rarebit::exec::cuda::{Cut, Hopper, Lines, MULTIPROCESSORS, Rates, Shape, TABLE, Table, Tile};
use rarebit::program::DType;
use search::search;
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
    let mut output = fitted.report(&sweep, &TABLE);
    let lines = fitted.lines(&sweep);
    if args.write && sweep.device == "emulated" {
        return Err(format!("{}: the emulation's times say nothing of a GPU", args.sweep.display()).into());
    }
    if args.write {
        let path = Path::new("src/exec/cuda/rates.rs");
        let failed = |error: std::io::Error| format!("{}: {error}; run it in the checkout", path.display());
        let replaced = replace(&std::fs::read_to_string(path).map_err(failed)?, &lines)?;
        std::fs::write(path, replaced).map_err(failed)?;
        let _ = writeln!(output, "\nwritten to {}", path.display());
    } else {
        let _ = write!(output, "\n{lines}");
    }
    Ok(output)
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

/// What names a cut of a shape: tile, whether it is Hopper's, splits, stages.
fn names(cut: &Cut) -> (&'static str, bool, usize, usize) {
    (cut.tile.name, cut.tile.hopper, cut.splits, cut.stages)
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
        Some("reduced") => Some(Lines::KMajor),
        Some("across") => Some(Lines::MNMajor),
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
    let is_it = |cut: &Cut| names(cut) == (name, hopper, splits, stages);
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
        let mut output = format!(
            "{} measurements of {} shapes on {device}; {failed} failed, {unknown} of cuts that this version has not\n{clock}\n\n",
            points.len(),
            sweep.cases().len()
        );
        for (when, table) in [("before", old), ("after", &self.table)] {
            let worst = points.iter().max_by(|a, b| log_ratio(a, table).abs().total_cmp(&log_ratio(b, table).abs()));
            let error = mean(points.iter().map(|point| log_ratio(point, table).abs())).exp();
            let _ = write!(output, "{when:<7} predicted over measured, either way: {error:.3} in the geometric mean");
            if let Some(worst) = worst {
                let ratio = log_ratio(worst, table).exp();
                let Cut { tile, splits, stages, .. } = worst.cut;
                let hopper = if tile.hopper { "hopper " } else { "" };
                let _ = write!(
                    output,
                    ", worst {ratio:.2} ({}, tile {hopper}{}, {splits} splits, {stages} stages)",
                    worst.case, tile.name
                );
            }
            let regret = Regret::of(sweep, table);
            let _ = write!(
                output,
                "\n        regret: {:.3} in the geometric mean of {} shapes",
                regret.mean, regret.shapes
            );
            if let Some((case, ratio)) = &regret.worst {
                let _ = write!(output, ", worst {ratio:.2} ({case})");
            }
            let _ = writeln!(output, "; of {} the chosen cut was not measured", regret.missing);
        }
        output.push('\n');
        for (what, numbers) in [("kept, for the old number fits as well", &self.kept), ("bounds", &self.bounds)] {
            if !numbers.is_empty() {
                let _ = writeln!(output, "{what}: {}", numbers.join(", "));
            }
        }
        for Ring { tile, stages, pairs, ratio } in &self.rings {
            let _ = writeln!(
                output,
                "hopper {tile}: a ring of {stages} takes {ratio:.3} of the time of the table's ({pairs} pairs)"
            );
        }
        output
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
            let is_chosen = |point: &&&Point| names(&point.cut) == names(&chosen);
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
