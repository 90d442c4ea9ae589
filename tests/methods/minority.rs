//! What MinorityPrompt must leave as it is, and what it must change: steps, prompts, seeds, batches, memory.

use crate::common::golden::Golden;
use crate::common::minority::{Outcome, images, job, looking, plain, run, settings, token};
use rarebit::data::textual_inversion::LearnedToken;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::methods::minority::{Convention, Renoise};
use rarebit::methods::minority::{Minority, Schedule, Settings};
use rarebit::optimize::objective::{self, At, Condition, Nfe, Objective, StepContext, minority, repulsion};
use rarebit::optimize::variable::token::{Init, PoolAt, TokenSettings};
use rarebit::optimize::variable::{ROWS, Variable, VariableSpec};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::conditioning::Branch;
use rarebit::pipeline::generate::Image;
use rarebit::pipeline::programs::Sizes;
use rarebit::plan::plan;
use rarebit::program::DType;
use rarebit::text::Position;

const FAMILIES: [&str; 3] = ["tiny-sd1", "tiny-sd2", "tiny-sdxl"];
const PROMPT: &str = "a red star on a dark blue background";

fn open(name: &str) -> Pipeline {
    Golden::open(name).pipeline()
}

fn cpu() -> Cpu<f32> {
    Cpu::<f32>::new()
}

fn one(pipeline: &Pipeline, settings: Settings) -> Outcome {
    run(pipeline, &mut cpu(), settings, &[job(PROMPT, 3)], &[9])
}

