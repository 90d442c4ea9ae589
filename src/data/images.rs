//! Images a user hands in: which files, their pixels and the prompt they carry.

use crate::data::{metadata, png_chunks};
use crate::weights::fingerprint;
use crate::{Error, Result, input};
use image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, Limits};
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

/// A decoded image.
#[derive(Clone)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// `[H, W, 3]`.
    pub rgb: Vec<u8>,
    /// What it was made from, where its PNG text says so; that of a JPEG or WebP is not looked for.
    pub prompt: Option<String>,
}

impl Picture {
    /// The pixels from `[top, left]` on, `[height, width]` of them.
    pub fn part(&self, [top, left]: [usize; 2], [height, width]: [usize; 2]) -> Picture {
        let row = |y: usize| &self.rgb[3 * ((top + y) * self.width + left)..][..3 * width];
        Picture { width, height, rgb: (0..height).flat_map(row).copied().collect(), prompt: None }
    }

    /// 16 hex digits that tell pictures apart by size and pixels, whatever file they came in. No cryptography.
    pub fn fingerprint(&self) -> String {
        let sides = [self.width as u64, self.height as u64].map(u64::to_le_bytes);
        format!("{:016x}", fingerprint(sides.into_iter().flatten().chain(self.rgb.iter().copied())))
    }
}

/// Larger images are refused before their pixels get memory; networks see a few hundred pixels a side.
const MOST_PIXELS: u64 = 1 << 27;
/// Larger files are not read at all: those of the most pixels, unpacked and of 16 bits, are half as large.
pub const MOST_BYTES: u64 = 1 << 31;

/// Files as given; a folder stands for every `.png`, `.jpg`, `.jpeg` and `.webp` in it, in the order of the bytes of their names.
pub fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in paths {
        if fs::metadata(path).map_err(Error::io("read", path))?.is_dir() {
            found.extend(in_folder(path)?);
        } else {
            found.push(path.clone());
        }
    }
    Ok(found)
}

fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_image = |path: &Path| {
        let is = |extension: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension));
        ["png", "jpg", "jpeg", "webp"].into_iter().any(is) && path.is_file()
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if is_image(&path) {
            found.push(path);
        }
    }
    found.sort();
    match found.is_empty() {
        true => Err(Error::file(folder, "holds no PNG, JPEG or WebP; name a folder of images")),
        false => Ok(found),
    }
}

/// The images that [`find`] finds, read one by one as the caller asks for them; of a broken one its error, so that the caller
/// may go on to the next.
pub fn read_all(paths: &[PathBuf]) -> Result<impl ExactSizeIterator<Item = (PathBuf, Result<Picture>)> + use<>> {
    Ok(find(paths)?.into_iter().map(|path| {
        let picture = read(&path);
        (path, picture)
    }))
}

/// Reads a PNG, JPEG or WebP; the content says which, not the name. Turned as its EXIF orientation asks; 16 bits rounded to 8, gray,
/// palette, CMYK and YCCK to RGB; colour profiles are ignored.
///
/// Errors name what cannot be read as it is meant: animations, transparent pixels (what lies behind is not known), files cut
/// short, and images of more than 2²⁷ pixels.
pub fn read(path: &Path) -> Result<Picture> {
    decode(path, None)
}

/// The same of an image that must be `side` x `side` pixels.
pub fn read_square(path: &Path, side: usize) -> Result<Picture> {
    decode(path, Some(side))
}

fn decode(path: &Path, side: Option<usize>) -> Result<Picture> {
    let wrong = |what: String| Error::file(path, what);
    let bytes = input::read(path, MOST_BYTES)?;
    let format = Format::of(&bytes).map_err(|what| wrong(format!("not a readable PNG, JPEG or WebP: {what}")))?;
    let unreadable = |what: String| wrong(format!("not a readable {format:?}: {what}"));
    let broken = |error: ImageError| unreadable(one_line(&error.to_string()));
    let mut prompt = None;
    let (mut decoder, is_animated) = match format {
        Format::PNG => {
            prompt = png_prompt(path, &bytes)?;
            let pixels = png_chunks::pixels(&bytes).map_err(unreadable)?;
            check_size((pixels.width, pixels.height), side).map_err(wrong)?;
            (png_decoder(pixels.bytes).map_err(broken)?, pixels.is_animated)
        }
        Format::JPEG if !jpeg_has_end(&bytes) => return Err(unreadable("it is cut short".into())),
        Format::JPEG => (Box::new(JpegDecoder::new(Cursor::new(&bytes)).map_err(broken)?) as Decoder<'_>, false),
        Format::WebP => {
            let decoder = WebPDecoder::new(Cursor::new(&bytes)).map_err(broken)?;
            let is_animated = decoder.has_animation();
            (Box::new(decoder) as Decoder<'_>, is_animated)
        }
    };
    check_size(decoder.dimensions(), side).map_err(wrong)?;
    if is_animated {
        return Err(wrong("is an animation; save the frame that is meant as an image".into()));
    }

    let orientation = decoder.orientation().map_err(broken)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(broken)?;
    image.apply_orientation(orientation);
    if image.color().has_alpha() {
        let rgba = image.into_rgba8();
        if rgba.pixels().any(|pixel| pixel[3] != u8::MAX) {
            return Err(wrong("has transparent pixels; flatten it onto a background first".into()));
        }
        image = DynamicImage::from(rgba);
    }
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Picture { width, height, rgb: image.into_rgb8().into_raw(), prompt })
}

type Decoder<'a> = Box<dyn ImageDecoder + 'a>;

/// Of a file of nothing but pixels; its limits are of one line of them.
fn png_decoder(bytes: Vec<u8>) -> Result<Decoder<'static>, ImageError> {
    Ok(Box::new(PngDecoder::with_limits(Cursor::new(bytes), Limits::default())?))
}

