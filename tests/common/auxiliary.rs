//! The auxiliary networks as programs, and what torch computed with them (`tools/reference/dump_models.py`).

use super::golden::{Case, Golden, data_folder};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::models::clip_text::ClipText;
use rarebit::models::config::{ClipConfig, Gpt2Config, HeadConfig};
use rarebit::models::gpt2::{self, Gpt2};
use rarebit::models::preprocess::Preprocess;
use rarebit::models::{Weights, clip_image, detect, heads};
use rarebit::pipeline::networks::Tensor;
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Model};
use std::collections::BTreeMap;

/// Contents of named buffers.
#[derive(Clone, Default)]
pub struct Buffers {
    pub floats: BTreeMap<String, Vec<f32>>,
    pub ints: BTreeMap<String, Vec<i32>>,
}

/// Runs a program with guards and gives its outputs by name.
pub fn run<T: Real>(program: &Program, model: &Model, buffers: &Buffers) -> BTreeMap<String, Vec<f32>> {
    let mut cpu = Cpu::<T>::new().with_guards(true);
    let planned = plan(program.clone(), |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, model).unwrap();
    buffers.floats.iter().for_each(|(name, values)| cpu.write(name, Data::F32(values)).unwrap());
    buffers.ints.iter().for_each(|(name, values)| cpu.write(name, Data::I32(values)).unwrap());
    cpu.run(id).unwrap();
    let read = |(name, id): &(String, ValueId)| {
        let mut out = vec![0.0; program.value(*id).len()];
        cpu.read(name, DataMut::F32(&mut out)).unwrap();
        (name.clone(), out)
    };
    program.outputs.iter().map(read).collect()
}

/// The value an input or output of a program is.
pub fn value(program: &Program, name: &str) -> ValueId {
    let output = program.outputs.iter().find(|(held, _)| held == name).map(|(_, id)| *id);
    output.or(program.input(name)).unwrap_or_else(|| panic!("no value '{name}'"))
}

/// One CLIP pair and what judges its images.
pub struct Clip {
    pub golden: Golden,
    pub model: Model,
    pub config: ClipConfig,
}

impl Clip {
    /// `tiny-clip-l`: a folder with parts, whose index of `clip` borrows the text tower.
    pub fn l() -> Clip {
        Clip::of("tiny-clip-l", Model::open(&data_folder("tiny-clip-l")).unwrap())
    }

    /// `tiny-clip-h`: a folder of its own.
    pub fn h() -> Clip {
        Clip::of("tiny-clip-h", Model::network(Component::Clip, &data_folder("tiny-clip-h")).unwrap())
    }

    fn of(name: &str, model: Model) -> Clip {
        Clip { golden: Golden::open(name), config: detect::clip_config(&model, Component::Clip).unwrap(), model }
    }

    /// Puts a head in the place of the one there is: `laion` is that of a file, `aesthetic` the folder's.
    pub fn head(&mut self, name: &str) -> HeadConfig {
        let path = data_folder("tiny-clip-l").join(if name == "laion" { "laion.safetensors" } else { name });
        self.model.add(Component::Aesthetic, &path).unwrap();
        detect::head_config(&self.model).unwrap()
    }

    pub fn preset(&self, name: &str) -> Preprocess {
        match name {
            "clip" => self.config.preprocess,
            "seedselect" => self.config.preprocess.seed_select(),
            "dpo-diff" => self.config.preprocess.dpo_diff(),
            _ => panic!("no preset '{name}'"),
        }
    }

    /// `pixels [B, H, W, 3]` in [-1, 1] → `input`, `features`, `unit` and, with a head, its `score [B, 1]`.
    pub fn image(&self, dtype: DType, preset: &str, pixels: &Tensor, head: Option<&HeadConfig>) -> Program {
        let mut b = Builder::new("image", dtype);
        let [batch, _, height, width] = pixels.shape[..] else { panic!("no images") };
        let pixels = b.input("pixels", &[batch, height, width, 3]);
        let input = self.preset(preset).append(&mut b, pixels);
        let features = clip_image::features(&mut b, &self.config.image, Component::Clip, input);
        let unit = clip_image::unit(&mut b, features);
        for (name, id) in [("input", input), ("features", features), ("unit", unit)] {
            b.output(name, id);
        }
        if let Some(head) = head {
            let score = heads::aesthetic(&mut b, head, unit);
            b.output("score", score);
        }
        b.finish().unwrap()
    }

    /// `ids [B, T]`, `ends [B]` → `embeddings`, `features`, `unit`.
    pub fn text(&self, dtype: DType, batch: usize) -> Program {
        let config = self.config.text.as_ref().unwrap();
        let mut b = Builder::new("text", dtype);
        let ids = b.input_i32("ids", &[batch, config.max_positions]);
        let ends = b.input_i32("ends", &[batch]);
        let mut tower = ClipText::new(&mut b, config, Component::Clip);
        let embeddings = tower.embed(ids);
        let features = tower.features(embeddings, ends);
        let unit = clip_image::unit(&mut b, features);
        for (name, id) in [("embeddings", embeddings), ("features", features), ("unit", unit)] {
            b.output(name, id);
        }
        b.finish().unwrap()
    }

