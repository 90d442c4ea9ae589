//! The gradients of MinorityPrompt: central differences in f64, its closed form against the two terms it stands for, Adam.

use crate::common::golden::Golden;
use crate::common::minority::{Outcome, job, looking, relative, run, run_with, settings, token};
use rarebit::exec::cpu::Cpu;
use rarebit::methods::minority::Settings;
use rarebit::optimize::objective::{At, Condition, Loss, Minority, Objective, StepContext, minority, repulsion};
use rarebit::optimize::variable::Variable;
use rarebit::optimize::variable::token::Init;
use rarebit::pipeline::Pipeline;
use rarebit::program::{DType, ValueId};

const FAMILIES: [&str; 3] = ["tiny-sd1", "tiny-sd2", "tiny-sdxl"];
const PROMPT: &str = "a red star on a dark blue background";

fn norm(s: &mut StepContext<'_>, x: ValueId) -> ValueId {
    let squares = s.squares(x);
    s.root(squares)
}

fn minus(s: &mut StepContext<'_>, a: ValueId, b: ValueId) -> ValueId {
    let b = s.b.affine(b, -1.0, 0.0);
    s.b.add(a, b)
}

/// The two estimates of the clean image, as the paper has them: `f` and `g`. `cut` blocks the gradient where `f` is noised.
fn estimates(s: &mut StepContext<'_>, cut: bool) -> (ValueId, ValueId) {
    let latents = s.latents;
    let first = s.predict(latents, At::T1, Condition::Optimized);
    let f = s.estimate(first);
    let n = s.draw();
    let noised = if cut { s.b.detach(f) } else { f };
    let noised = s.renoise(noised, n);
    let second = s.predict(noised, At::T2, Condition::Prompt);
    (f, s.estimate(second))
}

/// `‖sg(f) − g‖ + λ ‖f − sg(g)‖`, term by term.
fn two_terms(lambda: f64, cut: bool) -> Objective<'static> {
    Objective::new("two terms", move |s: &mut StepContext<'_>| {
        let (f, g) = estimates(s, cut);
        let [f_fixed, g_fixed] = [f, g].map(|x| s.b.detach(x));
        let first = minus(s, f_fixed, g);
        let second = minus(s, f, g_fixed);
        let (first, second) = (norm(s, first), norm(s, second));
        let second = s.b.affine(second, lambda, 0.0);
        let sum = s.b.add(first, second);
        s.raise(sum)
    })
}

/// An evaluation of the objective at the first step from given rows, in f64: J and its gradient.
fn evaluate(pipeline: &Pipeline, objective: Objective<'static>, rows: &[Vec<f32>]) -> (f64, Vec<Vec<f64>>) {
    let variable = Variable::Token(token(Init::Given(rows.to_vec())));
    let settings = looking(pipeline, DType::F64, objective, variable);
    let found = run(pipeline, &mut Cpu::<f64>::new(), settings, &[job(PROMPT, 3)], &[9]);
    (found.iterations[0].score[0], found.gradient)
}

fn rows(pipeline: &Pipeline, seed: u64) -> Vec<Vec<f32>> {
    token(Init::White { scale: 1.0 }).initial(pipeline, &[seed]).unwrap()
}

fn flat(rows: &[Vec<f64>]) -> Vec<f64> {
    rows.concat()
}

