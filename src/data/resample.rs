//! Pictures of any size as a network takes them: resized with antialias, cropped in the middle, from -1 to 1.

use crate::data::images::Picture;
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Rgb, RgbImage};

type Pixels = ImageBuffer<Rgb<f32>, Vec<f32>>;

/// `[height, width, 3]` from -1 to 1: the picture at the scale at which it just covers the frame, then its middle.
pub fn cover(picture: &Picture, width: usize, height: usize) -> Vec<f32> {
    // Whichever side is the tighter one is fitted; the other is rounded down, as torchvision does, and at least as long as the frame.
    let scaled = |side: usize, of: usize, to: usize| side * to / of;
    let (wide, tall) = match picture.width * height >= picture.height * width {
        true => (scaled(picture.width, picture.height, height), height),
        false => (width, scaled(picture.height, picture.width, width)),
    };
    let (x, y) = ((wide - width) / 2, (tall - height) / 2);
    signed(
        &imageops::crop_imm(&resized(picture, wide, tall), x as u32, y as u32, width as u32, height as u32).to_image(),
    )
}

/// The same of the whole picture, whatever its aspect.
pub fn squash(picture: &Picture, width: usize, height: usize) -> Vec<f32> {
    signed(&resized(picture, width, height))
}

/// [`squash`] as Pillow 8 did it: along rows, then along columns, each rounded to bytes.
pub fn squash_in_bytes(picture: &Picture, width: usize, height: usize) -> Vec<f32> {
    let (wide, tall) = (picture.width as u32, picture.height as u32);
    let from = RgbImage::from_raw(wide, tall, picture.rgb.clone()).unwrap_or_default();
    let rows = imageops::resize(&from, width as u32, tall, FilterType::CatmullRom);
    let both = imageops::resize(&rows, width as u32, height as u32, FilterType::CatmullRom);
    both.iter().map(|&x| f32::from(x) / 127.5 - 1.0).collect()
}

/// Bicubic with a = -0.5 and antialias, as Pillow and torchvision resize.
fn resized(picture: &Picture, width: usize, height: usize) -> Pixels {
    let pixels = picture.rgb.iter().map(|&x| f32::from(x) / 255.0).collect();
    let from = Pixels::from_raw(picture.width as u32, picture.height as u32, pixels).unwrap_or_default();
    match (picture.width, picture.height) == (width, height) {
        true => from,
        false => imageops::resize(&from, width as u32, height as u32, FilterType::CatmullRom),
    }
}

fn signed(pixels: &Pixels) -> Vec<f32> {
    pixels.iter().map(|x| 2.0 * x - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture whose red is the column and whose green is the row.
    fn ramp(width: usize, height: usize) -> Picture {
        let pixel = |i: usize| [(i % width) as u8, (i / width) as u8, 7];
        Picture { width, height, rgb: (0..width * height).flat_map(pixel).collect(), prompt: None }
    }

    fn byte(x: f32) -> f32 {
        (x + 1.0) * 127.5
    }

    #[test]
    fn what_fits_is_not_resampled() {
        let picture = ramp(8, 6);
        for made in [cover(&picture, 8, 6), squash(&picture, 8, 6)] {
            assert!(made.iter().zip(&picture.rgb).all(|(x, &exact)| (byte(*x) - f32::from(exact)).abs() < 1e-3));
        }
    }

    #[test]
    fn the_middle_is_kept() {
        // 40 x 20 to 10 x 10: half the size is cut off left and right.
        let made = cover(&ramp(40, 20), 10, 10);
        assert_eq!(made.len(), 300);
        let (red, green) = (|x: usize| byte(made[3 * (50 + x)]), |y: usize| byte(made[3 * (10 * y + 5) + 1]));
        assert!((red(0) - 10.5).abs() < 0.1 && (red(9) - 28.5).abs() < 0.1, "{} {}", red(0), red(9));
        assert!((green(4) - 8.5).abs() < 0.1, "{}", green(4));
        let tall = cover(&ramp(20, 40), 10, 10);
        assert!((byte(tall[1]) - 10.5).abs() < 0.1);
    }

    #[test]
    fn all_of_it_is_squashed() {
        let made = squash(&ramp(40, 20), 10, 10);
        assert!((byte(made[3 * 55]) - 21.5).abs() < 0.1 && (byte(made[3 * 55 + 1]) - 10.5).abs() < 0.1);
    }

    #[test]
    fn any_aspect_covers() {
        for (width, height) in [(1, 1), (1, 90), (90, 1), (333, 500), (64, 65)] {
            assert_eq!(cover(&ramp(width, height), 64, 64).len(), 3 * 64 * 64, "{width}x{height}");
        }
    }
}
