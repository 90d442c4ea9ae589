//! Which model a command opens.

use crate::Result;
use crate::cli::paths::Paths;
use crate::cli::progress::Reporter;
use crate::models::config::Prediction;
use crate::pipeline::Pipeline;
use crate::weights::Model;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Which model.
#[derive(Args, Clone)]
pub struct ModelFlags {
    /// A diffusers folder or a single-file checkpoint (.safetensors) [default: the embedded `shapes` model]
    #[arg(long, value_name = "DIR|FILE")]
    pub model: Option<PathBuf>,
    /// UNet weights that replace the model's own (how SDXL-Lightning ships)
    #[arg(long, value_name = "DIR|FILE")]
    pub unet: Option<PathBuf>,
    /// What the UNet predicts, where the model does not say
    #[arg(long, value_enum)]
    pub prediction: Option<PredictionFlag>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PredictionFlag {
    Epsilon,
    V,
    Sample,
}

impl From<PredictionFlag> for Prediction {
    fn from(flag: PredictionFlag) -> Prediction {
        match flag {
            PredictionFlag::Epsilon => Prediction::Epsilon,
            PredictionFlag::V => Prediction::V,
            PredictionFlag::Sample => Prediction::Sample,
        }
    }
}

impl ModelFlags {
    /// The pipeline; what is to be said of it is said.
    pub fn open(&self) -> Result<Pipeline> {
        let mut model = match &self.model {
            Some(path) => Model::open(path)?,
            None => crate::assets::shapes()?,
        };
        if let Some(unet) = &self.unet {
            model.replace_unet(unet)?;
        }
        let pipeline = Pipeline::open(model, self.prediction.map(Prediction::from))?;
        pipeline.remarks.iter().for_each(|remark| Reporter::new(false, true).warn(remark));
        Ok(pipeline)
    }

    /// Every file that is read, or may be.
    pub fn inputs(&self, paths: &mut Paths) {
        self.model.iter().for_each(|path| paths.model("--model", path));
        self.unet.iter().for_each(|path| paths.model("--unet", path));
    }

    /// The model's name as images record it.
    pub fn name(&self) -> String {
        // "v1.5" of a folder is no extension.
        let name =
            |path: &PathBuf| if path.is_dir() { path.file_name() } else { path.file_stem() }.map(|s| s.to_owned());
        let stem = |path: &PathBuf| name(path).unwrap_or_else(|| path.clone().into()).to_string_lossy().into_owned();
        let base = self.model.as_ref().map_or_else(|| "shapes".to_string(), stem);
        match &self.unet {
            Some(unet) => format!("{base}+{}", stem(unet)),
            None => base,
        }
    }
}