#[test]
fn gradients_are_central_differences() {
    for name in FAMILIES {
        let pipeline = Golden::open(name).pipeline();
        let begin = rows(&pipeline, 1);
        let (_, gradient) = evaluate(&pipeline, minority(Minority::default()), &begin);
        // Along the gradient and along another direction, in every tower.
        for (tower, slope) in gradient.iter().enumerate() {
            let length = slope.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(length > 0.0, "{name}: no gradient to tower {tower}");
            let along: Vec<f64> = slope.iter().map(|x| x / length).collect();
            let across: Vec<f64> = (0..slope.len()).map(|i| ((i * 7 + 3) % 11) as f64 / 11.0 - 0.5).collect();
            for (what, direction) in [("along", along), ("across", across)] {
                // Rows are f32 on the way in: the step that is taken is the one that counts.
                let h = 1e-3;
                let moved = |sign: f64| {
                    let mut moved = begin.clone();
                    moved[tower].iter_mut().zip(&direction).for_each(|(x, d)| *x += (sign * h * d) as f32);
                    moved
                };
                let (up, down) = (moved(1.0), moved(-1.0));
                let value = |rows: &[Vec<f32>]| evaluate(&pipeline, minority(Minority::default()), rows).0;
                let expected = value(&up) - value(&down);
                let steps = up[tower].iter().zip(&down[tower]).map(|(a, b)| f64::from(*a) - f64::from(*b));
                // J is reported as (1 + λ) ‖f − g‖, and at λ = 1 its gradient with stop-gradients is that of ‖f − g‖.
                let found: f64 = 2.0 * steps.zip(slope).map(|(step, slope)| step * slope).sum::<f64>();
                let error = (found - expected).abs() / expected.abs().max(1e-2 * 2.0 * h * length);
                println!("{name} tower {tower} {what}: {found:.6e} for {expected:.6e}, error {error:.1e}");
                assert!(error < 1e-3, "{name} tower {tower} {what}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn the_closed_form_is_the_two_terms() {
    for name in FAMILIES {
        let pipeline = Golden::open(name).pipeline();
        let begin = rows(&pipeline, 2);
        let mut at_one = vec![];
        for lambda in [0.0, 0.5, 1.0, 2.0] {
            let closed = evaluate(&pipeline, minority(Minority { lambda, ..Minority::default() }), &begin);
            let terms = evaluate(&pipeline, two_terms(lambda, false), &begin);
            let error = relative(&flat(&closed.1), &flat(&terms.1));
            println!("{name} λ {lambda}: J {:.9} and {:.9}, gradients {error:.1e} apart", closed.0, terms.0);
            assert!((closed.0 - terms.0).abs() < 1e-9 * terms.0, "{name} λ {lambda}: {} and {}", closed.0, terms.0);
            assert!(error < 1e-7, "{name} λ {lambda}: gradients {error:e} apart");
            if lambda == 1.0 {
                at_one = flat(&closed.1);
            }
        }
        // The other way to lose a path is seen.
        let cut = evaluate(&pipeline, two_terms(1.0, true), &begin).1;
        assert!(relative(&flat(&cut), &at_one) > 0.1, "{name}: the path through the noised estimate counts");
        // Without a gradient through the second estimate only that of the first is left.
        let stopped = evaluate(&pipeline, minority(Minority { detach_second: true, ..Minority::default() }), &begin).1;
        let second_alone = Objective::new("second term", |s: &mut StepContext<'_>| {
            let (f, g) = estimates(s, false);
            let g = s.b.detach(g);
            let d = minus(s, f, g);
            let distance = norm(s, d);
            s.raise(distance)
        });
        let expected = evaluate(&pipeline, second_alone, &begin).1;
        assert!(relative(&flat(&stopped), &flat(&expected)) < 1e-7, "{name}");
    }
}

#[test]
fn the_second_estimate_has_the_users_prompt() {
    // With the first estimate held still, what the token is changes nothing: the second estimate has the user's prompt.
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let held = || {
        Objective::new("held", |s: &mut StepContext<'_>| {
            let latents = s.latents;
            let first = s.predict(latents, At::T1, Condition::Optimized);
            let moving = s.estimate(first);
            let n = s.draw();
            let noised = s.renoise(latents, n);
            let second = s.predict(noised, At::T2, Condition::Prompt);
            let g = s.estimate(second);
            let report = norm(s, g);
            let moving = norm(s, moving);
            Loss { minimize: s.negated(moving), report }
        })
    };
    let values = [1, 2].map(|seed| evaluate(&pipeline, held(), &rows(&pipeline, seed)).0);
    assert_eq!(values[0], values[1]);
}

fn f32_run(pipeline: &Pipeline, settings: Settings, prompts: &[&str]) -> Outcome {
    let jobs: Vec<_> = prompts.iter().zip(3..).map(|(prompt, seed)| job(prompt, seed)).collect();
    let seeds: Vec<u64> = (9..9 + jobs.len() as u64).collect();
    run(pipeline, &mut Cpu::<f32>::new(), settings, &jobs, &seeds)
}

#[test]
fn the_first_update_is_the_sign_of_the_gradient() {
    for name in FAMILIES {
        let pipeline = Golden::open(name).pipeline();
        let one = |steps: f64| {
            let mut s = settings(&pipeline, DType::F32);
            // Steps 0 and 1 of 4 are at timesteps 751 and 501.
            s.schedule = rarebit::methods::minority::Schedule { iterations: 1, t_lo: steps, ..s.schedule };
            s
        };
        let begin = token(Init::White { scale: 1.0 }).initial(&pipeline, &[9]).unwrap();
        let first = f32_run(&pipeline, one(0.7), &[PROMPT]);
        check_signs(name, &begin, &first, 0.002);
        // Adam begins anew at the second step, and the token goes on from where it was.
        let second = f32_run(&pipeline, one(0.4), &[PROMPT]);
        assert_eq!(second.iterations.len(), 2);
        check_signs(name, &first.learned, &second, 0.002);
    }
}

fn check_signs(name: &str, before: &[Vec<f32>], after: &Outcome, lr: f64) {
    for ((before, now), gradient) in before.iter().zip(&after.learned).zip(&after.gradient) {
        let mut seen = 0;
        for ((before, now), g) in before.iter().zip(now).zip(gradient).filter(|(_, g)| g.abs() > 1e-6) {
            let moved = f64::from(*now) - f64::from(*before);
            // The sign, but for Adam's ε of 1e-8; beside numbers of size 0.05 a step of 0.002 is rounded to 2e-6 of it.
            let expected = lr * g / (g.abs() + 1e-8);
            assert!((moved - expected).abs() < 1e-4 * lr, "{name}: {moved} along {g}");
            seen += 1;
        }
        assert!(seen > before.len() / 2, "{name}: {seen} coordinates");
    }
}

#[test]
fn scales_and_squares_change_no_direction() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let scaled = |loss_scale: f64| {
        let s = Settings { loss_scale, ..settings(&pipeline, DType::F32) };
        f32_run(&pipeline, s, &[PROMPT]).learned
    };
    let plain = scaled(1.0);
    assert!(scaled(1024.0) == plain && scaled(2f64.powi(-6)) == plain, "a power of two is exact");

    let first = |squared: bool| {
        let mut s = settings(&pipeline, DType::F32);
        s.schedule.iterations = 1;
        s.objectives = vec![minority(Minority { squared, ..Minority::default() })];
        let found = f32_run(&pipeline, s, &[PROMPT]);
        (found.gradient.concat(), found.learned.concat())
    };
    let ((gradient, moved), (squared_gradient, squared_moved)) = (first(false), first(true));
    let ratio = squared_gradient[0] / gradient[0];
    let expected: Vec<f64> = gradient.iter().map(|g| g * ratio).collect();
    assert!(relative(&squared_gradient, &expected) < 1e-5 && ratio > 1.5);
    let same = moved.iter().zip(&squared_moved).filter(|(a, b)| (**a - **b).abs() < 1e-7).count();
    assert!(same as f64 > 0.97 * moved.len() as f64, "{same} of {}", moved.len());
}

/// The objective with one noise for all iterations, from a buffer.
fn frozen() -> Objective<'static> {
    Objective::new("frozen", |s: &mut StepContext<'_>| {
        let latents = s.latents;
        let first = s.predict(latents, At::T1, Condition::Optimized);
        let f = s.estimate(first);
        let shape = s.b.shape(f);
        let n = s.b.accumulator_input("frozen", &shape);
        let noised = s.renoise(f, n);
        let second = s.predict(noised, At::T2, Condition::Prompt);
        let g = s.estimate(second);
        let d = minus(s, f, g);
        let distance = norm(s, d);
        s.raise(distance)
    })
}

