//! What is made of reference images is kept from run to run: a row per picture and network.

use crate::data::images::Picture;
use crate::exec::{Executor, ProgramId};
use crate::plan::Planned;
use crate::weights::{Component, Model};
use crate::{Error, Result};

/// Where rows are kept; whoever keeps them knows what else than the key decides their bits: the device, the version of this program.
pub trait ReferenceCache {
    /// Of so many numbers; `None` where there is none, or a damaged one.
    fn read(&self, key: &str, len: usize) -> Option<Vec<f32>>;

    /// In the place of what is there.
    fn write(&self, key: &str, row: &[f32]) -> Result<()>;
}

/// Of how pictures are brought to a network's size and its output to a row: counts up with every change of a bit.
const VERSION: u32 = 1;

/// A network that makes a row of every picture; it is loaded once a row is not kept.
pub(super) struct Encoder<'a> {
    cache: Option<&'a dyn ReferenceCache>,
    model: &'a Model,
    planned: Planned,
    program: Option<ProgramId>,
    /// What decides a row besides the picture.
    key: String,
}

impl<'a> Encoder<'a> {
    /// `how` says how pictures are shown to the network.
    pub fn new(
        cache: Option<&'a dyn ReferenceCache>,
        model: &'a Model,
        (component, planned): (Component, Planned),
        how: &str,
    ) -> Result<Encoder<'a>> {
        let weights = cache.map(|_| model.fingerprint_of(component)).transpose()?.unwrap_or_default();
        let key = format!("{VERSION} {component:?} {weights} {} {how}", planned.program.dtype);
        Ok(Encoder { cache, model, planned, program: None, key })
    }

    /// `len` numbers of a picture, and of the noise that `draw` says goes into them, which `make` makes.
    pub fn row(
        &mut self,
        executor: &mut dyn Executor,
        (picture, draw): (&Picture, Option<(u64, u64)>),
        len: usize,
        make: impl FnOnce(&mut dyn Executor, ProgramId) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let key = format!("{} {draw:?} {}", self.key, picture.fingerprint());
        if let Some(row) = self.cache.and_then(|cache| cache.read(&key, len)) {
            return Ok(row);
        }
        let program = match self.program {
            Some(program) => program,
            None => *self.program.insert(executor.load(self.planned.clone(), self.model)?),
        };
        let row = make(executor, program)?;
        if row.iter().any(|x| !x.is_finite()) {
            return Err(Error::NotFinite("what is made of the reference images".into()));
        }
        self.cache.map_or(Ok(()), |cache| cache.write(&key, &row))?;
        Ok(row)
    }
}
