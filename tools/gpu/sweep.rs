//! `gpu_check sweep`: what every cut of products takes (tile, splits, stages of the ring), at shapes of Stable Diffusion and its VAE: what
//! `tools/kernels/fit` fits the engine's table of rates to.
//!
//! A line of JSON for each measurement is in the file before the next one begins. First comes what the device is, and before each
//! measurement a `begin`: where a kernel takes the process along, `--resume` goes on behind it. Of all shapes the cut that the
//! engine chooses comes first with its neighbours, then what is farther off, so that a sweep that is cut short still says something
//! of every shape.

use crate::Outcome;
use crate::common::speed;
use crate::device::Choice;
use crate::measure::{Bench, Lines, To, dtype};
use clap::Args;
use rarebit::exec::cuda::{Cuda, Cut, Hopper, Lines as Along, TABLE, product};
use rarebit::exec::{Data, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Model, Pack, Weight};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Time every cut of products, for tools/kernels/fit
#[derive(Args)]
pub struct Sweep {
    /// cuda:N, or emulated
    #[arg(long, default_value = "cuda:0")]
    device: Choice,
    /// f16 or bf16; some shapes are of f32 nevertheless
    #[arg(long, default_value = "bf16", value_parser = dtype)]
    dtype: DType,
    /// The kernels for Hopper: measured too (auto), alone chosen by the engine (always), or not (off)
    #[arg(long, default_value = "auto")]
    hopper: Hopper,
    #[command(flatten)]
    to: To,
    /// Seconds
    #[arg(long, default_value_t = 60.0)]
    time_limit: f64,
    /// A few tiny shapes: a trial of this program
    #[arg(long)]
    quick: bool,
}

/// An op at the sizes of a network, its weights as checkpoints hold them.
#[derive(Clone, Copy)]
enum Form {
    /// Rows of a sample, reduced, columns.
    Product([usize; 3]),
    Geglu([usize; 3]),
    ToInput([usize; 3]),
    /// Side, channels in and out, stride, of 3x3.
    Conv([usize; 3], usize),
    ConvToInput([usize; 3]),
}
use Form::*;

#[derive(Clone, Copy)]
struct Case {
    form: Form,
    batch: usize,
    dtype: DType,
}

/// The shapes that take most of the time: of SD 1.5 at 512x512, of SDXL at 1024x1024, of the VAE's decoder; gradients; then others.
fn cases(dtype: DType) -> Vec<Case> {
    let sd1 = [
        Conv([64, 320, 320], 1),
        Conv([32, 640, 640], 1),
        Conv([16, 1280, 1280], 1),
        Conv([8, 1280, 1280], 1),
        Geglu([4096, 320, 2560]),
        Product([4096, 1280, 320]),
        Product([4096, 320, 320]),
        Product([1024, 640, 640]),
        Geglu([256, 1280, 10240]),
        Product([256, 5120, 1280]),
        Product([256, 1280, 1280]),
        Product([64, 1280, 1280]),
        Conv([64, 960, 320], 1),
        Conv([16, 2560, 1280], 1),
        Product([1024, 2560, 640]),
    ];
    let sdxl = [
        Conv([128, 320, 320], 1),
        Conv([64, 640, 640], 1),
        Conv([32, 1280, 1280], 1),
        Product([4096, 640, 640]),
        Geglu([1024, 1280, 10240]),
        Product([1024, 5120, 1280]),
        Product([1024, 1280, 3840]),
        Product([1024, 1280, 1280]),
        Product([77, 2048, 1280]),
    ];
    let decoder =
        [Conv([64, 512, 512], 1), Conv([256, 256, 256], 1), Conv([512, 128, 128], 1), Conv([512, 256, 128], 1)];
    let others = [
        ConvToInput([64, 320, 320]),
        ConvToInput([16, 1280, 1280]),
        ToInput([4096, 320, 2560]),
        Conv([64, 320, 320], 2),
    ];
    let of = |forms: &[Form], batch| forms.iter().map(move |&form| Case { form, batch, dtype }).collect::<Vec<_>>();
    let single =
        [Conv([32, 640, 640], 1), Product([1024, 640, 640])].map(|form| Case { form, batch: 2, dtype: DType::F32 });
    [of(&sd1, 2), of(&sd1[..9], 16), of(&sdxl, 2), of(&decoder, 1), of(&others, 2), single.to_vec()].concat()
}

/// As small as can be split, for each kind of kernel.
fn tiny(dtype: DType) -> Vec<Case> {
    let forms = [
        Product([20, 256, 168]),
        Geglu([9, 128, 144]),
        ToInput([12, 72, 192]),
        Conv([5, 64, 72], 1),
        ConvToInput([4, 72, 64]),
    ];
    let case = |form, dtype| Case { form, batch: 2, dtype };
    forms.map(|form| case(form, dtype)).into_iter().chain([case(forms[0], DType::F32)]).collect()
}