#[test]
fn the_objective_rises() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    // Plain gradient ascent from given rows, the noise being the same at every evaluation.
    let mut at = rows(&pipeline, 4);
    let mut last = f64::NEG_INFINITY;
    for _ in 0..6 {
        let (value, gradient) = evaluate(&pipeline, minority(Minority::default()), &at);
        assert!(value > last, "{value} after {last}");
        last = value;
        let length = flat(&gradient).iter().map(|g| g * g).sum::<f64>().sqrt();
        for (rows, slopes) in at.iter_mut().zip(&gradient) {
            rows.iter_mut().zip(slopes).for_each(|(x, g)| *x += (2e-4 * g / length) as f32);
        }
    }

    // Adam, over many prompts and first rows.
    let mut risen = 0;
    const TRIALS: u64 = 40;
    for trial in 0..TRIALS {
        let mut s = settings(&pipeline, DType::F32);
        s.schedule.iterations = 6;
        s.objectives = vec![frozen()];
        let prompt = [PROMPT, "a small green heart", "two circles"][trial as usize % 3];
        let noise = crate::common::inputs::noise("frozen", trial as usize, 4 * pipeline.config.unet.sample_size.pow(2));
        let jobs = [job(prompt, trial)];
        let found = run_with(&pipeline, &mut Cpu::<f32>::new(), s, &jobs, &[trial], |loaded| {
            loaded.write("frozen", rarebit::exec::Data::F64(&noise)).unwrap();
        });
        let (first, last) = (found.iterations[0].score[0], found.iterations[5].score[0]);
        risen += u64::from(last > first);
    }
    println!("risen in {risen} of {TRIALS}");
    assert!(risen as f64 >= 0.95 * TRIALS as f64, "{risen} of {TRIALS}");
}

