//! The reference runs of SeedSelect (`tools/reference/dump_seedselect.py`): their settings, their targets and what they found.

use super::auxiliary::channels_last;
use super::golden::{Case, Golden, data_folder};
use rarebit::models::preprocess::Preprocess;
use rarebit::models::{config::ClipConfig, detect};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::networks::Tensor;
use rarebit::sampler::Settings;
use rarebit::weights::{Component, Model};
use std::path::PathBuf;

/// One reference run.
pub struct Run<'g> {
    golden: &'g Golden,
    pub case: Case,
}

/// What a run found; `[iteration]` unless said, before the update of that iteration.
#[derive(Default)]
pub struct Found {
    pub loss: Vec<f64>,
    /// `1 − cos` of the last states, `[iteration][state]`.
    pub distances: Vec<Vec<f64>>,
    pub appearance: Vec<f64>,
    /// Times its weight.
    pub prior: Vec<f64>,
    /// Length of the noise.
    pub norm: Vec<f64>,
    pub gradient_norm: Vec<f64>,
    /// Of the iterations that are stored, channels last.
    pub gradients: Vec<(usize, Vec<f64>)>,
    /// The noise after five iterations, channels last.
    pub noise: Vec<f64>,
}

impl Run<'_> {
    /// Every run of five iterations.
    pub fn short(golden: &Golden) -> Vec<Run<'_>> {
        let cases = golden.cases("").filter(|case| case.number("iterations") == 5.0);
        cases.map(|case| Run { golden, case }).collect()
    }

    /// The runs whose losses alone are stored, of more iterations.
    pub fn long(golden: &Golden) -> Vec<Run<'_>> {
        let cases = golden.cases("").filter(|case| case.number("iterations") > 5.0);
        cases.map(|case| Run { golden, case }).collect()
    }

    pub fn name(&self) -> &str {
        &self.case.name
    }

    pub fn is_released(&self) -> bool {
        self.case.text("mode") == "released"
    }

    pub fn count(&self, field: &str) -> usize {
        self.case.number(field) as usize
    }

    /// The model with the CLIP that judges its images.
    pub fn pipeline(&self) -> Pipeline {
        let model = match self.case.text("model").as_str() {
            "shapes" => rarebit::assets::shapes().unwrap(),
            name => {
                let (mut model, clip) = (Model::open(&data_folder(name)).unwrap(), self.case.text("clip"));
                match clip.as_str() {
                    "tiny-clip-l" => model.take(Component::Clip, Model::open(&data_folder(&clip)).unwrap()).unwrap(),
                    _ => model.add(Component::Clip, &data_folder(&clip)).unwrap(),
                }
                model
            }
        };
        Pipeline::open(model, None).unwrap()
    }

    /// How generated images are shown to it.
    pub fn preprocess(&self, clip: &ClipConfig) -> Preprocess {
        if self.is_released() { clip.preprocess.seed_select() } else { clip.preprocess }
    }

    pub fn clip(&self, pipeline: &Pipeline) -> ClipConfig {
        detect::clip_config(&pipeline.model, Component::Clip).unwrap()
    }

    pub fn sampler(&self) -> Settings {
        Settings {
            method: self.case.text("sampler").parse().unwrap(),
            spacing: Some(self.case.text("spacing").parse().unwrap()),
            steps: self.count("steps"),
            eta: 0.0,
            guidance: self.case.number("guidance"),
            cfg_pp: false,
        }
    }

    pub fn negative(&self) -> Option<String> {
        self.case.has("negative").then(|| self.case.text("negative"))
    }

    /// Of the last states, first to last; their sum is 1.
    pub fn state_weights(&self) -> Vec<f64> {
        let all: Vec<f64> = self.case.list("state_weights").iter().map(|weight| weight.as_f64().unwrap()).collect();
        let kept = &all[all.len() - self.count("steps").min(all.len())..];
        kept.iter().map(|weight| weight / kept.iter().sum::<f64>()).collect()
    }

    pub fn lr(&self, iteration: usize) -> f64 {
        let is_lower = self.case.has("lr_drop_at") && iteration >= self.count("lr_drop_at");
        self.case.number("lr") / if is_lower { 10.0 } else { 1.0 }
    }

    /// Height and width of the latents.
    pub fn size(&self) -> [usize; 2] {
        [0, 1].map(|i| self.case.list("size")[i].as_u64().unwrap() as usize)
    }

    /// The image files of the references.
    pub fn references(&self) -> Vec<PathBuf> {
        let folder = self.golden.folder();
        self.case.list("references").iter().map(|name| folder.join(name.as_str().unwrap())).collect()
    }

    /// The name of the run's targets, which others may share.
    pub fn targets(&self) -> String {
        self.case.text("targets")
    }

    /// Something its targets are or were made of.
    pub fn target(&self, what: &str) -> Tensor {
        let name = format!("{}/{what}", self.targets());
        self.golden.tensor(&name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Unit features that images are drawn to, and latents `[h, w, C]`.
    pub fn centroid_and_latents(&self) -> [Vec<f32>; 2] {
        [self.target("centroid").data, image_last(self.target("latents"))]
    }

    /// A tensor of this run, in f32.
    pub fn tensor(&self, what: &str) -> Tensor {
        let name = format!("{}/{what}", self.name());
        self.golden.tensor(&name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The starting noise, `[h, w, C]`.
    pub fn noise(&self) -> Vec<f32> {
        image_last(self.tensor("noise"))
    }

    /// What the run found in float32, or in float64 from the same targets.
    pub fn found(&self, is_double: bool) -> Found {
        let read = |what: &str| -> Vec<f64> {
            match is_double {
                true => self.golden.doubles(&format!("{}/f64/{what}", self.name())),
                false => self.tensor(what).data.into_iter().map(f64::from).collect(),
            }
        };
        let [height, width] = self.size();
        // From `[C, h, w]`.
        let latents = |what: String| -> Vec<f64> {
            let (from, len) = (read(&what), height * width);
            let channels = from.len() / len;
            (0..from.len()).map(|i| from[i % channels * len + i / channels]).collect()
        };
        Found {
            loss: read("loss"),
            distances: read("distances").chunks(self.state_weights().len()).map(<[f64]>::to_vec).collect(),
            appearance: read("appearance"),
            prior: read("prior"),
            norm: read("norm"),
            gradient_norm: read("gradient_norm"),
            gradients: [0, 4].map(|i| (i, latents(format!("gradient.{i}")))).into(),
            noise: latents("z.5".into()),
        }
    }

    /// The losses of a long run in float32 and in float64.
    pub fn losses(&self) -> [Vec<f64>; 2] {
        let single = self.tensor("loss").data.into_iter().map(f64::from).collect();
        [single, self.golden.doubles(&format!("{}/f64/loss", self.name()))]
    }
}

/// `[C, h, w]` → `[h, w, C]`.
fn image_last(mut image: Tensor) -> Vec<f32> {
    image.shape.insert(0, 1);
    channels_last(&image)
}