impl Case {
    fn name(&self) -> String {
        let Case { batch, dtype, .. } = self;
        match self.form {
            Product([rows, k, n]) => format!("product {batch}x{rows}x{k}x{n} {dtype}"),
            Geglu([rows, k, n]) => format!("geglu {batch}x{rows}x{k}x{n} {dtype}"),
            ToInput([rows, k, n]) => format!("product to input {batch}x{rows}x{k}x{n} {dtype}"),
            Conv([side, c, o], stride) => format!("conv {batch}x{side}x{side} {c} to {o} /{stride} {dtype}"),
            ConvToInput([side, c, o]) => format!("conv to input {batch}x{side}x{side} {c} to {o} {dtype}"),
        }
    }

    /// Shape and order of its weight, as the layers of a network have it.
    fn weight(&self) -> (Pack, Vec<usize>) {
        match self.form {
            Product([_, k, n]) | ToInput([_, k, n]) => (Pack::Linear, vec![k, n]),
            Geglu([_, k, n]) => (Pack::Geglu, vec![k, n]),
            Conv([_, c, o], _) | ConvToInput([_, c, o]) => (Pack::Conv, vec![3, 3, c, o]),
        }
    }

    /// How many weights take turns. In a network every op reads its own from device memory; those that are large would lie in the
    /// GPU's cache if they were the same each time.
    fn copies(&self) -> usize {
        const CACHE: usize = 50 << 20;
        const LARGE: usize = 4 << 20;
        let bytes = self.weight().1.iter().product::<usize>() * self.dtype.bytes();
        if bytes < LARGE { 1 } else { (2 * CACHE).div_ceil(bytes).clamp(2, 4) }
    }

    /// The op so many times over.
    fn program(&self, times: usize) -> Program {
        let mut b = Builder::new(self.name(), self.dtype);
        let (pack, shape) = self.weight();
        let batch = self.batch;
        let x = match self.form {
            Product([rows, k, _]) | Geglu([rows, k, _]) => b.input("x", &[batch, rows, k]),
            ToInput([rows, _, n]) => b.input("d_y", &[batch, rows, n]),
            Conv([side, c, _], _) => b.input("x", &[batch, side, side, c]),
            ConvToInput([side, _, o]) => b.input("d_y", &[batch, side, side, o]),
        };
        for copy in (0..times).map(|number| number % self.copies()) {
            let key = format!("down_blocks.{pack:?}.{shape:?}.{copy}").to_lowercase();
            let w = b.weight(Weight { component: Component::Unet, keys: vec![key], pack, shape: shape.clone() });
            let product = |activation| Gemm { x, w, bias: None, residual: None, activation };
            match self.form {
                Product(_) => b.gemm(product(Activation::None)),
                Geglu(_) => b.gemm(product(Activation::Geglu)),
                ToInput(_) => b.push(Op::GemmBackward(GemmBackward::Input { d_y: x, w, residual: None }))[0],
                Conv(_, stride) => {
                    b.conv2d(Conv2d { x, w, bias: None, shift: None, residual: None, stride, padding: [1; 4] })
                }
                ConvToInput([side, ..]) => {
                    let (size, stride, padding) = ([side; 2], 1, [1; 4]);
                    b.push(Op::Conv2dBackward(Conv2dBackward { d_y: x, w, residual: None, size, stride, padding }))[0]
                }
            };
        }
        b.finish().expect("a valid program")
    }

    /// The product that it is.
    fn product(&self, hopper: Hopper) -> rarebit::exec::cuda::Shape {
        let program = self.program(1);
        product(&program, &program.nodes[0], hopper).expect("a product")
    }

    /// Every cut that the device can run, and how far it is from the one that the engine chooses.
    fn cuts(&self, hopper: Hopper) -> Vec<(Cut, usize)> {
        let shape = self.product(hopper);
        let (chosen, mut legal) = (shape.cut(), shape.legal());
        legal.retain(|cut| hopper != Hopper::Off || !cut.tile.hopper);
        let splits: BTreeSet<usize> = legal.iter().map(|cut| cut.splits).collect();
        let place = |cut: &Cut| splits.iter().position(|of| *of == cut.splits).unwrap_or_default();
        let far = |cut: &Cut| {
            let same = cut.tile.name == chosen.tile.name && cut.tile.hopper == chosen.tile.hopper;
            usize::from(!same) + place(cut).abs_diff(place(&chosen)) + cut.stages.abs_diff(cut.tile.stages)
        };
        let mut cuts: Vec<(Cut, usize)> = legal.iter().map(|cut| (*cut, far(cut))).collect();
        cuts.sort_by_key(|(_, far)| *far);
        cuts
    }
}

/// What names a measurement in a file.
fn key(case: &str, cut: &Cut) -> Value {
    json!({"case": case, "tile": cut.tile.name, "hopper": cut.tile.hopper, "splits": cut.splits, "stages": cut.stages})
}

/// Cuts of a round, by how far they are from the chosen one.
const ROUNDS: [std::ops::RangeInclusive<usize>; 3] = [0..=1, 2..=3, 4..=usize::MAX];