#[test]
fn the_mean_objective_rises_on_other_noise() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let begin = rows(&pipeline, 5);
    let mut s = settings(&pipeline, DType::F32);
    s.schedule.iterations = 12;
    s.variable = Variable::Token(token(Init::Given(begin.clone())));
    let learned = f32_run(&pipeline, s, &[PROMPT]).learned;
    // 64 evaluations that move nothing, at noise the optimiser has not seen.
    let mean = |rows: Vec<Vec<f32>>| {
        let variable = Variable::Token(token(Init::Given(rows)));
        let mut s = looking(&pipeline, DType::F32, minority(Minority::default()), variable);
        s.schedule.iterations = 64;
        let found = run(&pipeline, &mut Cpu::<f32>::new(), s, &[job(PROMPT, 3)], &[77]);
        found.iterations.iter().map(|i| i.score[0]).sum::<f64>() / 64.0
    };
    let (before, after) = (mean(begin), mean(learned));
    println!("mean J {before:.4}, then {after:.4}");
    assert!(after > before, "{before} to {after}");
}

#[test]
fn repulsion_is_the_sum_of_distances() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let prompts = ["a red star", "a small green heart", "two circles"];
    let pairs = Objective::new("pairs", |s: &mut StepContext<'_>| {
        let latents = s.latents;
        let first = s.predict(latents, At::T1, Condition::Optimized);
        let f = s.estimate(first);
        let images: Vec<ValueId> = (0..s.batch()).map(|i| s.b.slice(f, i, 1)).collect();
        let mut sum = None;
        for (i, j) in [(0, 1), (0, 2), (1, 2)] {
            let d = minus(s, images[i], images[j]);
            let d = norm(s, d);
            sum = Some(sum.map_or(d, |sum| s.b.add(sum, d)));
        }
        // Of the whole batch, given to the first image alone.
        let sum = s.b.affine(sum.unwrap(), 2.0, 0.0);
        let whole = s.b.repeat(sum, 3);
        let shares = s.b.accumulator_input("shares", &[3]);
        let fraction = s.b.mul(whole, shares);
        s.raise(fraction)
    });
    let evaluate = |objective: Objective<'static>| {
        let variable = Variable::Token(token(Init::White { scale: 1.0 }));
        let s = looking(&pipeline, DType::F64, objective, variable);
        let jobs: Vec<_> = prompts.iter().zip(3..).map(|(prompt, seed)| job(prompt, seed)).collect();
        run_with(&pipeline, &mut Cpu::<f64>::new(), s, &jobs, &[1, 2, 3], |loaded| {
            let _ = loaded.write("shares", rarebit::exec::Data::F64(&[1.0, 0.0, 0.0])); // Only the pairs read it.
        })
    };
    let (found, expected) = (evaluate(repulsion()), evaluate(pairs));
    let total = |outcome: &Outcome| outcome.iterations[0].score.iter().sum::<f64>();
    assert!((total(&found) - total(&expected)).abs() < 1e-9 * total(&expected));
    assert!(relative(&flat(&found.gradient), &flat(&expected.gradient)) < 1e-9, "gradients on both sides");

    // Equal images: no distance, and no gradient.
    let same = [job(PROMPT, 3), job(PROMPT, 3)];
    let variable = Variable::Token(token(Init::White { scale: 1.0 }));
    let s = looking(&pipeline, DType::F64, repulsion(), variable);
    let found = run(&pipeline, &mut Cpu::<f64>::new(), s, &same, &[1, 1]);
    assert_eq!(found.iterations[0].score, [0.0, 0.0]);
    assert!(flat(&found.gradient).iter().all(|g| *g == 0.0));
}