fn distance(a: &Image, b: &Image) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = a.latents.iter().zip(&b.latents).map(|(a, b)| square(a - b)).sum();
    (error / b.latents.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

/// Nothing is optimised but every step reads what would be.
fn fixed(pipeline: &Pipeline, variable: Variable) -> Settings {
    let s = settings(pipeline, DType::F32);
    Settings { schedule: Schedule { iterations: 0, t_lo: 0.0, ..s.schedule }, variable, ..s }
}

fn token_variable(init: Init) -> Variable {
    Variable::Token(token(init))
}

#[test]
fn without_optimised_steps_it_is_plain_sampling() {
    for name in FAMILIES {
        let pipeline = open(name);
        let s = settings(&pipeline, DType::F32);
        let off = Settings { schedule: Schedule { t_lo: 1.0, ..s.schedule }, ..s };
        let found = &one(&pipeline, off).images[0];
        let expected = &plain(&pipeline, &mut cpu(), images(&pipeline, 4, 3.0, DType::F32), &[job(PROMPT, 3)])[0];
        assert!(found.latents == expected.latents && found.rgb == expected.rgb, "{name}");
        // Guidance 1 leaves a branch out that a weight beside 1 computes.
        let sampled = |guidance| images(&pipeline, 4, guidance, DType::F32);
        let at = |guidance| plain(&pipeline, &mut cpu(), sampled(guidance), &[job(PROMPT, 3)]).remove(0);
        assert!(distance(&at(1.0), &at(1.0 + 1e-12)) < 1e-5, "{name}");
    }
}

#[test]
fn a_word_that_is_not_optimised_is_a_word_of_the_prompt() {
    for name in FAMILIES {
        let pipeline = open(name);
        let with = |pool_at: PoolAt| {
            let token = TokenSettings { pool_at, ..token(Init::Word("green".into())) };
            one(&pipeline, fixed(&pipeline, Variable::Token(token))).images.remove(0)
        };
        let prompt = format!("{PROMPT} green");
        let expected = &plain(&pipeline, &mut cpu(), images(&pipeline, 4, 3.0, DType::F32), &[job(&prompt, 3)])[0];
        let bare = &plain(&pipeline, &mut cpu(), images(&pipeline, 4, 3.0, DType::F32), &[job(PROMPT, 3)])[0];
        let (eos, placeholder) = (with(PoolAt::Eos), with(PoolAt::Placeholder));
        println!("{name}: {:.1e}, of the bare prompt {:.1e}", distance(&eos, expected), distance(bare, expected));
        assert!(distance(&eos, expected) < 1e-5 && distance(bare, expected) > 1e-4, "{name}");
        let same = distance(&placeholder, expected) < 1e-5;
        assert_eq!(same, name != "tiny-sdxl", "{name}: only SDXL reads pooled text");
    }
}

#[test]
fn a_token_that_is_not_optimised_is_a_learned_token() {
    for name in FAMILIES {
        let mut pipeline = open(name);
        let rows = token(Init::Unit).initial(&pipeline, &[4]).unwrap();
        let found = one(&pipeline, fixed(&pipeline, token_variable(Init::Given(rows.clone())))).images.remove(0);
        pipeline.learn(LearnedToken::new("<rare>", 1, rows)).unwrap();
        let prompt = format!("{PROMPT} <rare>");
        let expected = &plain(&pipeline, &mut cpu(), images(&pipeline, 4, 3.0, DType::F32), &[job(&prompt, 3)])[0];
        assert!(distance(&found, expected) < 1e-5, "{name}: {:e}", distance(&found, expected));
    }
}

fn nfe(pipeline: &Pipeline, settings: Settings, batch: usize) -> (Nfe, Vec<usize>) {
    let planned = Minority::plan(pipeline, &cpu(), settings, &vec![PROMPT; batch]).unwrap();
    (planned.nfe(), planned.optimized())
}

#[test]
fn every_iteration_costs_two_passes_each_way() {
    let pipeline = open("tiny-sd1");
    let counted = |iterations: usize, batch: usize| {
        let s = settings(&pipeline, DType::F32);
        let schedule = Schedule { iterations, t_lo: 0.4, ..s.schedule };
        nfe(&pipeline, Settings { schedule, ..s }, batch)
    };
    // 4 steps of two branches; steps 0 and 1 are optimised.
    assert_eq!(counted(0, 1), (Nfe { forward: 8, backward: 0 }, vec![0, 1]));
    assert_eq!(counted(3, 1).0, Nfe { forward: 8 + 2 * 3 * 2, backward: 2 * 3 * 2 });
    assert_eq!(counted(3, 2).0, Nfe { forward: 2 * (8 + 12), backward: 2 * 12 });
    let repelled = Settings { objectives: vec![repulsion()], ..settings(&pipeline, DType::F32) };
    assert_eq!(nfe(&pipeline, repelled, 2).0, Nfe { forward: 2 * (8 + 2), backward: 2 * 2 });
    let distilled = settings(&pipeline, DType::F32);
    let distilled = Settings { images: images(&pipeline, 4, 1.0, DType::F32), ..distilled };
    assert_eq!(nfe(&pipeline, distilled, 1).0, Nfe { forward: 4 + 4, backward: 4 }, "no unconditional branch");
}

#[test]
fn steps_are_optimised_above_the_gate() {
    let pipeline = open("tiny-sd1");
    let between = |steps: usize, t_lo: f64, t_hi: f64, every: usize| {
        let s = settings(&pipeline, DType::F32);
        let schedule = Schedule { t_lo, t_hi, every, renoise: Renoise::Annealed, ..s.schedule };
        nfe(&pipeline, Settings { images: images(&pipeline, steps, 3.0, DType::F32), schedule, ..s }, 1).1
    };
    let optimised = |steps: usize, t_lo: f64, every: usize| between(steps, t_lo, 1.0, every);
    assert_eq!(optimised(50, 0.9, 1), [0, 1, 2, 3, 4], "timesteps 981 to 901");
    assert_eq!(between(50, 0.9, 0.941, 1), [2, 3, 4], "timestep 941 is in");
    assert_eq!(optimised(50, 0.901, 1), [0, 1, 2, 3], "strictly above");
    assert_eq!(optimised(4, 0.0, 1), [0, 1, 2, 3]);
    assert_eq!(optimised(50, 0.9, 3), [0, 3]);
    assert_eq!(optimised(4, 1.0, 1), Vec::<usize>::new());
    // The defaults: Stable Diffusion's window, and where a model with another noise schedule has as much signal.
    let window = |pipeline: &Pipeline| {
        let s = Schedule::of(pipeline, Convention::Diffusers).unwrap();
        [s.t_lo, s.t_hi]
    };
    assert_eq!(window(&pipeline), [0.9, 1.0]);
    let [t_lo, t_hi] = window(&Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap());
    assert!(0.6 < t_lo && t_lo < t_hi && t_hi < 0.85, "{t_lo} to {t_hi}");
}

#[test]
fn the_second_level_stays_in_range() {
    let pipeline = open("tiny-sd1");
    let planned = |convention: Convention| {
        let s = settings(&pipeline, DType::F32);
        let schedule = Schedule { t_lo: 0.0, iterations: 1, convention, ..s.schedule };
        let s = Settings { images: images(&pipeline, 50, 3.0, DType::F32), schedule, ..s };
        Minority::plan(&pipeline, &cpu(), s, &[PROMPT]).map(|_| ())
    };
    let error = planned(Convention::Released).unwrap_err();
    assert!(error.to_string().contains("1018 of 1000") && error.exit_code() == 2, "{error}");
    planned(Convention::Diffusers).unwrap();
    let s = settings(&pipeline, DType::F32);
    let schedule = Schedule { t_lo: 0.0, iterations: 1, ..s.schedule };
    let found = one(&pipeline, Settings { images: images(&pipeline, 50, 3.0, DType::F32), schedule, ..s });
    assert_eq!(found.iterations.len(), 50);
    assert!(
        found
            .iterations
            .iter()
            .all(|i| (1.0..=999.0).contains(&i.at.unwrap().second_timestep) && i.score[0].is_finite())
    );
}

#[test]
fn later_steps_read_the_prompt_or_what_was_learned() {
    let pipeline = open("tiny-sd1");
    // All text states as the variable, left as they are: both ways are plain sampling.
    let unmoved = |base_prompt_after: bool| {
        let s = settings(&pipeline, DType::F32);
        let schedule = Schedule { base_prompt_after, lr: 0.0, ..s.schedule };
        one(&pipeline, Settings { schedule, variable: Variable::TextStates(Branch::Prompt), ..s }).images.remove(0)
    };
    let expected = &plain(&pipeline, &mut cpu(), images(&pipeline, 4, 3.0, DType::F32), &[job(PROMPT, 3)])[0];
    assert!(unmoved(true).latents == expected.latents && unmoved(false).latents == expected.latents);
    // A word read at the first step alone, or at all of them.
    let worded = |base_prompt_after: bool| {
        let s = fixed(&pipeline, token_variable(Init::Word("green".into())));
        let schedule = Schedule { t_lo: 0.7, base_prompt_after, ..s.schedule };
        one(&pipeline, Settings { schedule, ..s }).images.remove(0)
    };
    let always =
        &plain(&pipeline, &mut cpu(), images(&pipeline, 4, 3.0, DType::F32), &[job(&format!("{PROMPT} green"), 3)])[0];
    assert!(distance(&worded(false), always) < 1e-5);
    assert!(distance(&worded(true), always) > 1e-4 && distance(&worded(true), expected) > 1e-5);
}

#[test]
fn nothing_but_the_token_changes() {
    let pipeline = open("tiny-sdxl");
    let mut executor = cpu();
    let before = plain(&pipeline, &mut executor, images(&pipeline, 4, 3.0, DType::F32), &[job(PROMPT, 3)]);
    let found = run(&pipeline, &mut executor, settings(&pipeline, DType::F32), &[job(PROMPT, 3)], &[9]);
    // The executor keeps its weights.
    let after = plain(&pipeline, &mut executor, images(&pipeline, 4, 3.0, DType::F32), &[job(PROMPT, 3)]);
    assert!(before[0].latents == after[0].latents && before[0].rgb == after[0].rgb);
    assert!(found.images[0].latents != before[0].latents);
    assert!(found.gradient.iter().all(|rows| rows.iter().any(|g| *g != 0.0)), "both towers");
}

/// A variable's programs on the host's terms: rows of two prompts → context and pooled.
struct Towers {
    executor: Cpu<f32>,
    forward: rarebit::exec::ProgramId,
    backward: rarebit::exec::ProgramId,
    prefix: usize,
    widths: Vec<usize>,
}

const TWO: [&str; 2] = [PROMPT, "a red heart"];

fn towers(pipeline: &Pipeline) -> Towers {
    let settings = token(Init::White { scale: 1.0 });
    let token_batch = settings.tokenize(pipeline, &TWO).unwrap();
    let variable = Variable::Token(settings);
    let sizes = Sizes { batch: 2, height: 8, width: 8, tokens: pipeline.tokens() };
    let prefix = token_batch.prefix;
    let spec = VariableSpec { pipeline, dtype: DType::F32, sizes, variable: &variable, prefix };
    let mut executor = cpu();
    let programs = [spec.prefix(), spec.backward(), spec.forward()].map(|program| program.unwrap().unwrap());
    let [prefix, backward, forward] = programs.map(|program| {
        let planned = plan(program, |program, node| executor.workspace(program, node));
        executor.load(planned, &pipeline.model).unwrap()
    });
    token_batch.write(&mut executor, pipeline.tokens()).unwrap();
    executor.run(prefix).unwrap();
    let widths = pipeline.config.text.iter().map(|tower| tower.width).collect();
    Towers { executor, forward, backward, prefix: token_batch.prefix, widths }
}

impl Towers {
    fn read(&self, name: &str, len: usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        self.executor.read(name, DataMut::F32(&mut values)).unwrap();
        values
    }

    fn context(&mut self, pipeline: &Pipeline, rows: &[Vec<f32>]) -> Vec<f32> {
        for (name, rows) in ROWS.iter().zip(rows) {
            self.executor.write(name, Data::F32(rows)).unwrap();
        }
        self.executor.run(self.forward).unwrap();
        self.read("optimized.context", 2 * pipeline.tokens() * pipeline.config.unet.context_width)
    }

    fn gradient(&mut self, pipeline: &Pipeline, context: f32, pooled: f32) -> Vec<Vec<f32>> {
        let len = 2 * pipeline.tokens() * pipeline.config.unet.context_width;
        let wave: Vec<f32> = (0..len).map(|i| context * ((i * 37 % 101) as f32 / 101.0 - 0.5)).collect();
        self.executor.write("d.optimized.context", Data::F32(&wave)).unwrap();
        if let (2.., Some(width)) = (self.widths.len(), pipeline.config.text.last().unwrap().projection) {
            let wave: Vec<f32> = (0..2 * width).map(|i| pooled * ((i * 13 % 29) as f32 / 29.0 - 0.5)).collect();
            self.executor.write("d.optimized.pooled", Data::F32(&wave)).unwrap();
        }
        self.executor.run(self.backward).unwrap();
        let widths = self.widths.clone();
        ROWS.iter().zip(widths).map(|(name, width)| self.read(&format!("d.{name}"), 2 * width)).collect()
    }
}

#[test]
fn rows_before_the_token_are_the_prompts() {
    for name in FAMILIES {
        let pipeline = open(name);
        let mut towers = towers(&pipeline);
        let (width, tokens) = (pipeline.config.unet.context_width, pipeline.tokens());
        let rows = |seed| token(Init::White { scale: 1.0 }).initial(&pipeline, &[seed, seed + 1]).unwrap();
        let [one, other] = [1, 5].map(|seed| towers.context(&pipeline, &rows(seed)));
        let mut cpu = cpu();
        let mut networks = rarebit::pipeline::networks::Networks::new(&pipeline, &mut cpu, DType::F32);
        for (image, prompt) in TWO.iter().enumerate() {
            let encoded = pipeline.tokenize(prompt).unwrap();
            let ids: Vec<&[i32]> = encoded.iter().map(|encoded| &encoded.ids[..]).collect();
            let (plain, _) = networks.text(&ids, encoded.last().unwrap().eos).unwrap();
            let at = encoded[0].eos;
            let own = |context: &[f32]| context[image * tokens * width..][..tokens * width].to_vec();
            let (one, other) = (own(&one), own(&other));
            assert!(towers.prefix <= at);
            assert_eq!(one[..at * width], other[..at * width], "{name}: rows before the token do not move");
            let off = one[..at * width].iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 2e-5, "{name}: {off}");
            for row in at..tokens {
                assert!(one[row * width..][..width] != other[row * width..][..width], "{name}: row {row} moves");
            }
        }
    }
}

