//! MinorityPrompt against a reference loop on diffusers, iteration by iteration (`tools/reference/minority.py`).

use crate::common::tolerance::{report, side_by_side};
use rarebit::exec::cpu::Cpu;
use rarebit::methods::minority::{Convention, Loaded, Minority, Renoise, Schedule, Settings};
use rarebit::optimize::objective::{self, minority, repulsion};
use rarebit::optimize::variable::Variable;
use rarebit::optimize::variable::token::{Init, PoolAt, TokenSettings};
use rarebit::pipeline::Iteration;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::Progress;
use rarebit::pipeline::conditioning::Branch;
use rarebit::pipeline::generate::{self, Job};
use rarebit::program::DType;
use rarebit::sampler::{self, Method, Rng};
use rarebit::text::Position;
use rarebit::weights::Model;
use safetensors::tensor::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

struct Case {
    name: String,
    fields: Value,
    bytes: Vec<u8>,
}

impl Case {
    fn text(&self, field: &str) -> &str {
        self.fields[field].as_str().unwrap_or_else(|| panic!("{}: no text '{field}'", self.name))
    }

    fn number(&self, field: &str) -> f64 {
        self.fields[field].as_f64().unwrap_or_else(|| panic!("{}: no number '{field}'", self.name))
    }

    fn count(&self, field: &str) -> usize {
        self.number(field) as usize
    }

    fn is(&self, field: &str) -> bool {
        self.fields[field].as_bool().unwrap_or_else(|| panic!("{}: no truth '{field}'", self.name))
    }

