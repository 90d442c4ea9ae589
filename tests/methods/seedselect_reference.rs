//! SeedSelect against a reference loop on diffusers, iteration by iteration (`tools/reference/seedselect.py`): every run in f64, with the
//! activations of all steps kept; one of every kind in f32, each step computed again on the way back; and the whole method.

use crate::common::auxiliary::channels_last;
use crate::common::golden::Golden;
use crate::common::seedselect::{Found, Run};
use crate::common::tolerance::{report, side_by_side};
use rarebit::data::{images, resample};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor, HostFloat};
use rarebit::methods::seedselect::{LearningRate, Options as SeedOptions, References, SeedSelect};
use rarebit::methods::{ImageMethod, Request};
use rarebit::models::clip_image;
use rarebit::optimize::chain::{Chain, Options, Storage, Term};
use rarebit::optimize::objective::references::{Tower, View, appearance, buffer, norm_prior, semantics};
use rarebit::optimize::optimizer::{Optimizer, Rule};
use rarebit::optimize::variable::Entry;
use rarebit::pipeline::generate::{self, Job};
use rarebit::pipeline::networks::Networks;
use rarebit::pipeline::{Pipeline, Progress};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::sampler::{Noise, Rng};
use rarebit::weights::Component;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The terms of the loss in the order of [`terms`]; a term without weight is not computed.
enum What {
    Distance(usize),
    Appearance,
    Prior,
}

/// The CLIP of a run, as it sees generated images.
fn tower(run: &Run<'_>, pipeline: &Pipeline) -> Tower {
    let clip = run.clip(pipeline);
    Tower { component: Component::Clip, preprocess: run.preprocess(&clip), config: clip.image, views: View::WHOLE }
}

fn terms<'a>(run: &Run<'_>, pipeline: &Pipeline, tower: &'a Tower) -> (Vec<What>, Vec<Term<'a>>) {
    let [semantic, of_appearance, rho] = ["semantic", "appearance", "rho"].map(|field| run.case.number(field));
    let (weights, steps) = (run.state_weights(), run.count("steps"));
    let mut terms = vec![];
    for (state, weight) in weights.iter().enumerate().filter(|_| semantic > 0.0) {
        let term = Term::after(steps + 1 + state - weights.len(), semantics(tower, 0.0, semantic * weight));
        terms.push((What::Distance(state), term));
    }
    if of_appearance > 0.0 {
        terms.push((What::Appearance, Term::at_end(appearance(of_appearance))));
    }
    if rho > 0.0 {
        let scale = rarebit::sampler::schedule(&pipeline.config.scheduler, &run.sampler()).unwrap().initial_scale;
        terms.push((What::Prior, Term::after(0, norm_prior(rho, scale))));
    }
    terms.into_iter().unzip()
}

/// Numbers the test computes with.
trait Number: Real + HostFloat + Into<f64> {
    fn of(x: f32) -> Self;
}

impl Number for f32 {
    fn of(x: f32) -> f32 {
        x
    }
}

impl Number for f64 {
    fn of(x: f32) -> f64 {
        x.into()
    }
}

fn wide<T: Number>(values: Vec<T>) -> Vec<f64> {
    values.into_iter().map(Into::into).collect()
}

