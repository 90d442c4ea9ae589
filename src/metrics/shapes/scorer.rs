//! One image of the `shapes` world at a time, read where it was made: what scores and contact sheets say of it.

use super::{Instrument, Reader, World};
use crate::exec::cpu::Cpu;
use crate::program::DType;
use crate::{Error, Result};

/// What is seen in an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShapesScore {
    /// Nats; −∞ for what the world does not hold.
    pub log_density: f64,
    /// Attributes the prompt states, and those of them that are otherwise in the image. 0 for a prompt outside the grammar.
    pub stated: usize,
    pub wrong: usize,
}

impl ShapesScore {
    /// Fraction of what the prompt states that is in the image; 1 where it states nothing.
    pub fn agreement(&self) -> f64 {
        if self.stated == 0 { 1.0 } else { 1.0 - self.wrong as f64 / self.stated as f64 }
    }
}

/// The embedded reader on the CPU.
pub struct ShapesScorer {
    world: World,
    reader: Reader,
}

impl ShapesScorer {
    /// `Error::Usage` where images are to have another size than the world's.
    pub fn open(width: usize, height: usize) -> Result<ShapesScorer> {
        let world = World::embedded()?;
        let side = world.image_size;
        if [width, height] != [side; 2] {
            let what = format!("images of the `shapes` world are {side}x{side}, not {width}x{height}; see --size");
            return Err(Error::Usage(what));
        }
        let instrument = Instrument::embedded(&world)?;
        let cpu = Box::new(Cpu::<f32>::new());
        let planned = instrument.plan(&*cpu, DType::F32, 1)?;
        Ok(ShapesScorer { reader: instrument.load(cpu, planned)?, world })
    }

    /// Of an image `[H, W, 3]` of that size.
    pub fn score(&mut self, prompt: &str, rgb: &[u8]) -> Result<ShapesScore> {
        let bytes = 3 * self.world.image_size.pow(2);
        if rgb.len() != bytes {
            return Err(Error::Usage(format!("an image of {} bytes where the reader takes {bytes}", rgb.len())));
        }
        let reading = self.reader.read(rgb)?.swap_remove(0);
        let stated: Vec<(usize, usize)> = match self.world.parse(prompt) {
            Ok(statement) => statement.iter().enumerate().filter_map(|(i, value)| Some((i, (*value)?))).collect(),
            Err(_) => vec![],
        };
        let wrong = stated.iter().filter(|(index, value)| reading.cell[*index] != *value).count();
        Ok(ShapesScore { log_density: self.world.log_density(&reading.cell), stated: stated.len(), wrong })
    }
}