#[test]
fn images_own_their_tokens() {
    for name in FAMILIES {
        let pipeline = open(name);
        let mut towers = towers(&pipeline);
        let rows = token(Init::White { scale: 1.0 }).initial(&pipeline, &[1, 2]).unwrap();
        towers.context(&pipeline, &rows);
        let whole = towers.gradient(&pipeline, 1.0, 1.0);
        // Only the first image has a cotangent.
        let len = pipeline.tokens() * pipeline.config.unet.context_width;
        let mut first = vec![0.0; 2 * len];
        first[..len].fill(0.1);
        towers.executor.write("d.optimized.context", Data::F32(&first)).unwrap();
        if let (2.., Some(width)) = (towers.widths.len(), pipeline.config.text.last().unwrap().projection) {
            towers.executor.write("d.optimized.pooled", Data::F32(&vec![0.0; 2 * width])).unwrap();
        }
        towers.executor.run(towers.backward).unwrap();
        for (tower, width) in towers.widths.clone().into_iter().enumerate() {
            let rows = towers.read(&format!("d.{}", ROWS[tower]), 2 * width);
            assert!(rows[..width].iter().any(|g| *g != 0.0) && rows[width..].iter().all(|g| *g == 0.0), "{name}");
            assert!(whole[tower][width..].iter().any(|g| *g != 0.0));
        }
    }
}