fn length(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn job(run: &Run<'_>) -> Job {
    Job { prompt: run.case.text("prompt"), negative: run.negative(), seed: run.count("seed") as u64, draws: vec![] }
}

/// Runs so many iterations of the loop, within a budget of activations.
fn optimise<T: Number>(run: &Run<'_>, pipeline: &Pipeline, iterations: usize, budget: Option<usize>) -> Found {
    let ([height, width], factor) = (run.size(), pipeline.config.vae.factor());
    let tower = tower(run, pipeline);
    let (what, terms) = terms(run, pipeline, &tower);
    let options = Options {
        width: width * factor,
        height: height * factor,
        batch: 1,
        dtype: T::DTYPE,
        sampler: run.sampler(),
        image_steps: None,
        budget,
    };
    let mut cpu = Cpu::<T>::new();
    let chain = Chain::plan(pipeline, &cpu, &options, &[Entry::Latents], terms).unwrap();
    assert_eq!(chain.storage() == Storage::Activations, budget.is_some());
    let weight_decay = run.case.number("weight_decay");
    let optimizer = Optimizer { rule: Rule::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay }, clip: None };
    let optimizer = optimizer.plan(&cpu, T::DTYPE, &[chain.noise_parameter()], 1.0).unwrap();
    let mut chain = chain.load::<T>(&mut cpu).unwrap();
    let mut optimizer = optimizer.load(chain.executor(), &pipeline.model).unwrap();
    chain.jobs(&[job(run)]).unwrap();
    for (name, values) in [buffer::CENTROID, buffer::LATENTS].into_iter().zip(run.centroid_and_latents()) {
        let reads = |what: &What| match what {
            What::Distance(_) => name == buffer::CENTROID,
            What::Appearance => name == buffer::LATENTS,
            What::Prior => false,
        };
        if what.iter().any(reads) {
            chain.write(name, Data::F32(&values)).unwrap();
        }
    }
    chain.set_noise(&run.noise().into_iter().map(T::of).collect::<Vec<_>>()).unwrap();

    let mut found = Found::default();
    for iteration in 0..iterations {
        found.norm.push(length(&wide(chain.noise().unwrap())));
        let losses = chain.gradient().unwrap().into_iter().map(|loss| loss[0].into()).collect();
        record(run, &what, losses, &mut found);
        let gradient = wide(chain.read_gradient(Entry::Latents).unwrap());
        found.gradient_norm.push(length(&gradient));
        found.gradients.push((iteration, gradient));
        optimizer.step(chain.executor(), run.lr(iteration)).unwrap();
    }
    found.noise = wide(chain.noise().unwrap());
    found
}

/// Takes the weights off the terms of one iteration; a term that was not computed stays 0.
fn record(run: &Run<'_>, what: &[What], losses: Vec<f64>, found: &mut Found) {
    found.loss.push(losses.iter().sum());
    let states = run.state_weights();
    let mut distances = vec![0.0; states.len()];
    let [mut appearance, mut prior] = [0.0; 2];
    for (what, loss) in what.iter().zip(losses) {
        match what {
            What::Distance(state) => distances[*state] = loss / (run.case.number("semantic") * states[*state]),
            What::Appearance => appearance = loss / run.case.number("appearance"),
            What::Prior => prior = loss,
        }
    }
    found.distances.push(distances);
    found.appearance.push(appearance);
    found.prior.push(prior);
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / (length(a) * length(b))
}

/// The largest; no number where one is none.
fn worst(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |worst, x| if x > worst || x.is_nan() { x } else { worst })
}

/// The largest distance relative to `scale`.
fn relative(found: &[f64], expected: &[f64], scale: &[f64]) -> f64 {
    assert_eq!([found.len(), scale.len()], [expected.len(); 2]);
    worst(found.iter().zip(expected).zip(scale).map(|((a, b), scale)| (a - b).abs() / scale.abs()))
}

/// How far a run is from the reference's.
struct Apart {
    loss: f64,
    terms: f64,
    /// One minus the cosine.
    gradient: f64,
    norms: f64,
    noise: f64,
}

fn compare(run: &Run<'_>, found: &Found, expected: &Found) -> Apart {
    let own = |found: &[f64], expected: &[f64]| relative(found, expected, expected);
    // Near its least value, 0, the prior has no digits of its own.
    let mut terms = vec![relative(&found.prior, &expected.prior, &expected.loss)];
    if run.case.number("semantic") > 0.0 {
        terms.push(own(&found.distances.concat(), &expected.distances.concat()));
    }
    if run.case.number("appearance") > 0.0 {
        terms.push(own(&found.appearance, &expected.appearance));
    }
    let gradient = |(iteration, gradient): &(usize, Vec<f64>)| 1.0 - cosine(&found.gradients[*iteration].1, gradient);
    Apart {
        loss: own(&found.loss, &expected.loss),
        terms: worst(terms),
        gradient: worst(expected.gradients.iter().map(gradient)),
        norms: worst([own(&found.norm, &expected.norm), own(&found.gradient_norm, &expected.gradient_norm)]),
        noise: worst(found.noise.iter().zip(&expected.noise).map(|(a, b)| (a - b).abs())),
    }
}