/// What a PNG says it was made from; other text may be as large or broken as it likes.
fn png_prompt(path: &Path, bytes: &[u8]) -> Result<Option<String>> {
    let texts = metadata::texts(path, bytes, |key| [metadata::RECORD, metadata::PARAMETERS].contains(&key))?;
    let texts: Vec<(String, String)> = texts.into_iter().map(|(key, text)| Ok((key, text?))).collect::<Result<_>>()?;
    Ok(metadata::prompt(&texts))
}

fn check_size((width, height): (u32, u32), side: Option<usize>) -> Result<(), String> {
    match side {
        Some(side) if [width as usize, height as usize] != [side; 2] => {
            Err(format!("is {width}x{height} pixels; only {side}x{side} images can be read"))
        }
        None | Some(_) if u64::from(width) * u64::from(height) > MOST_PIXELS => {
            Err(format!("is {width}x{height} pixels; at most {MOST_PIXELS} can be read: scale it down"))
        }
        None | Some(_) => Ok(()),
    }
}

/// What is read; named as in messages.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::upper_case_acronyms)]
enum Format {
    PNG,
    JPEG,
    WebP,
}

impl Format {
    /// What the bytes are, or what they are instead.
    fn of(bytes: &[u8]) -> Result<Format, String> {
        match image::guess_format(bytes) {
            Ok(ImageFormat::Png) => Ok(Format::PNG),
            Ok(ImageFormat::Jpeg) => Ok(Format::JPEG),
            Ok(ImageFormat::WebP) => Ok(Format::WebP),
            Ok(other) => Err(format!("it is a {}", format!("{other:?}").to_uppercase())),
            Err(_) if bytes.is_empty() => Err("it is empty".into()),
            Err(_) if bytes.get(4..8) == Some(b"ftyp") => Err("it is a HEIC image or a video".into()),
            Err(_) => Err("its content is no image".into()),
        }
    }
}

/// Whether a JPEG goes on to its end marker: the decoder would paint gray what is cut off.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    // Between segments lies compressed data, in which FF 00 is a byte, and FF 01 and FF D0 to D7 have no segment.
    let is_marker = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0x00 | 0x01 | 0xd0..=0xd7 | 0xff);
    while let Some(skipped) = bytes.get(at..).and_then(|rest| rest.windows(2).position(is_marker)) {
        at += skipped + 2;
        match (bytes[at - 1], bytes.get(at..at + 2)) {
            (0xd9, _) => return true,
            (_, Some(length)) => at += usize::from(u16::from_be_bytes([length[0], length[1]])),
            (_, None) => return false,
        }
    }
    false
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use png::ColorType;
    use std::fs::File;

    /// A 2x2 PNG of the given kind, read back.
    fn round_trip(color: ColorType, depth: png::BitDepth, data: &[u8]) -> Result<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("i.png");
        let mut encoder = png::Encoder::new(File::create(&path).unwrap(), 2, 2);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == ColorType::Indexed {
            encoder.set_palette(vec![9, 8, 7, 6, 5, 4]);
        }
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(data).unwrap();
        writer.finish().unwrap();
        read_square(&path, 2).map(|picture| picture.rgb)
    }

    #[test]
    fn parts_are_cut_out() {
        let rgb = (0..4 * 3).flat_map(|i| [i, i, 100 + i]).collect();
        let picture = Picture { width: 4, height: 3, rgb, prompt: None };
        let part = picture.part([1, 2], [2, 2]);
        let first: Vec<u8> = part.rgb.chunks(3).map(|pixel| pixel[0]).collect();
        assert_eq!((part.width, part.height, first), (2, 2, vec![6, 7, 10, 11]));
        assert_eq!(picture.part([0, 0], [3, 4]).rgb, picture.rgb);
    }

    #[test]
    fn every_kind_of_png_becomes_rgb() {
        use png::BitDepth::*;
        let gray = [[1; 3], [2; 3], [3; 3], [4; 3]].concat();
        assert_eq!(round_trip(ColorType::Grayscale, Eight, &[1, 2, 3, 4]).unwrap(), gray);
        assert_eq!(round_trip(ColorType::Grayscale, Sixteen, &[1, 9, 2, 9, 3, 9, 4, 9]).unwrap(), gray);
        assert_eq!(round_trip(ColorType::GrayscaleAlpha, Eight, &[1, 255, 2, 255, 3, 255, 4, 255]).unwrap(), gray);
        let rgb: Vec<u8> = (0..12).collect();
        assert_eq!(round_trip(ColorType::Rgb, Eight, &rgb).unwrap(), rgb);
        let mut rgba: Vec<u8> = rgb.chunks(3).flat_map(|p| [p[0], p[1], p[2], 255]).collect();
        assert_eq!(round_trip(ColorType::Rgba, Eight, &rgba).unwrap(), rgb);
        rgba[7] = 254;
        let error = round_trip(ColorType::Rgba, Eight, &rgba).unwrap_err().to_string();
        assert!(error.contains("i.png: has transparent pixels"), "{error}");
        let palette = round_trip(ColorType::Indexed, One, &[0b0100_0000, 0b1000_0000]).unwrap();
        assert_eq!(palette, [9, 8, 7, 6, 5, 4, 6, 5, 4, 9, 8, 7]);
    }
}