#[test]
fn pooled_text_leads_to_the_second_tower() {
    let pipeline = open("tiny-sdxl");
    let mut towers = towers(&pipeline);
    let rows = token(Init::White { scale: 1.0 }).initial(&pipeline, &[1, 2]).unwrap();
    towers.context(&pipeline, &rows);
    let (both, detached) = (towers.gradient(&pipeline, 1.0, 1.0), towers.gradient(&pipeline, 1.0, 0.0));
    assert!(both[0] == detached[0] && both[1] != detached[1]);
    assert!(detached.iter().all(|rows| rows.iter().any(|g| *g != 0.0)));
    let token_batch = |pool_at| TokenSettings { pool_at, ..token(Init::Unit) }.tokenize(&pipeline, &[PROMPT]).unwrap();
    let (eos, placeholder) = (token_batch(PoolAt::Eos), token_batch(PoolAt::Placeholder));
    let at = pipeline.tokenize(PROMPT).unwrap()[1].eos as i32;
    assert_eq!((placeholder.pool_at[0], eos.pool_at[0]), (at, at + 1));
}

#[test]
fn long_prompts_make_room() {
    let pipeline = open("tiny-sdxl");
    let long = "red star ".repeat(40);
    for (rows, position) in [(1, Position::End), (3, Position::End), (2, Position::Start)] {
        let settings = TokenSettings { rows, position, ..token(Init::Unit) };
        let token_batch = settings.tokenize(&pipeline, &[&long, PROMPT]).unwrap();
        for (tower, config) in pipeline.config.text.iter().enumerate() {
            for image in 0..2 {
                let ids = &token_batch.ids[tower][image * pipeline.tokens()..][..pipeline.tokens()];
                let first = (config.vocab_size + image * rows) as i32;
                let own: Vec<i32> = ids.iter().copied().filter(|id| *id >= config.vocab_size as i32).collect();
                assert_eq!(own, (first..first + rows as i32).collect::<Vec<_>>());
                assert!(ids.contains(&pipeline.tokenizers[tower].end()));
            }
        }
        assert!(!token_batch.truncated[0].is_empty() && token_batch.truncated[1].is_empty());
    }
    let found = run(&pipeline, &mut cpu(), settings(&pipeline, DType::F32), &[job(&long, 3)], &[9]);
    assert!(found.gradient.iter().all(|rows| rows.iter().any(|g| *g != 0.0)), "the token is read");
    let whole = TokenSettings { rows: pipeline.tokens() - 1, ..token(Init::Unit) };
    assert_eq!(whole.tokenize(&pipeline, &[PROMPT]).unwrap_err().exit_code(), 2);
}