/// Relative, of the loss and of its terms in every iteration, and of the lengths of noise and gradient.
const LOSS: f64 = 1e-4;
const NORM: f64 = 1e-3;
/// One minus the cosine of the gradients at the first and at the fifth iteration.
const GRADIENT: f64 = 1e-5;
/// Of the noise after five iterations, whose numbers moved by 0.1 each in the first.
const NOISE: f64 = 2e-3;

fn agrees<T: Number>(runs: Vec<Run<'_>>, budget: Option<usize>) {
    report(side_by_side(runs.into_iter(), |_, run| {
        let pipeline = run.pipeline();
        let expected = run.found(T::DTYPE == DType::F64);
        let Apart { loss, terms, gradient, norms, noise } =
            compare(run, &optimise::<T>(run, &pipeline, 5, budget), &expected);
        let (name, dtype) = (run.name(), T::DTYPE);
        let found = format!(
            "{name:24} {dtype}: loss {loss:.1e}  terms {terms:.1e}  1 - cosine {gradient:.1e}  |g| {norms:.1e}  z {noise:.1e}"
        );
        println!("{found}");
        let limits = [(loss, LOSS), (terms, LOSS), (gradient, GRADIENT), (norms, NORM), (noise, NOISE)];
        let agrees = limits.iter().all(|(found, limit)| found <= limit);
        Some(found).filter(|_| !agrees).into_iter().collect()
    }));
}

/// A run of every model, of every sampler, of a batch of two and of one, of a length and of a shape: what else differs between runs is
/// weights and rates, which f64 tells from rounding.
const KINDS: [&str; 8] = [
    "tiny-sd1/released",
    "tiny-sd1/euler",
    "tiny-sd1/dpmpp-2m",
    "tiny-sd1/steps-20",
    "tiny-sd1/tall-released",
    "tiny-sd2/default",
    "tiny-sdxl/released",
    "shapes/released",
];

#[test]
fn every_iteration_is_the_references() {
    let golden = Golden::open("seedselect");
    let mut runs = Run::short(&golden);
    runs.retain(|run| KINDS.contains(&run.name()));
    assert_eq!(runs.len(), KINDS.len());
    agrees::<f32>(runs, None);
}

#[test]
fn every_iteration_is_the_references_in_double_precision() {
    let golden = Golden::open("seedselect");
    agrees::<f64>(Run::short(&golden), Some(8 << 30));
}

#[test]
fn noise_is_the_engines() {
    let golden = Golden::open("seedselect");
    for run in Run::short(&golden) {
        let noise = |seed: &str, len: usize| {
            let mut values = vec![0.0; len];
            Noise::new(Rng::Philox, run.count(seed) as u64).normal(&mut values);
            values
        };
        let start = run.tensor("noise").data;
        assert_eq!(noise("seed", start.len()), start, "{}", run.name());
        if run.is_released() {
            let of_references = run.target("noise");
            let one = of_references.data.len() / of_references.shape[0];
            assert_eq!(noise("reference_seed", one), of_references.data[..one], "{}", run.name());
        }
    }
}

/// A run for every set of targets whose networks' inputs are stored.
fn distinct<'g>(golden: &'g Golden) -> impl Iterator<Item = Run<'g>> {
    let mut seen = BTreeSet::new();
    let is_small = |run: &Run<'_>| run.case.text("model") != "shapes";
    Run::short(golden).into_iter().filter(is_small).filter(move |run| seen.insert(run.targets()))
}

