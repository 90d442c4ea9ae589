//! Which images of a command are made already: whole, made as asked, and with everything that was asked for beside them.

use crate::cli::flags::images::{ImageFlags, Noise};
use crate::cli::images::preview;
use crate::cli::images::record::record;
use crate::cli::images::state;
use crate::cli::images::targets::{Selection, Target, Targets};
use crate::cli::images::trace::Traced;
use crate::cli::images::work::Work;
use crate::cli::{atomic, tensors};
use crate::data::metadata::{self, Record};
use crate::data::textual_inversion;
use crate::{Error, Result, input};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What only some methods write.
#[derive(Default)]
pub struct Extras {
    /// Learned tokens, one file per image.
    pub save_token: Option<PathBuf>,
    /// Optimised noises, one file per image.
    pub save_noise: Option<PathBuf>,
    /// Starting noises that no file holds, a row per image.
    pub noise: Noise,
    /// A run is kept between its iterations ([`state`]), and where that is asked for, gone on with.
    pub keeps_state: bool,
    pub resume: bool,
    /// Images are shown while they are optimised ([`preview`]).
    pub previews: bool,
    /// JSON lines, one per iteration.
    pub trace: Option<PathBuf>,
    /// What all took and what came of it, JSON; whoever asks for it writes it.
    pub report: Option<PathBuf>,
    /// Of an optimiser, per image: lines of the trace.
    pub iterations: usize,
}

/// What is to be made, and what was found instead.
pub struct Chosen<'t> {
    pub selection: Selection<'t>,
    /// Bytes of the trace that are kept: those of finished images, and of the one that is gone on with.
    pub trace_end: u64,
    /// That one, and the first iteration that there is no line of.
    pub traced: Option<(usize, usize)>,
    /// Images that say nothing of how they were made and are taken at their names.
    pub unsigned: usize,
}

/// The targets that are not made yet; without a prompt file every image is made.
pub fn choose<'t>(
    args: &ImageFlags,
    extras: &Extras,
    work: &Work<'_>,
    noise: &Noise,
    targets: &'t Targets,
) -> Result<Chosen<'t>> {
    let mut chosen = Chosen { selection: Selection::none_of(targets), trace_end: 0, traced: None, unsigned: 0 };
    let resumes = args.resumes() || extras.resume;
    let traced = match &extras.trace {
        Some(path) if resumes => Some(Traced::read(path, targets)?),
        Some(_) | None => None,
    };
    for target in targets.iter() {
        let is_there = is_there(&target.path)?;
        let token = extras.save_token.as_ref().map(|path| targets.beside(path, &target));
        let noise_file = extras.save_noise.as_ref().map(|path| targets.beside(path, &target));
        token.iter().chain(&noise_file).try_for_each(|path| atomic::check(path))?;
        // Side files cannot be made without the image.
        let lines = traced.as_ref().map(|traced| traced.of(target.index));
        let has_trace = lines.is_none_or(|lines| lines.count >= extras.iterations);
        let has_token = token.is_none_or(|token| textual_inversion::read(&token).is_ok());
        let has_noise = noise_file.is_none_or(|path| tensors::is_noise(&path));
        let has_all = has_trace && has_token && has_noise;
        if is_there && resumes && is_made(args, &target, work, noise, &mut chosen.unsigned)? && has_all {
            chosen.trace_end = chosen.trace_end.max(lines.map_or(0, |lines| lines.end));
            if extras.keeps_state {
                // A run that was killed as it had written the image.
                state::remove(&target)?;
            }
            if extras.previews && extras.resume {
                preview::remove(&target)?;
            }
            continue;
        }
        if is_there {
            atomic::check(&target.path)?;
        }
        chosen.selection.add(target.index, !is_there);
    }
    if let (Some(traced), true, false) = (&traced, extras.resume, chosen.selection.is_empty()) {
        let first = chosen.selection.targets(0..1).swap_remove(0);
        if state::is_there(&first) {
            (chosen.traced, chosen.trace_end) = (Some((first.index, traced.of(first.index).next)), traced.end());
        }
    }
    Ok(chosen)
}

fn is_there(path: &Path) -> Result<bool> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Whether the file is the target's image. What is neither that nor a damaged one of ours is somebody's: an error.
fn is_made(args: &ImageFlags, target: &Target, work: &Work<'_>, noise: &Noise, unsigned: &mut usize) -> Result<bool> {
    let what = match examine(&target.path, &record(&args.run, work, noise, target)?)? {
        Found::Image => return Ok(true),
        Found::Damaged => return Ok(false),
        Found::Unsigned if args.output.no_metadata => {
            *unsigned += 1;
            return Ok(true);
        }
        Found::Unsigned => "does not say how it was made",
        Found::Otherwise => "was made with other settings",
        Found::NoImage => "is no whole PNG",
    };
    Err(Error::Usage(format!("{}: {what}; choose another --out, or --overwrite", target.path.display())))
}

/// What a file is in place of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// That image, whole.
    Image,
    /// That image, or nothing, after a disk or a machine failed.
    Damaged,
    /// A whole image without a record.
    Unsigned,
    /// Made as its record says, which is not this one.
    Otherwise,
    NoImage,
}

/// Larger files are no image of ours: 16384 × 16384 pixels take less.
const MOST_BYTES: u64 = 1 << 30;

/// Holds a file against the record of an image.
pub fn examine(path: &Path, record: &Record) -> Result<Found> {
    let bytes = input::read(path, MOST_BYTES)?;
    if bytes.is_empty() {
        return Ok(Found::Damaged);
    }
    let (signed, whole) = (metadata::record_before_damage(&bytes), metadata::whole_png(&bytes));
    Ok(match (signed, whole) {
        (None, None) => Found::NoImage,
        (None, Some(_)) => Found::Unsigned,
        (Some(Ok(found)), _) if found.same_image(record) => match whole == Some([record.width, record.height]) {
            true => Found::Image,
            false => Found::Damaged,
        },
        (Some(_), _) => Found::Otherwise,
    })
}