    pub fn text_buffers(&self) -> Buffers {
        let ints = ["ids", "ends"].map(|name| (name.to_string(), self.golden.ints(&format!("text/{name}"))));
        Buffers { ints: ints.into(), ..Buffers::default() }
    }
}

/// GPT-2 with what it was run on.
pub struct Policy {
    pub golden: Golden,
    pub model: Model,
    pub config: Gpt2Config,
}

impl Policy {
    pub fn tiny() -> Policy {
        let model = Model::network(Component::Policy, &data_folder("tiny-gpt2")).unwrap();
        Policy { golden: Golden::open("tiny-gpt2"), config: detect::policy_config(&model).unwrap(), model }
    }

    /// `ids`, `targets`, `share [B, T]` → `embeddings`, `hidden`, `logits`, `log_probabilities`, and per sample the cross-entropy
    /// weighted by `share`: with one over the number of targets in it, the samples' sum is the mean.
    pub fn program(&self, dtype: DType, weights: Weights) -> Program {
        let shape = self.golden.tensor("log_probabilities").unwrap().shape;
        let mut b = Builder::new("gpt2", dtype);
        let (ids, targets) = (b.input_i32("ids", &shape), b.input_i32("targets", &shape));
        let share = b.input("share", &shape);
        let mut net = Gpt2::new(&mut b, &self.config, weights);
        let embeddings = net.embed(ids);
        let hidden = net.hidden(embeddings);
        let logits = net.logits(hidden);
        let log_probabilities = gpt2::log_probabilities(&mut b, logits, targets);
        let loss = b.dot(log_probabilities, share);
        let loss = b.affine(loss, -1.0, 0.0);
        let outputs = [
            ("embeddings", embeddings),
            ("hidden", hidden),
            ("logits", logits),
            ("log_probabilities", log_probabilities),
            ("loss", loss),
        ];
        outputs.into_iter().for_each(|(name, id)| b.output(name, id));
        b.finish().unwrap()
    }

    /// The contents of all buffers, the trainable weights' too.
    pub fn buffers(&self, weights: Weights) -> Buffers {
        let ints: BTreeMap<_, _> = ["ids", "targets"].map(|name| (name.to_string(), self.golden.ints(name))).into();
        let count = ints["targets"].iter().filter(|id| **id >= 0).count();
        let share = vec![1.0 / count as f32; ints["targets"].len()];
        let mut floats = BTreeMap::from([("share".to_string(), share)]);
        if weights == Weights::Trainable {
            for weight in gpt2::parameters(&self.config).unwrap() {
                floats.insert(weight.name(), self.model.value(&weight).unwrap());
            }
        }
        Buffers { floats, ints }
    }
}

/// A gradient that torch computed.
pub struct Gradient {
    pub case: Case,
    /// Outputs of the program: what was differentiated, and with what cotangent (all ones where there is none).
    pub of: String,
    pub cotangent: Option<Vec<f32>>,
    /// The input or output it was differentiated with respect to.
    pub to: String,
    /// As the engine lays it out.
    pub expected: Vec<f32>,
}

/// The stored gradients whose names begin so.
pub fn gradients(golden: &Golden, prefix: &str) -> Vec<Gradient> {
    let found = golden.cases(prefix).filter(|case| case.name.contains("grad/"));
    found
        .map(|case| {
            let tensor = golden.tensor(&case.name).unwrap();
            let of = case.text("of");
            let is_head = matches!(of.as_str(), "aesthetic" | "laion");
            let to = match case.text("to") {
                name if name.starts_with("transformer.") => format!("{}/{name}", Component::Policy.name()),
                name => name,
            };
            Gradient {
                of: if is_head { "score".to_string() } else { of },
                cotangent: case.has("cotangent").then(|| golden.tensor(&case.text("cotangent")).unwrap().data),
                expected: if to == "pixels" { channels_last(&tensor) } else { tensor.data },
                to,
                case,
            }
        })
        .collect()
}

/// Images `[B, C, H, W]` as the engine has them.
pub fn channels_last(images: &Tensor) -> Vec<f32> {
    let [batch, c, h, w] = images.shape[..] else { panic!("no images") };
    let at = |b: usize, y: usize, x: usize, k: usize| images.data[((b * c + k) * h + y) * w + x];
    let pixels = (0..batch * h * w).flat_map(|i| (0..c).map(move |k| (i / (h * w), i / w % h, i % w, k)));
    pixels.map(|(b, y, x, k)| at(b, y, x, k)).collect()
}