/// Runs a program of one input and one output.
fn single(
    build: impl FnOnce(&mut Builder, ValueId) -> ValueId,
    pipeline: &Pipeline,
    shape: &[usize],
    x: &[f32],
) -> Vec<f32> {
    let mut b = Builder::new("single", DType::F32);
    let input = b.input("x", shape);
    let y = build(&mut b, input);
    let mut out = vec![0.0; b.shape(y).iter().product()];
    b.output("y", y);
    let mut cpu = Cpu::<f32>::new();
    let planned = plan(b.finish().unwrap(), |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, &pipeline.model).unwrap();
    cpu.write("x", Data::F32(x)).unwrap();
    cpu.run(id).unwrap();
    cpu.read("y", DataMut::F32(&mut out)).unwrap();
    out
}

/// The distance relative to the length of what is expected; of `expected` as much as was found.
fn apart(found: &[f32], expected: &[f32]) -> f64 {
    let [found, expected] =
        [found, &expected[..found.len()]].map(|x| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
    let difference: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
    length(&difference) / length(&expected)
}

/// The mean over the rows of `[rows, ..]`.
fn mean(x: &[f32], rows: usize) -> Vec<f32> {
    let len = x.len() / rows;
    (0..len).map(|i| x[i..].iter().step_by(len).sum::<f32>() / rows as f32).collect()
}

#[test]
fn targets_are_the_references() {
    let golden = Golden::open("seedselect");
    for run in distinct(&golden) {
        let (pipeline, name) = (run.pipeline(), run.targets());
        let (clip, shown) = (run.clip(&pipeline), run.target("clip"));
        let [rows, _, side, _] = shown.shape[..] else { panic!("no images") };
        let features = |b: &mut Builder, x| clip_image::features(b, &clip.image, Component::Clip, x);
        let pixels = channels_last(&shown);
        let features = single(features, &pipeline, &[rows, side, side, 3], &pixels);
        let expected = run.target("features");
        let off_features = apart(&features, &expected.data);

        let mut cpu = Cpu::<f32>::new();
        let (mean_found, logvar) = Networks::new(&pipeline, &mut cpu, DType::F32).encode(&run.target("vae")).unwrap();
        let std: Vec<f32> = logvar.data.iter().map(|x| (0.5 * x.clamp(-30.0, 20.0)).exp()).collect();
        let [means, stds] = ["mean", "std"].map(|what| run.target(what).data);
        let off_moments = worst([apart(&mean_found.data, &means), apart(&std, &stds)]);

        // From all rows, those of the reference itself.
        let rows = expected.shape[0];
        let centroid = mean(&expected.data, rows);
        let norm = centroid.iter().map(|x| x * x).sum::<f32>().sqrt();
        let off_centroid = apart(&centroid.iter().map(|x| x / norm).collect::<Vec<_>>(), &run.target("centroid").data);
        let noise = if run.is_released() { run.target("noise").data } else { vec![0.0; means.len()] };
        let sampled: Vec<f32> = (0..means.len()).map(|i| means[i] + stds[i] * noise[i]).collect();
        let scale = pipeline.config.vae.scaling_factor as f32;
        let latents: Vec<f32> = mean(&sampled, rows).into_iter().map(|x| x * scale).collect();
        let off_latents = apart(&latents, &run.target("latents").data);
        println!(
            "{name}: features {off_features:.1e}  moments {off_moments:.1e}  centroid {off_centroid:.1e}  latents {off_latents:.1e}"
        );
        assert!(off_features < 1e-5 && off_moments < 1e-5, "{name}");
        assert!(off_centroid < 1e-6 && off_latents < 1e-6, "{name}");
    }
}

/// The largest difference in levels of 256.
fn levels(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    worst(a.iter().zip(b).map(|(a, b)| 127.5 * f64::from((a - b).abs())))
}

/// What the VAE is shown: in mode `default` torch's resize; in mode `released` Pillow's, which rounds to bytes after rows and after columns.
#[test]
fn references_are_resized_as_by_the_reference() {
    let golden = Golden::open("seedselect");
    for run in distinct(&golden) {
        let (shown, mut off) = (run.target("vae"), 0.0f64);
        let [rows, _, height, width] = shown.shape[..] else { panic!("no images") };
        let expected = channels_last(&shown);
        for (path, expected) in run.references().iter().zip(expected.chunks(height * width * 3)).take(rows) {
            let picture = images::read(path).unwrap();
            let found = match run.is_released() {
                true => resample::squash_in_bytes(&picture, width, height),
                false => resample::cover(&picture, width, height),
            };
            off = worst([off, levels(&found, expected)]);
        }
        println!("{}: {off:.1e} levels", run.targets());
        assert!(off < if run.is_released() { 1.5 } else { 1e-3 }, "{}: {off} levels", run.targets());
    }
}

/// How two loops part over many iterations is printed; the first five are held to be the same.
#[test]
fn long_runs_part_slowly() {
    let golden = Golden::open("seedselect");
    for run in Run::long(&golden) {
        let [single, double] = run.losses();
        let found = optimise::<f32>(&run, &run.pipeline(), single.len(), None);
        for iteration in [0, 4, 9, 19, 29] {
            let ratio = |other: &[f64]| other[iteration] / single[iteration] - 1.0;
            let [ours, doubles] = [&found.loss, &double].map(|losses| ratio(losses));
            println!(
                "{} {iteration}: {:.4}, ours {ours:+.1e}, in double {doubles:+.1e}",
                run.name(),
                single[iteration]
            );
        }
        let first = relative(&found.loss[..5], &single[..5], &single[..5]);
        assert!(first < LOSS, "{}: {first:.1e}", run.name());
    }
}

/// The whole method, from the image files on: losses and their terms of every iteration. What it makes of the files differs in the last
/// digits from what torch does. All its options with one model, its defaults with the others.
#[test]
fn the_method_is_the_references() {
    let golden = Golden::open("seedselect");
    let mut runs = Run::short(&golden);
    runs.retain(|run| !run.is_released());
    runs.retain(|run| {
        !["tiny-sd2", "tiny-sdxl"].contains(&&*run.case.text("model")) || run.name().ends_with("/default")
    });
    report(side_by_side(runs.into_iter(), |_, run| {
        let pipeline = run.pipeline();
        let [semantics, appearance, norm_prior, weight_decay] =
            ["semantic", "appearance", "rho", "weight_decay"].map(|field| run.case.number(field));
        let lr = LearningRate { first: run.lr(0), from: 3, later: run.lr(3) };
        let options = SeedOptions {
            iterations: 5,
            starts: 1,
            patience: None,
            lr,
            semantics,
            appearance,
            norm_prior,
            weight_decay,
            ..crate::seedselect::PAPER
        };
        let references = Arc::new(References::read(&run.references()).unwrap());
        let method = SeedSelect { trace: true, ..SeedSelect::new(options, references, 0) };
        let ([height, width], factor) = (run.size(), pipeline.config.vae.factor());
        let settings = generate::Settings {
            width: width * factor,
            height: height * factor,
            sampler: run.sampler(),
            rng: Rng::Philox,
            dtype: DType::F32,
        };
        let job = job(run);
        let mut cpu = Cpu::<f32>::new();
        let request = Request { settings: &settings, batch: 1, prompts: &[&job.prompt], memory: None };
        let mut loaded = method.plan(&pipeline, &cpu, &request).unwrap().load(&mut cpu).unwrap();
        let (mut losses, mut norms) = (vec![], vec![]);
        let made = loaded.run(std::slice::from_ref(&job), &mut |progress| {
            if let Progress::Iteration(Some(iteration)) = progress {
                losses.push(iteration.score[0]);
                norms.push(iteration.terms["norm"][0]);
            }
            Ok(())
        });
        made.unwrap();
        let expected = run.found(false);
        let (loss, norm) =
            (relative(&losses, &expected.loss, &expected.loss), relative(&norms, &expected.norm, &expected.norm));
        let found = format!("{}: loss {loss:.1e}  |z| {norm:.1e}", run.name());
        println!("{found}");
        let agrees = loss < 1e-3 && norm < 1e-4;
        Some(found).filter(|_| !agrees).into_iter().collect()
    }));
}
