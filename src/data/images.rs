//! Images a user hands in: which files, their pixels and the prompt they carry.

use crate::data::metadata;
use crate::{Error, Result};
use png::{ColorType, DecodingError, Transformations};
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// A decoded PNG.
pub struct Picture {
    /// `[H, W, 3]`.
    pub rgb: Vec<u8>,
    pub prompt: Option<String>,
}

/// Files as given; a folder stands for every `.png` in it, by name.
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
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() { Err(Error::file(folder, "holds no PNG; name a folder of images")) } else { Ok(found) }
}

/// Reads a PNG of `side` x `side` pixels: gray, palette or RGB, 16 bits cut to 8; opaque, for what lies behind is not known.
pub fn read(path: &Path, side: usize) -> Result<Picture> {
    let broken = |error: DecodingError| Error::file(path, format!("not a readable PNG: {error}"));
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut decoder = png::Decoder::new(BufReader::new(file));
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(broken)?;
    let (width, height) = reader.info().size();
    if [width as usize, height as usize] != [side, side] {
        return Err(Error::file(path, format!("is {width}x{height} pixels; only {side}x{side} images can be read")));
    }
    // RGBA at most, and no two rows apart: the size is known to be small.
    let mut pixels = vec![0; 4 * side * side];
    let frame = reader.next_frame(&mut pixels).map_err(broken)?;
    pixels.truncate(frame.buffer_size());
    // Text may follow the pixels.
    reader.finish().map_err(broken)?;
    let prompt = metadata::prompt(&metadata::texts(reader.info()).map_err(broken)?);

    let channels = frame.color_type.samples();
    let has_alpha = matches!(frame.color_type, ColorType::GrayscaleAlpha | ColorType::Rgba);
    if has_alpha && pixels.chunks(channels).any(|pixel| pixel[channels - 1] != u8::MAX) {
        return Err(Error::file(path, "has transparent pixels; flatten it onto a background first"));
    }
    let rgb = match frame.color_type {
        ColorType::Rgb => pixels,
        ColorType::Rgba => pixels.chunks(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
        ColorType::Grayscale | ColorType::GrayscaleAlpha | ColorType::Indexed => {
            pixels.chunks(channels).flat_map(|pixel| [pixel[0]; 3]).collect()
        }
    };
    Ok(Picture { rgb, prompt })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        read(&path, 2).map(|picture| picture.rgb)
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
