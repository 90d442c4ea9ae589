//! The samplers MinorityPrompt is compared with: CADS, SGMS, best of n; and the score of any model's images.

use crate::common::golden::Golden;
use crate::common::minority::{images, job, plain};
use rarebit::Result;
use rarebit::exec::cpu::Cpu;
use rarebit::methods::baselines::cads::Cads;
use rarebit::methods::baselines::judge::{Judge, Score};
use rarebit::methods::baselines::search::{self, Searched};
use rarebit::methods::baselines::sgms::Sgms;
use rarebit::methods::{ImageMethod, PlannedMethod, Request};
use rarebit::metrics::denoising_loss;
use rarebit::optimize::search::ladder::{EpsilonGreedy, Evolution, Search, ZeroOrder};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{Generator, Image, Job, Loaded, Settings};
use rarebit::program::DType;

const PROMPT: &str = "a red star on a dark blue background";

fn open(name: &str) -> Pipeline {
    Golden::open(name).pipeline()
}

fn settings(pipeline: &Pipeline, steps: usize) -> Settings {
    images(pipeline, steps, 3.0, DType::F32)
}

fn planned<'p>(
    pipeline: &'p Pipeline,
    settings: &Settings,
    method: &dyn ImageMethod,
    batch: usize,
) -> Box<dyn PlannedMethod + 'p> {
    let prompts = vec![PROMPT; batch];
    let request = Request { settings, batch, prompts: &prompts, memory: None };
    method.plan(pipeline, &Cpu::<f32>::new(), &request).unwrap()
}

fn with(pipeline: &Pipeline, settings: Settings, method: &dyn ImageMethod, jobs: &[Job]) -> Vec<Image> {
    let planned = planned(pipeline, &settings, method, jobs.len());
    planned.load(&mut Cpu::<f32>::new()).unwrap().run(jobs, &mut |_| Ok(())).unwrap()
}

fn with_cads(pipeline: &Pipeline, settings: Settings, cads: &Cads, jobs: &[Job]) -> Vec<Image> {
    with(pipeline, settings, cads, jobs)
}

fn with_sgms(pipeline: &Pipeline, settings: Settings, sgms: Sgms, jobs: &[Job]) -> Vec<Image> {
    with(pipeline, settings, &sgms, jobs)
}

fn plainly(pipeline: &Pipeline, settings: Settings, jobs: &[Job]) -> Vec<Image> {
    plain(pipeline, &mut Cpu::<f32>::new(), settings, jobs)
}

#[test]
fn cads_without_noise_is_plain_sampling() {
    for name in ["tiny-sd1", "tiny-sdxl"] {
        let pipeline = open(name);
        let expected = plainly(&pipeline, settings(&pipeline, 5), &[job(PROMPT, 3)]);
        let run = |cads: &Cads| with_cads(&pipeline, settings(&pipeline, 5), cads, &[job(PROMPT, 3)]);
        // Time never passes 1, so that the states are clean at every step.
        let clean = Cads { tau1: 0.999, tau2: 1.0, ..Cads::default() };
        let late = Cads { tau1: 0.5, tau2: 0.9, ..Cads::default() };
        let last_clean = run(&Cads { scale: 0.0, ..clean });
        assert!(last_clean[0].latents != expected[0].latents, "the first step, at time 1, has no condition");
        let noisy = run(&late);
        assert!(noisy[0].latents != expected[0].latents && noisy[0].latents.iter().all(|x| x.is_finite()));
        assert!(run(&late)[0].latents == noisy[0].latents, "the same twice");
    }
}