#[test]
fn the_objective_knows_no_guidance() {
    let pipeline = open("tiny-sd1");
    let first = |guidance: f64, negative: Option<&str>| {
        let variable = token_variable(Init::White { scale: 1.0 });
        let s = looking(&pipeline, DType::F32, minority(objective::Minority::default()), variable);
        let s = Settings { images: images(&pipeline, 4, guidance, DType::F32), ..s };
        let mut job = job(PROMPT, 3);
        job.negative = negative.map(str::to_string);
        run(&pipeline, &mut cpu(), s, &[job], &[9]).iterations[0].score[0]
    };
    let expected = first(3.0, None);
    assert!([first(7.5, None), first(3.0, Some("blue")), first(1.0, None)].iter().all(|j| *j == expected));
}

#[test]
fn a_batch_has_the_bits_of_its_images() {
    for (name, objective) in FAMILIES.into_iter().zip([false, false, true]) {
        let pipeline = open(name);
        let make = |jobs: &[(&str, u64)]| {
            let mut s = settings(&pipeline, DType::F32);
            s.variable = Variable::Token(TokenSettings { rows: 2, ..token(Init::Gaussian { scale: 0.5 }) });
            if objective {
                s.objectives = vec![minority(objective::Minority { guided: true, ..Default::default() })];
            }
            let seeds: Vec<u64> = jobs.iter().map(|(_, seed)| seed + 100).collect();
            let jobs: Vec<_> = jobs.iter().map(|(prompt, seed)| job(prompt, *seed)).collect();
            run(&pipeline, &mut cpu(), s, &jobs, &seeds)
        };
        // Prompts of one length: the rows before the token are then as many in the batch as alone.
        let two = [("a red star", 5), ("a blue ring", 6)];
        let together = make(&two);
        for (index, alone) in two.iter().map(|one| make(&[*one])).enumerate() {
            assert!(alone.images[0].latents == together.images[index].latents, "{name} {index}");
            for (rows, of_batch) in alone.learned.iter().zip(&together.learned) {
                assert!(*rows == of_batch[index * rows.len()..][..rows.len()], "{name} {index}");
            }
        }
        // Of other lengths too, although the batch then encodes rows again that an image alone would not.
        let mixed = [("a red star", 5), (PROMPT, 6)];
        let together = make(&mixed);
        for (index, alone) in mixed.iter().map(|one| make(&[*one])).enumerate() {
            assert!(alone.images[0].latents == together.images[index].latents, "{name} {index}");
        }
    }
}

