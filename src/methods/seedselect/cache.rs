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

/// A network that makes a row of every picture; it is loaded where some row is not kept.
pub(super) struct Encoder<'a> {
    cache: Option<&'a dyn ReferenceCache>,
    model: &'a Model,
    planned: Planned,
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
        Ok(Encoder { cache, model, planned, key })
    }

    /// Rows of `len` numbers. `make` makes that of picture `index`; `draw` says what noise goes into it.
    pub fn rows(
        self,
        executor: &mut dyn Executor,
        pictures: &[Picture],
        len: usize,
        draw: impl Fn(usize) -> Option<(u64, u64)>,
        make: impl Fn(&mut dyn Executor, ProgramId, usize) -> Result<Vec<f32>>,
    ) -> Result<Vec<Vec<f32>>> {
        let Encoder { cache, model, planned, key } = self;
        let key = |(index, picture): (usize, &Picture)| format!("{key} {:?} {}", draw(index), picture.fingerprint());
        let keys: Vec<String> = pictures.iter().enumerate().map(key).collect();
        let kept: Vec<Option<Vec<f32>>> = keys.iter().map(|key| cache?.read(key, len)).collect();
        if kept.iter().all(Option::is_some) {
            return Ok(kept.into_iter().flatten().collect());
        }
        let program = executor.load(planned, model)?;
        let make = |(index, (row, key)): (usize, (Option<Vec<f32>>, String))| match row {
            Some(row) => Ok(row),
            None => {
                let row = make(executor, program, index)?;
                if row.iter().any(|x| !x.is_finite()) {
                    return Err(Error::NotFinite("what is made of the reference images".into()));
                }
                cache.map_or(Ok(()), |cache| cache.write(&key, &row))?;
                Ok(row)
            }
        };
        kept.into_iter().zip(keys).enumerate().map(make).collect()
    }
}