#[test]
fn cads_corrupts_each_image_alone() {
    let pipeline = open("tiny-sdxl");
    let all = Cads { negatives: true, dynamic_guidance: true, psi: 0.7, ..Cads::default() };
    let jobs = [job(PROMPT, 3), job("a blue ring", 8)];
    let together = with_cads(&pipeline, settings(&pipeline, 6), &all, &jobs);
    for (alone, of_batch) in jobs.iter().zip(&together) {
        let alone = with_cads(&pipeline, settings(&pipeline, 6), &all, std::slice::from_ref(alone));
        assert!(alone[0].latents == of_batch.latents);
    }
    let differ = |cads: Cads| {
        let images = with_cads(&pipeline, settings(&pipeline, 6), &cads, &jobs);
        assert!(images[0].latents != together[0].latents);
    };
    differ(Cads { negatives: false, ..all });
    differ(Cads { dynamic_guidance: false, ..all });
    differ(Cads { psi: 1.0, ..all });
}

#[test]
fn dynamic_guidance_lowers_the_weight_alone() {
    // Where the noise has no deviation to bring back, only the weight is left: at γ = 0 it is that of the unconditional branch.
    let pipeline = open("tiny-sd1");
    let cads = Cads { tau1: 0.0, tau2: 0.001, dynamic_guidance: true, ..Cads::default() };
    let found = with_cads(&pipeline, settings(&pipeline, 4), &cads, &[job(PROMPT, 3)]);
    let expected = plainly(&pipeline, images(&pipeline, 4, 0.0, DType::F32), &[job(PROMPT, 3)]);
    let off = found[0].latents.iter().zip(&expected[0].latents).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-4, "{off}");
}

#[test]
fn sgms_without_a_step_is_plain_sampling() {
    let pipeline = open("tiny-sd1");
    let expected = plainly(&pipeline, settings(&pipeline, 10), &[job(PROMPT, 3)]);
    let found = with_sgms(&pipeline, settings(&pipeline, 10), Sgms { eta: 0.0, ..Sgms::default() }, &[job(PROMPT, 3)]);
    assert!(found[0].latents == expected[0].latents);
    let planned = |eta: f64, guided: bool| {
        let sgms = Sgms { eta, guided, ..Sgms::default() };
        planned(&pipeline, &settings(&pipeline, 10), &sgms, 2).nfe()
    };
    assert_eq!((planned(0.0, false).forward, planned(0.0, false).backward), (40, 0));
    // Steps 0 and 5: two forwards and one backward each, per image.
    assert_eq!((planned(1.0, false).forward, planned(1.0, false).backward), (40 + 2 * 2 * 2, 2 * 2));
    assert_eq!((planned(1.0, true).forward, planned(1.0, true).backward), (40 + 2 * 2 * 4, 2 * 2 * 2));
}

#[test]
fn sgms_steps_have_largest_number_one() {
    for name in ["tiny-sd1", "tiny-sd2"] {
        let pipeline = open(name);
        // One step of all: the step is added to plain DDIM's result and nothing follows.
        let sgms = Sgms { eta: 0.5, variance: false, every: 1, ..Sgms::default() };
        let jobs = [job(PROMPT, 3), job("a blue ring", 8)];
        let found = with_sgms(&pipeline, settings(&pipeline, 1), sgms, &jobs);
        let expected = plainly(&pipeline, settings(&pipeline, 1), &jobs);
        for (found, expected) in found.iter().zip(&expected) {
            let steps = found.latents.iter().zip(&expected.latents).map(|(a, b)| (a - b).abs());
            let largest = steps.fold(0.0, f32::max);
            assert!((largest - 0.5).abs() < 1e-3, "{name}: {largest}");
        }
    }
}

#[test]
fn sgms_guides_each_image_alone() {
    let pipeline = open("tiny-sdxl");
    let sgms = Sgms { eta: 2.0, every: 2, ..Sgms::default() };
    let jobs = [job(PROMPT, 3), job("a blue ring", 8)];
    let together = with_sgms(&pipeline, settings(&pipeline, 6), sgms, &jobs);
    for (alone, of_batch) in jobs.iter().zip(&together) {
        let alone = with_sgms(&pipeline, settings(&pipeline, 6), sgms, std::slice::from_ref(alone));
        assert!(alone[0].latents == of_batch.latents);
    }
    for other in [Sgms { normalised: false, ..sgms }, Sgms { ratio: 0.4, ..sgms }, Sgms { t_mid: 0.6, ..sgms }] {
        let images = with_sgms(&pipeline, settings(&pipeline, 6), other, &jobs);
        assert!(images[0].latents != together[0].latents, "{other:?}");
    }
}