#[test]
fn seeds_decide_everything() {
    let pipeline = open("tiny-sd2");
    // The latents at the first step, which nothing has touched.
    let make = |seed: u64, opt_seed: u64, lr: f64| {
        let s = settings(&pipeline, DType::F32);
        let s = Settings { schedule: Schedule { lr, ..s.schedule }, ..s };
        run(&pipeline, &mut cpu(), s, &[job(PROMPT, seed)], &[opt_seed])
    };
    let (one, again, other) = (make(3, 9, 0.002), make(3, 9, 0.002), make(3, 10, 0.002));
    assert!(one.images[0].latents == again.images[0].latents && one.learned == again.learned);
    assert!(one.images[0].latents != other.images[0].latents);
    // With nothing learned the other seed leaves the image alone.
    let untouched = |opt_seed: u64| {
        let s = settings(&pipeline, DType::F32);
        let s = Settings {
            schedule: Schedule { lr: 0.0, ..s.schedule },
            variable: Variable::TextStates(Branch::Prompt),
            ..s
        };
        run(&pipeline, &mut cpu(), s, &[job(PROMPT, 3)], &[opt_seed])
    };
    let (one, other) = (untouched(9), untouched(10));
    assert!(one.images[0].latents == other.images[0].latents, "the starting noise is not the optimiser's");
    assert!(one.iterations[0].score != other.iterations[0].score);
}