    fn tensor(&self, what: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(&format!("{}/{what}", self.name)).ok()?;
        Some(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn pipeline(&self) -> Pipeline {
        let model = match self.text("model") {
            "shapes" => rarebit::assets::shapes().unwrap(),
            name => Model::open(&data(name)).unwrap(),
        };
        Pipeline::open(model, None).unwrap()
    }

    fn variable(&self, pipeline: &Pipeline) -> Variable {
        match self.text("variable") {
            "text" => Variable::TextStates(Branch::Prompt),
            "null" => Variable::TextStates(Branch::Negative),
            _ => Variable::Token(TokenSettings {
                rows: self.count("tokens"),
                position: if self.text("position") == "start" { Position::Start } else { Position::End },
                init: Init::Given(
                    (0..pipeline.config.text.len())
                        .map(|tower| self.tensor(&format!("rows.{tower}")).unwrap())
                        .collect(),
                ),
                pool_at: if self.text("pool_at") == "eos" { PoolAt::Eos } else { PoolAt::Placeholder },
            }),
        }
    }

    fn settings(&self, pipeline: &Pipeline) -> Settings {
        let released = self.text("mode") == "released";
        let objective = match self.text("objective") {
            "repulsion" => repulsion(),
            _ => minority(objective::Minority {
                lambda: self.number("lambda"),
                detach_second: self.is("sg_second"),
                second_optimized: self.text("second") == "token",
                guided: self.is("guided"),
                squared: self.is("squared"),
            }),
        };
        let factor = pipeline.config.vae.factor();
        let side = |index: usize| self.fields["size"][index].as_u64().unwrap() as usize * factor;
        Settings {
            images: generate::Settings {
                width: side(1),
                height: side(0),
                sampler: sampler::Settings {
                    method: Method::Ddim,
                    spacing: Some(self.text("spacing").parse().unwrap()),
                    steps: self.count("steps"),
                    eta: 0.0,
                    guidance: self.number("guidance"),
                    cfg_pp: false,
                },
                rng: Rng::Philox,
                dtype: DType::F32,
            },
            schedule: Schedule {
                iterations: self.count("k"),
                lr: self.number("lr"),
                lr_decay: self.number("lr_decay"),
                t_lo: self.number("t_lo"),
                t_hi: 1.0,
                every: self.count("inter_rate"),
                base_prompt_after: self.is("base_prompt_after"),
                renoise: self.fields["second_level"].as_f64().map_or(Renoise::Annealed, Renoise::Fixed),
                convention: if released { Convention::Released } else { Convention::Diffusers },
            },
            variable: self.variable(pipeline),
            objectives: vec![objective],
            trace: true,
            loss_scale: 1.0,
            budget: None,
        }
    }

    fn jobs(&self) -> Vec<Job> {
        let prompts = self.fields["prompts"].as_array().unwrap();
        let noise = self.tensor("noise").unwrap();
        let own = noise.len() / prompts.len();
        let job = |(index, prompt): (usize, &Value)| Job {
            prompt: prompt.as_str().unwrap().into(),
            negative: self.fields["negatives"][index].as_str().map(str::to_string),
            seed: self.count("seed") as u64 + index as u64,
            draws: vec![noise[index * own..][..own].to_vec()],
        };
        prompts.iter().enumerate().map(job).collect()
    }
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn cases() -> Vec<Case> {
    let bytes = std::fs::read(data("minority/golden.safetensors")).unwrap();
    let index: Value = serde_json::from_slice(&std::fs::read(data("minority/golden.json")).unwrap()).unwrap();
    let cases = index["cases"].as_array().unwrap();
    cases
        .iter()
        .map(|fields| Case {
            name: fields["name"].as_str().unwrap().into(),
            fields: fields.clone(),
            bytes: bytes.clone(),
        })
        .collect()
}

fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (error / expected.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// What a run leaves behind.
struct Outcome {
    iterations: Vec<Iteration>,
    latents: Vec<f32>,
    learned: Vec<Vec<f32>>,
}

fn run(case: &Case, pipeline: &Pipeline) -> Outcome {
    let jobs = case.jobs();
    let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
    let seeds: Vec<u64> = (0..jobs.len() as u64).map(|i| case.count("opt_seed") as u64 + i).collect();
    let mut cpu = Cpu::<f32>::new();
    let planned = Minority::plan(pipeline, &cpu, case.settings(pipeline), &prompts).unwrap();
    let mut loaded: Loaded<'_, '_> = planned.load(&mut cpu).unwrap();
    let mut iterations = Vec::new();
    let images = loaded
        .run(&jobs, &seeds, &mut |progress| {
            if let Progress::Iteration(report) = progress {
                iterations.push(report.unwrap().clone());
            }
            Ok(())
        })
        .unwrap();
    Outcome {
        iterations,
        latents: images.into_iter().flat_map(|image| image.latents).collect(),
        learned: loaded.learned().unwrap(),
    }
}

/// Of every iteration's J, of the learned variable, of the final latents (the limits of the issue; f32 against f32).
const J: f64 = 1e-4;
const COSINE: f64 = 0.9999;
const LATENTS: f64 = 1e-2;

#[test]
fn every_iteration_is_the_references() {
    report(side_by_side(cases().into_iter(), |_, case| {
        let pipeline = case.pipeline();
        let found = run(case, &pipeline);
        let expected = case.tensor("j").unwrap();
        let scores: Vec<f64> = found.iterations.iter().flat_map(|i| &i.score).copied().collect();
        assert_eq!(scores.len(), expected.len(), "{}", case.name);
        let relative_to = |(a, b): (&f64, &f32)| (a - f64::from(*b)).abs() / f64::from(b.abs());
        let j = scores.iter().zip(&expected).map(relative_to).fold(0.0, f64::max);
        let mut least = 1.0f64;
        for (tower, learned) in found.learned.iter().enumerate() {
            let name = if matches!(case.text("variable"), "token") { format!("final.{tower}") } else { "final".into() };
            if let Some(expected) = case.tensor(&name) {
                least = least.min(cosine(learned, &expected));
            }
        }
        let latents = relative(&found.latents, &case.tensor("latents").unwrap());
        let line = format!("{:32} J {j:.1e}  variable {:.1e}  latents {latents:.1e}", case.name, 1.0 - least);
        println!("{line}");
        let agrees = j <= J && least >= COSINE && latents <= LATENTS;
        Some(line).filter(|_| !agrees).into_iter().collect()
    }));
}
