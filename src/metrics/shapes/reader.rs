//! The instrument: the trained reader of an image's attributes, and how well it is known to read.

use super::world::{Cell, World};
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::models::config::ReaderConfig;
use crate::models::{detect, reader};
use crate::plan::{Planned, plan};
use crate::program::{Builder, DType};
use crate::weights::Model;
use crate::{Error, Result, assets};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the reader sees in an image.
#[derive(Clone, Debug)]
pub struct Reading {
    pub cell: Cell,
    /// The reader's probability for its answer, at the attribute where that is smallest.
    pub confidence: f64,
}

/// The reader on the autoencoder's reconstructions of fresh renders: what a perfect generator would score.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reference {
    pub images: usize,
    /// Fraction of right answers by attribute, and of images with every answer right.
    pub accuracy: BTreeMap<String, f64>,
    pub all: f64,
    /// Nats, of the cells rendered and of the cells read.
    pub mean_log_density_true: f64,
    pub mean_log_density_read: f64,
    /// Fraction of readings that the world does not hold.
    pub impossible: f64,
    /// What measured it.
    pub command: String,
}

/// A reader's weights, configuration and reference measurement; nothing is loaded yet.
pub struct Instrument {
    model: Model,
    config: ReaderConfig,
    /// `None` where it was not measured.
    pub reference: Option<Reference>,
}

/// Names of the program's buffers.
const IMAGES: &str = "images";
const LOGITS: &str = "logits";

impl Instrument {
    /// The reader of the embedded model, checked against its world.
    pub fn embedded(world: &World) -> Result<Instrument> {
        let model = assets::shapes_reader()?;
        let config = detect::reader_config(&model)?;
        let heads = config.heads.iter().map(|(name, values)| (name.as_str(), *values));
        if !heads.eq(world.attributes.iter().map(|a| (a.name.as_str(), a.values.len())))
            || (config.sample_size, config.image_channels) != (world.image_size, 3)
        {
            return Err(Error::Model("the reader was trained on another world than world.json describes".into()));
        }
        let reference = model.config("reader").and_then(|json| json.get("reference")).map(Reference::deserialize);
        let reference = reference
            .transpose()
            .map_err(|e| Error::file(model.config_path("reader").unwrap_or(model.path()), format!("reference: {e}")))?;
        Ok(Instrument { model, config, reference })
    }

    /// The program that reads `batch` images at a time.
    pub fn plan(&self, executor: &dyn Executor, dtype: DType, batch: usize) -> Result<Planned> {
        let ReaderConfig { sample_size, image_channels, .. } = self.config;
        let mut b = Builder::new("read", dtype);
        let images = b.input(IMAGES, &[batch, sample_size, sample_size, image_channels]);
        let logits = reader::logits(&mut b, &self.config, images);
        b.output(LOGITS, logits);
        Ok(plan(b.finish()?, |program, node| executor.workspace(program, node)))
    }

    pub fn load(&self, mut executor: Box<dyn Executor>, planned: Planned) -> Result<Reader> {
        let len = |id| planned.program.value(id).len();
        let images = vec![0.0; planned.program.inputs.iter().map(|&id| len(id)).sum()];
        let logits = vec![0.0; planned.program.outputs.iter().map(|(_, id)| len(*id)).sum()];
        let program = executor.load(planned, &self.model)?;
        let heads = self.config.heads.iter().map(|(_, values)| *values).collect();
        let image_len = self.config.sample_size.pow(2) * self.config.image_channels;
        Ok(Reader { executor, program, heads, image_len, images, logits })
    }
}

/// A loaded reader.
pub struct Reader {
    executor: Box<dyn Executor>,
    program: ProgramId,
    /// Values of each attribute.
    heads: Vec<usize>,
    image_len: usize,
    /// One batch.
    images: Vec<f32>,
    logits: Vec<f32>,
}

impl Reader {
    /// Any number of images `[H, W, 3]`, 8 bits, one after another.
    pub fn read(&mut self, rgb: &[u8]) -> Result<Vec<Reading>> {
        let images: Vec<f32> = rgb.iter().map(|&x| f32::from(x) / 127.5 - 1.0).collect();
        let logits = self.logits(&images)?;
        Ok(logits.chunks(self.heads.iter().sum()).map(|logits| self.answer(logits)).collect())
    }

    /// Images `[N, H, W, 3]` in [-1, 1] → logits `[N, values]`, the attributes side by side.
    pub fn logits(&mut self, images: &[f32]) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for images in images.chunks(self.images.len()) {
            // A last batch that is not full carries older images along; no image knows of its neighbours.
            self.images[..images.len()].copy_from_slice(images);
            self.executor.write(IMAGES, Data::F32(&self.images))?;
            self.executor.run(self.program)?;
            self.executor.read(LOGITS, DataMut::F32(&mut self.logits))?;
            if self.logits.iter().any(|x| !x.is_finite()) {
                return Err(Error::Numeric("what the reader makes of the images is not finite".into()));
            }
            all.extend_from_slice(&self.logits[..images.len() / self.image_len * self.heads.iter().sum::<usize>()]);
        }
        Ok(all)
    }

    /// The most probable value of every attribute.
    fn answer(&self, logits: &[f32]) -> Reading {
        let mut reading = Reading { cell: Cell::new(), confidence: 1.0 };
        let mut rest = logits;
        for &values in &self.heads {
            let head;
            (head, rest) = rest.split_at(values);
            let (value, best) = head
                .iter()
                .enumerate()
                .fold((0, f32::NEG_INFINITY), |best, (i, &x)| if x > best.1 { (i, x) } else { best });
            let total: f64 = head.iter().map(|&x| f64::from(x - best).exp()).sum();
            reading.cell.push(value);
            reading.confidence = reading.confidence.min(1.0 / total);
        }
        reading
    }
}
