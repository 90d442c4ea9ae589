//! Golden tensors written by `tools/reference/dump.py`: `golden.safetensors` with its index `golden.json`.

use rarebit::exec::Executor;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{Generator, Image, Job, Settings};
use rarebit::pipeline::networks::Tensor;
use rarebit::program::DType;
use rarebit::sampler::{self, Rng};
use rarebit::weights::Model;
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::{Path, PathBuf};

pub struct Golden {
    folder: PathBuf,
    bytes: Vec<u8>,
    cases: Vec<Case>,
}

/// One tensor of the index with what it was made from.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    fields: Value,
}

impl Case {
    pub fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|value| !value.is_null())
    }

    pub fn text(&self, field: &str) -> String {
        self.fields[field].as_str().unwrap_or_else(|| panic!("{}: no text '{field}'", self.name)).to_string()
    }

    pub fn number(&self, field: &str) -> f64 {
        self.fields[field].as_f64().unwrap_or_else(|| panic!("{}: no number '{field}'", self.name))
    }

    pub fn list(&self, field: &str) -> &[Value] {
        self.fields[field].as_array().unwrap_or_else(|| panic!("{}: no list '{field}'", self.name))
    }
}

pub fn data_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A model of the test data, without what it is tested against, in a folder of its own: for tests that change its files.
pub fn copied(name: &str) -> tempfile::TempDir {
    let (from, to) = (data_folder(name), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("model_index.json"), to.path().join("model_index.json")).unwrap();
    for part in std::fs::read_dir(&from).unwrap().map(Result::unwrap).filter(|part| part.path().is_dir()) {
        std::fs::create_dir(to.path().join(part.file_name())).unwrap();
        for file in std::fs::read_dir(part.path()).unwrap().map(Result::unwrap) {
            std::fs::copy(file.path(), to.path().join(part.file_name()).join(file.file_name())).unwrap();
        }
    }
    to
}

impl Golden {
    pub fn open(name: &str) -> Golden {
        Golden::at(data_folder(name))
    }

    /// Of any folder.
    pub fn at(folder: PathBuf) -> Golden {
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let index: Value = serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
        let cases = index["cases"].as_array().unwrap();
        let name_of = |case: &Value| case["name"].as_str().unwrap().to_string();
        let cases = cases.iter().map(|case| Case { name: name_of(case), fields: case.clone() }).collect();
        Golden { folder, bytes, cases }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The pipeline in the same folder.
    pub fn pipeline(&self) -> Pipeline {
        Pipeline::open(Model::open(&self.folder).unwrap(), None).unwrap()
    }

    pub fn cases(&self, prefix: &str) -> impl Iterator<Item = Case> {
        self.cases.iter().filter(move |case| case.name.starts_with(prefix)).cloned()
    }

    fn view(&self, name: &str) -> Option<(Dtype, Vec<usize>, Vec<u8>)> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).ok()?;
        Some((tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec()))
    }

    /// An f32 tensor, if it is stored.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let (dtype, shape, data) = self.view(name)?;
        assert_eq!(dtype, Dtype::F32, "{name}");
        let data = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Some(Tensor { shape, data })
    }

    pub fn ints(&self, name: &str) -> Vec<i32> {
        let (dtype, _, data) = self.view(name).unwrap_or_else(|| panic!("no tensor {name}"));
        assert_eq!(dtype, Dtype::I32, "{name}");
        data.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn doubles(&self, name: &str) -> Vec<f64> {
        let (dtype, _, data) = self.view(name).unwrap_or_else(|| panic!("no tensor {name}"));
        assert_eq!(dtype, Dtype::F64, "{name}");
        data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

impl Golden {
    /// Makes the image of one stored run, through the same loop as `rarebit generate`.
    pub fn sample(&self, pipeline: &Pipeline, case: &Case, mut executor: impl Executor) -> Image {
        let mut draws = vec![self.tensor("sample/noise").unwrap().data];
        if case.text("sampler") == "euler-a" {
            let ancestral = self.tensor("sample/ancestral_noise").unwrap();
            draws.extend(ancestral.data.chunks(draws[0].len()).map(<[f32]>::to_vec));
        }
        let shape = self.tensor(&case.name).unwrap().shape;
        let factor = pipeline.config.vae.factor();
        let settings = Settings {
            width: factor * shape[3],
            height: factor * shape[2],
            sampler: sampler::Settings {
                method: case.text("sampler").parse().unwrap(),
                spacing: Some(case.text("spacing").parse().unwrap()),
                steps: case.number("steps") as usize,
                eta: 0.0,
                guidance: case.number("guidance"),
                cfg_pp: false,
            },
            rng: Rng::Philox,
            dtype: DType::F32,
        };
        let negative = Some(case.text("negative")).filter(|text| !text.is_empty());
        let job = Job { prompt: case.text("prompt"), negative, seed: 0, draws };
        let generator = Generator::plan(pipeline, &executor, settings, 1).unwrap();
        generator.load(&mut executor).unwrap().run(&[job], &mut |_| Ok(())).unwrap().remove(0)
    }
}

/// `‖a − b‖ / ‖b‖`.
pub fn relative_error<T: Copy + Into<f64>>(a: &[f32], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - b.into()).powi(2)).sum();
    let norm: f64 = b.iter().map(|&b| b.into().powi(2)).sum();
    (difference / norm).sqrt()
}
