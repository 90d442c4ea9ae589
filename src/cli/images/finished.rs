//! Which images of a command are made already: whole, made as asked, and with everything that was asked for beside them.

use crate::cli::atomic;
use crate::cli::flags::images::{ImageFlags, Noise};
use crate::cli::images::record::record;
use crate::cli::images::run::Extras;
use crate::cli::images::targets::{Selection, Target, Targets};
use crate::cli::images::trace::Traced;
use crate::cli::images::work::Work;
use crate::data::metadata::{self, Record};
use crate::data::textual_inversion;
use crate::{Error, Result, input};
use std::fs;
use std::io::{Cursor, ErrorKind};
use std::path::Path;

/// What is to be made, and what was found instead.
pub struct Chosen<'t> {
    pub selection: Selection<'t>,
    /// Bytes of the trace that are of finished images.
    pub trace_end: u64,
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
    let mut chosen = Chosen { selection: Selection::none_of(targets), trace_end: 0, unsigned: 0 };
    let resumes = args.resumes();
    let traced = match &extras.trace {
        Some(path) if resumes => Some(Traced::read(path, targets)?),
        Some(_) | None => None,
    };
    for target in targets.iter() {
        let is_there = is_there(&target.path)?;
        let token = extras.save_token.as_ref().map(|path| targets.beside(path, &target));
        token.iter().try_for_each(|token| atomic::check(token))?;
        // Side files cannot be made without the image.
        let trace_end = traced.as_ref().map(|traced| traced.end_of(target.index));
        let has_trace = extras.iterations == 0 || trace_end.is_none_or(|end| end.is_some());
        let has_token = token.is_none_or(|token| textual_inversion::read(&token).is_ok());
        if is_there && resumes && is_made(args, &target, work, noise, &mut chosen.unsigned)? && has_trace && has_token {
            chosen.trace_end = chosen.trace_end.max(trace_end.flatten().unwrap_or(0));
            continue;
        }
        if is_there {
            atomic::check(&target.path)?;
        }
        chosen.selection.add(target.index, !is_there);
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
/// How a whole PNG ends.
const END: &[u8] = b"\0\0\0\0IEND\xaeB`\x82";

/// Holds a file against the record of an image.
pub fn examine(path: &Path, record: &Record) -> Result<Found> {
    let bytes = input::read(path, MOST_BYTES)?;
    if bytes.is_empty() {
        return Ok(Found::Damaged);
    }
    // Checksums are verified.
    let Ok(mut reader) = png::Decoder::new(Cursor::new(&bytes)).read_info() else { return Ok(Found::NoImage) };
    let signed = |texts: Result<Vec<_>, _>| metadata::record(&texts.unwrap_or_default());
    // Ours stands before the pixels.
    let before = signed(metadata::texts(reader.info()));
    let info = reader.info();
    let (width, height) = (info.width as usize, info.height as usize);
    let mut pixels = vec![0; if before.is_some() { reader.output_buffer_size().unwrap_or(0) } else { 0 }];
    let is_read = before.is_none() || reader.next_frame(&mut pixels).is_ok();
    let is_whole = is_read && reader.finish().is_ok() && bytes.ends_with(END);
    let made = match before {
        Some(found) => Some(found),
        None if is_whole => signed(metadata::texts(reader.info())),
        None => return Ok(Found::NoImage),
    };
    Ok(match made {
        None => Found::Unsigned,
        Some(Ok(found)) if found.same_image(record) && (width, height) == (record.width, record.height) => {
            if is_whole {
                Found::Image
            } else {
                Found::Damaged
            }
        }
        Some(Ok(_) | Err(_)) => Found::Otherwise,
    })
}