pub fn run(args: &Sweep, emulation: impl FnOnce() -> PathBuf) -> Outcome<bool> {
    let deadline = Instant::now() + Duration::from_secs_f64(args.time_limit);
    let (cuda, bench) = Bench::open(&args.device, emulation)?;
    let cuda = cuda.with_hopper(args.hopper);
    let mut first = bench.facts.clone();
    first["sweep"] = json!(1);
    let (lines, known) = Lines::open(&args.to, &first)?;
    let mut sweep = Run { cuda, bench, lines, known, models: vec![], counts: [0; 2] };
    let cases = if args.quick { tiny(args.dtype) } else { cases(args.dtype) };
    // Before any cut is forced: as asked for, or off where there is no Hopper.
    let (hopper, mut left) = (sweep.cuda.hopper(), 0);
    for round in ROUNDS {
        for case in &cases {
            let cuts = case.cuts(hopper).into_iter().filter(|(_, far)| round.contains(far)).map(|(cut, _)| cut);
            let name = case.name();
            let cuts: Vec<Cut> = cuts.filter(|cut| !sweep.known.contains(&key(&name, cut).to_string())).collect();
            left += sweep.case(case, &cuts, deadline)?;
        }
    }
    let [measured, failed] = sweep.counts;
    eprintln!("{} shapes: {measured} cuts measured, {failed} failed, {left} not reached", cases.len());
    Ok(failed == 0)
}

struct Run {
    cuda: Cuda,
    bench: Bench,
    lines: Lines,
    /// Measurements that are in the file.
    known: HashSet<String>,
    /// Weights of the cases so far, each in a file of its own, by which the device knows them.
    models: Vec<(HashSet<Weight>, Model)>,
    /// Cuts that were measured, and that failed.
    counts: [usize; 2],
}

impl Run {
    /// Measures cuts of one case; how many were not reached.
    fn case(&mut self, case: &Case, cuts: &[Cut], deadline: Instant) -> Outcome<usize> {
        if cuts.is_empty() || Instant::now() >= deadline {
            return Ok(cuts.len());
        }
        self.cuda.clear();
        let program = case.program(case.copies());
        let has_all = |(weights, _): &(HashSet<Weight>, Model)| program.weights().all(|(_, w)| weights.contains(w));
        let model = self.models.iter().position(has_all).unwrap_or_else(|| {
            let weights = program.weights().map(|(_, weight)| weight.clone()).collect();
            self.models.push((weights, speed::checkpoint(&program)));
            self.models.len() - 1
        });
        let mut is_fed = false;
        for (number, cut) in cuts.iter().enumerate() {
            if Instant::now() >= deadline {
                return Ok(cuts.len() - number);
            }
            let mut line = key(&case.name(), cut);
            self.lines.write(&json!({"begin": line}))?;
            match self.measure(case, cut, model, &mut is_fed) {
                Ok(found) => {
                    self.counts[0] += 1;
                    if let Some((line, found)) = line.as_object_mut().zip(found.as_object()) {
                        line.extend(found.clone());
                    }
                }
                Err(error) => {
                    self.counts[1] += 1;
                    line["error"] = json!(error.to_string());
                }
            }
            self.lines.write(&line)?;
            self.cuda.wait().map_err(|error| format!("{error}; the device does no more: go on with --resume"))?;
        }
        Ok(0)
    }

    fn measure(&mut self, case: &Case, cut: &Cut, model: usize, is_fed: &mut bool) -> rarebit::Result<Value> {
        let shape = case.product(Hopper::Forced(*cut));
        let clocks = TABLE.clocks(&shape, cut);
        // So many that what a start takes is little of a run, which takes about a millisecond.
        let together = if self.bench.is_gpu { (1.7e6 / clocks).ceil().clamp(4.0, 50.0) as usize } else { 1 };
        let program = case.program(together);
        let input = program.value(program.inputs[0]).clone();
        self.cuda.set_hopper(Hopper::Forced(*cut));
        let planned = plan(program, |program, node| self.cuda.workspace(program, node));
        let id = self.cuda.load(planned, &self.models[model].1)?;
        if let (false, Origin::Input(name)) = (*is_fed, &input.origin) {
            self.cuda.write(name, Data::F32(&inputs(input.len())))?;
            *is_fed = true;
        }
        let launches = self.cuda.launches(id).next().map_or(0, Iterator::count);
        let (ms, mhz) = self.bench.time(&mut self.cuda, id)?;
        let boxes = shape.boxes.map(|lines| if lines == Along::KMajor { "reduced" } else { "across" });
        Ok(json!({
            "dtype": shape.dtype.to_string(), "rows": shape.rows, "nominal_rows": shape.nominal_rows,
            "columns": shape.columns, "depth": shape.depth, "boxes": boxes,
            "ms": ms / together as f64, "together": together, "launches": launches, "clocks": clocks, "mhz": mhz,
        }))
    }
}

/// Small noise, which repeats itself after a while: there may be 100 million of them.
fn inputs(len: usize) -> Vec<f32> {
    let some = speed::noise(len.min(1 << 20));
    some.iter().copied().cycle().take(len).collect()
}