/// The sum of an image's latents.
struct Sum;

fn score_of(image: &Image) -> f64 {
    f64::from(image.latents.iter().sum::<f32>())
}

impl Judge for Sum {
    fn forwards(&self) -> usize {
        0
    }

    fn score(&mut self, _images: &mut Loaded<'_, '_>, _jobs: &[Job], made: &[Image]) -> Result<Vec<f64>> {
        Ok(made.iter().map(score_of).collect())
    }
}

#[test]
fn the_best_of_n_is_the_best_of_their_seeds() {
    let pipeline = open("tiny-sd1");
    let mut cpu = Cpu::<f32>::new();
    let generator = Generator::plan(&pipeline, &cpu, settings(&pipeline, 4), 2).unwrap();
    let mut loaded = generator.load(&mut cpu).unwrap();
    let jobs = [job(PROMPT, 3), job("a blue ring", 8)];
    let chosen = search::run(&mut loaded, &Search::BestOf, 3, &jobs, &mut Sum, &mut |_| Ok(())).unwrap();
    for (job_of, chosen) in jobs.iter().zip(&chosen) {
        let candidates: Vec<Image> = (0..3)
            .map(|index| {
                let seed = search::candidate(job_of.seed, 3, index);
                plainly(&pipeline, settings(&pipeline, 4), &[job(&job_of.prompt, seed)]).remove(0)
            })
            .collect();
        let best = candidates.iter().map(score_of).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(chosen.score, best);
        let alone = plainly(&pipeline, settings(&pipeline, 4), std::slice::from_ref(&chosen.candidate)).remove(0);
        assert!(chosen.outcome.latents == alone.latents, "its seed makes it alone");
    }
    assert!(search::run(&mut loaded, &Search::BestOf, 0, &jobs, &mut Sum, &mut |_| Ok(())).is_err());
}

fn searches() -> [Search; 3] {
    let evolution = Evolution { population: 4, ..Evolution::default() };
    let (zero_order, epsilon_greedy) = (ZeroOrder::default(), EpsilonGreedy::default());
    [Search::ZeroOrder(zero_order), Search::EpsilonGreedy(epsilon_greedy), Search::Evolution(evolution)]
}

#[test]
fn a_search_begins_with_the_plain_image_and_each_image_is_searched_alone() {
    let pipeline = open("tiny-sd1");
    let jobs = [job(PROMPT, 3), job("a blue ring", 8)];
    let plain = plainly(&pipeline, settings(&pipeline, 4), &jobs);
    let search = |search: &Search, n: usize, jobs: &[Job]| {
        let mut cpu = Cpu::<f32>::new();
        let generator = Generator::plan(&pipeline, &cpu, settings(&pipeline, 4), jobs.len()).unwrap();
        let mut loaded = generator.load(&mut cpu).unwrap();
        search::run(&mut loaded, search, n, jobs, &mut Sum, &mut |_| Ok(())).unwrap()
    };
    for of in searches() {
        let first = search(&of, 1, &jobs);
        assert!(first.iter().zip(&plain).all(|(found, plain)| found.outcome.latents == plain.latents), "{of:?}");
        let found = search(&of, 12, &jobs);
        for ((job_of, found), plain) in jobs.iter().zip(&found).zip(&plain) {
            assert!(found.index > 0 && found.score > score_of(plain), "{of:?}: better than the plain image");
            assert_eq!(found.score, score_of(&found.outcome));
            let alone = search(&of, 12, std::slice::from_ref(job_of)).remove(0);
            assert_eq!((alone.index, alone.score), (found.index, found.score), "{of:?}");
            assert!(alone.outcome.latents == found.outcome.latents);
            let again = plainly(&pipeline, settings(&pipeline, 4), std::slice::from_ref(&found.candidate)).remove(0);
            assert!(again.latents == found.outcome.latents, "its job makes it alone");
            let noise = &found.candidate.draws[0];
            let variance = noise.iter().map(|x| x * x).sum::<f32>() / noise.len() as f32;
            assert!((variance - 1.0).abs() < 0.5, "{of:?}: {variance}");
        }
    }
}