#[test]
fn a_batch_as_large_as_the_iterations_is_optimised_throughout() {
    // The released repulsion stops after its first iteration where the batch is as large as K.
    let pipeline = open("tiny-sd1");
    let s = settings(&pipeline, DType::F32);
    let s = Settings { schedule: Schedule { iterations: 3, ..s.schedule }, objectives: vec![repulsion()], ..s };
    let jobs: Vec<_> = (0..3).map(|seed| job(PROMPT, seed)).collect();
    let found = run(&pipeline, &mut cpu(), s, &jobs, &[1, 2, 3]);
    assert!(found.iterations[1].moved.iter().zip(&found.iterations[2].moved).all(|(a, b)| a != b));
    let alone = Settings { objectives: vec![repulsion()], ..settings(&pipeline, DType::F32) };
    let refused = Minority::plan(&pipeline, &cpu(), alone, &[PROMPT]).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("two images"), "{refused}");
}

#[test]
fn a_budget_holds_one_set_of_activations() {
    let pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    let planned = |objective: Objective<'static>, budget: Option<usize>| {
        let s = settings(&pipeline, DType::F32);
        Minority::plan(&pipeline, &cpu(), Settings { objectives: vec![objective], budget, ..s }, &[PROMPT]).unwrap()
    };
    let single = Objective::new("single", |s: &mut StepContext<'_>| {
        let latents = s.latents;
        let first = s.predict(latents, At::T1, Condition::Optimized);
        let f = s.estimate(first);
        s.squares(f)
    });
    let arena = |minority: &Minority<'_>| minority.footprint().arena_bytes;
    let one = arena(&planned(single, None));
    let both = planned(minority(objective::Minority::default()), None);
    let budget = one + one / 10;
    let tight = planned(minority(objective::Minority::default()), Some(budget));
    println!("one set {one}, both {}, under a budget {}", arena(&both), arena(&tight));
    assert!(arena(&both) > budget && arena(&tight) <= budget);
    let iterations = 2;
    assert_eq!(tight.nfe().forward, both.nfe().forward + iterations, "one more forward an iteration");
    assert_eq!(tight.nfe().backward, both.nfe().backward);
    // No gradient of a weight is among the programs' results, and no moments of one.
    for program in tight.programs() {
        for (name, id) in &program.program.outputs {
            let len = program.program.value(*id).len();
            let largest = 2 * pipeline.tokens() * 4096;
            assert!(!name.contains('/') && len < largest, "'{}' gives '{name}', {len} numbers", program.program.name);
        }
    }
    // The bits are the same.
    let run_with = |budget: Option<usize>| {
        let s = settings(&pipeline, DType::F32);
        one_image(&pipeline, Settings { budget, ..s })
    };
    assert!(run_with(None) == run_with(Some(budget)));
}

fn one_image(pipeline: &Pipeline, settings: Settings) -> Vec<f32> {
    one(pipeline, settings).images.remove(0).latents
}

#[test]
fn first_embeddings_have_the_tables_moments() {
    let pipeline = open("tiny-sd1");
    let spread = rarebit::optimize::variable::token::spread(&pipeline, 0).unwrap();
    let seeds: Vec<u64> = (0..400).collect();
    let std = |init: Init| {
        let rows = token(init).initial(&pipeline, &seeds).unwrap().remove(0);
        let mean = rows.iter().map(|x| f64::from(*x)).sum::<f64>() / rows.len() as f64;
        (rows.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / rows.len() as f64).sqrt()
    };
    let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 0.1, "{found}, not {expected}");
    close(std(Init::White { scale: 1.0 }), spread);
    close(std(Init::White { scale: 2.0 }), 2.0 * spread);
    close(std(Init::Gaussian { scale: 1.0 }), spread);
    close(std(Init::RandomWord), spread);
    close(std(Init::Unit), 1.0);
    let rows = |init: Init| token(init).initial(&pipeline, &[1, 1, 2]).unwrap().remove(0);
    let (random, width) = (rows(Init::RandomWord), pipeline.config.text[0].width);
    assert!(random[..width] == random[width..2 * width] && random[..width] != random[2 * width..]);
    let word = token(Init::Word("star".into())).initial(&pipeline, &[1]).unwrap();
    assert_eq!(word[0].len(), width);
    let error = token(Init::Word("extraordinarily".into())).initial(&pipeline, &[1]).unwrap_err();
    assert!(error.to_string().contains("'extraordinarily'") && error.exit_code() == 2, "{error}");
}