/// Noise from elsewhere is what a search begins with; later draws of a noisy sampler stay as they are given.
#[test]
fn a_search_begins_with_the_noise_it_is_given() {
    let pipeline = open("tiny-sd1");
    let mut noisy = settings(&pipeline, 3);
    noisy.sampler.eta = 0.7;
    let of = plainly(&pipeline, noisy.clone(), &[job(PROMPT, 5)]).remove(0);
    let size = of.latents.len();
    let draws: Vec<Vec<f32>> = (0..2u64).map(|draw| normal_of(90 + draw, size)).collect();
    let given = Job { draws, ..job(PROMPT, 5) };
    let plain = plainly(&pipeline, noisy.clone(), std::slice::from_ref(&given)).remove(0);
    assert!(plain.latents != of.latents);
    let mut cpu = Cpu::<f32>::new();
    let mut loaded = Generator::plan(&pipeline, &cpu, noisy, 1).unwrap().load(&mut cpu).unwrap();
    for search in searches() {
        let run = |n: usize, loaded: &mut Loaded<'_, '_>| {
            search::run(loaded, &search, n, std::slice::from_ref(&given), &mut Sum, &mut |_| Ok(())).unwrap().remove(0)
        };
        assert!(run(1, &mut loaded).outcome.latents == plain.latents, "{search:?}");
        let found = run(9, &mut loaded);
        assert!(found.candidate.draws.len() == 2 && found.candidate.draws[1] == given.draws[1]);
    }
}

fn normal_of(seed: u64, len: usize) -> Vec<f32> {
    let mut noise = vec![0.0; len];
    rarebit::sampler::normal(seed, 0, &mut noise);
    noise
}

#[test]
fn a_search_costs_what_best_of_n_costs() {
    let pipeline = open("tiny-sd1");
    let nfe = |search: Search, by: Score, batch: usize| {
        let method = Searched { search, n: 6, by: Box::new(by) };
        let planned = planned(&pipeline, &settings(&pipeline, 4), &method, batch);
        assert_eq!((planned.progress_units(), planned.nfe().backward), (6 * 4, 0));
        planned.nfe().forward
    };
    for search in [&[Search::BestOf][..], &searches()].concat() {
        // Six candidates of four steps with two branches, and eight noise levels each.
        assert_eq!(nfe(search, Score::DenoisingLoss, 2), 2 * 6 * (4 * 2 + 8), "{search:?}");
    }
}

#[test]
fn the_denoising_loss_tells_noise_from_images() {
    let pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    let score = |steps: usize| {
        let mut cpu = Cpu::<f32>::new();
        let jobs = [job("a red star", 3), job("a red star", 4)];
        let generator = Generator::plan(&pipeline, &cpu, settings(&pipeline, steps), 2).unwrap();
        let planned = denoising_loss::Planner::plan(&pipeline, &cpu, &generator, DType::F32, 8).unwrap();
        assert_eq!(planned.nfe().forward, 16);
        let mut loaded = generator.load(&mut cpu).unwrap();
        let scorer = planned.load(&mut loaded).unwrap();
        loaded.run(&jobs, &mut |_| Ok(())).unwrap();
        let scores = scorer.score(&mut loaded, &jobs).unwrap();
        assert_eq!(scores, scorer.score(&mut loaded, &jobs).unwrap(), "the grid is fixed");
        scores
    };
    // Two steps leave a blur that the model itself finds unlikely.
    let (finished, unfinished) = (score(20), score(2));
    println!("finished {finished:?}, unfinished {unfinished:?}");
    assert!(finished.iter().zip(&unfinished).all(|(a, b)| a < b));
}
