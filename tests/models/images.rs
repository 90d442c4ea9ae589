//! Images a user hands in: every format and colour type to RGB, EXIF orientation, and one line for what cannot be read.

use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{DynamicImage, ExtendedColorType, ImageBuffer, ImageEncoder, Rgb, RgbImage};
use rarebit::data::images::{Picture, find, read, read_all, read_square};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// 3x2 pixels, all different.
const PIXELS: [[u8; 3]; 6] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [9, 90, 200], [255, 255, 255]];

fn small() -> RgbImage {
    RgbImage::from_raw(3, 2, PIXELS.concat()).unwrap()
}

fn png(image: &DynamicImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(vec![]);
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// Lossless.
fn webp(image: &[u8], width: u32, height: u32, exif: Option<Vec<u8>>) -> Vec<u8> {
    let mut bytes = vec![];
    let mut encoder = WebPEncoder::new_lossless(&mut bytes);
    exif.into_iter().for_each(|exif| encoder.set_exif_metadata(exif).unwrap());
    encoder.write_image(image, width, height, ExtendedColorType::Rgb8).unwrap();
    bytes
}

/// Flat blocks of 16x16 pixels in the colours of `image`, which survive JPEG's 8x8 transform and its halved colour.
fn jpeg(image: &RgbImage) -> Vec<u8> {
    let large = image::imageops::resize(image, 16 * image.width(), 16 * image.height(), image::imageops::Nearest);
    let mut bytes = vec![];
    JpegEncoder::new_with_quality(&mut bytes, 95).encode_image(&large).unwrap();
    bytes
}

/// An EXIF block of one entry, the orientation; big-endian.
fn exif(orientation: u8) -> Vec<u8> {
    let mut block = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    block.extend([orientation, 0, 0, 0, 0, 0, 0]);
    block
}

/// The JPEG with an EXIF segment after its first marker.
fn with_exif(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let payload = [b"Exif\0\0".to_vec(), exif(orientation)].concat();
    let length = u16::try_from(payload.len() + 2).unwrap().to_be_bytes();
    [&jpeg[..2], &[0xff, 0xe1], &length, &payload, &jpeg[2..]].concat()
}

/// The PNG with another chunk after its header.
fn with_chunk(png: &[u8], kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    const HEADER_END: usize = 8 + 12 + 13;
    let body = [&kind[..], data].concat();
    let mut crc = flate2::Crc::new();
    crc.update(&body);
    let length = u32::try_from(data.len()).unwrap().to_be_bytes();
    [&png[..HEADER_END], &length, &body, &crc.sum().to_be_bytes(), &png[HEADER_END..]].concat()
}

fn try_read(name: &str, bytes: &[u8]) -> rarebit::Result<Picture> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    read(&path)
}

/// The one line that reading ends in: it names the file and says `what`.
#[track_caller]
fn refused(name: &str, bytes: &[u8], what: &str) {
    let error = try_read(name, bytes).err().unwrap_or_else(|| panic!("{name} was read")).to_string();
    assert!(error.contains(&format!("{name}: ")) && error.contains(what) && !error.contains('\n'), "{error}");
}

/// Pixels `[y][x]` of a picture, one of every `step` in the middle of its block.
fn rows(picture: &Picture, step: usize) -> Vec<Vec<[u8; 3]>> {
    assert_eq!(picture.rgb.len(), 3 * picture.width * picture.height);
    let pixel = |x: usize, y: usize| {
        let at = 3 * ((y * step + step / 2) * picture.width + x * step + step / 2);
        [picture.rgb[at], picture.rgb[at + 1], picture.rgb[at + 2]]
    };
    (0..picture.height / step).map(|y| (0..picture.width / step).map(|x| pixel(x, y)).collect()).collect()
}

#[track_caller]
fn near(found: &[Vec<[u8; 3]>], expected: &[Vec<[u8; 3]>], within: u8) {
    let flat = |rows: &[Vec<[u8; 3]>]| rows.iter().map(|row| row.concat()).collect::<Vec<_>>();
    assert_eq!(
        flat(found).iter().map(Vec::len).collect::<Vec<_>>(),
        flat(expected).iter().map(Vec::len).collect::<Vec<_>>()
    );
    let off = flat(found).concat().into_iter().zip(flat(expected).concat()).map(|(a, b)| a.abs_diff(b)).max();
    assert!(off.unwrap() <= within, "{found:?}, not {expected:?}");
}

#[test]
fn the_content_decides_the_format() {
    let expected: Vec<Vec<[u8; 3]>> = PIXELS.chunks(3).map(<[_]>::to_vec).collect();
    for name in ["a.png", "a.jpg", "a.webp", "a.txt", "a"] {
        let picture = try_read(name, &png(&small().into())).unwrap();
        assert_eq!((picture.width, picture.height, rows(&picture, 1)), (3, 2, expected.clone()), "{name}");
        assert_eq!(rows(&try_read(name, &webp(&small(), 3, 2, None)).unwrap(), 1), expected, "{name}");
        near(&rows(&try_read(name, &jpeg(&small())).unwrap(), 16), &expected, 3);
    }
}

/// Where the pixels of a 2x3 image stored as 1 2 3 / 4 5 6 are to be seen, by orientation: the table of the EXIF standard (0th row
/// and 0th column: top and left, top and right, bottom and right, bottom and left, then transposed).
#[test]
fn exif_orientations() {
    let shown: [&[&[usize]]; 8] = [
        &[&[1, 2, 3], &[4, 5, 6]],
        &[&[3, 2, 1], &[6, 5, 4]],
        &[&[6, 5, 4], &[3, 2, 1]],
        &[&[4, 5, 6], &[1, 2, 3]],
        &[&[1, 4], &[2, 5], &[3, 6]],
        &[&[4, 1], &[5, 2], &[6, 3]],
        &[&[6, 3], &[5, 2], &[4, 1]],
        &[&[3, 6], &[2, 5], &[1, 4]],
    ];
    let stored = jpeg(&small());
    for (orientation, shown) in (1..).zip(shown) {
        let expected: Vec<Vec<[u8; 3]>> =
            shown.iter().map(|row| row.iter().map(|pixel| PIXELS[pixel - 1]).collect()).collect();
        let picture = try_read("a.jpg", &with_exif(&stored, orientation)).unwrap();
        near(&rows(&picture, 16), &expected, 3);
        let picture = try_read("a.png", &with_chunk(&png(&small().into()), b"eXIf", &exif(orientation))).unwrap();
        assert_eq!(rows(&picture, 1), expected, "PNG, {orientation}");
        let picture = try_read("a.webp", &webp(&small(), 3, 2, Some(exif(orientation)))).unwrap();
        assert_eq!(rows(&picture, 1), expected, "WebP, {orientation}");
    }
    // What is no orientation turns nothing.
    assert_eq!(try_read("a.png", &with_chunk(&png(&small().into()), b"eXIf", &exif(9))).unwrap().width, 3);
}

#[test]
fn sixteen_bits_are_rounded() {
    let values = [0u16, 128, 129, 257, 385, 386, 32767, 32768, 65406, 65407, 65535, 771];
    let image = ImageBuffer::<Rgb<u16>, _>::from_raw(2, 2, values.to_vec()).unwrap();
    let expected: Vec<u8> = values.iter().map(|x| (f64::from(*x) * 255.0 / 65535.0).round() as u8).collect();
    assert_eq!(try_read("a.png", &png(&image.into())).unwrap().rgb, expected);
}

#[test]
fn alpha_must_be_opaque() {
    let rgba =
        |alpha: u8| DynamicImage::from(small()).into_rgba8().pixels().flat_map(|p| [p[0], p[1], p[2], alpha]).collect();
    let image = |alpha: u8| DynamicImage::from(image::RgbaImage::from_raw(3, 2, rgba(alpha)).unwrap());
    assert_eq!(try_read("a.png", &png(&image(255))).unwrap().rgb, PIXELS.concat());
    refused("a.png", &png(&image(254)), "has transparent pixels");
    let mut bytes = vec![];
    WebPEncoder::new_lossless(&mut bytes).write_image(image(9).as_bytes(), 3, 2, ExtendedColorType::Rgba8).unwrap();
    refused("a.webp", &bytes, "has transparent pixels");
}

/// Ink to light. `cmyk.jpg` and `ycck.jpg` come from Pillow, and what is expected is what Pillow reads in them (tests/data/README.md).
#[test]
fn cmyk_jpegs() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images");
    let colours = |name: &str| rows(&read(&folder.join(name)).unwrap(), 16);
    near(&colours("cmyk.jpg"), &[vec![[255, 0, 0], [42, 164, 195]]], 2);
    near(&colours("ycck.jpg"), &[vec![[179, 0, 227], [17, 195, 35]]], 2);
}

#[test]
fn gray_jpegs() {
    let gray = DynamicImage::from(image::GrayImage::from_pixel(16, 16, image::Luma([77])));
    let mut bytes = vec![];
    JpegEncoder::new_with_quality(&mut bytes, 95).encode_image(&gray).unwrap();
    near(&rows(&try_read("a.jpg", &bytes).unwrap(), 16), &[vec![[77; 3]]], 1);
}

#[test]
fn prompts_come_from_png_text() {
    let plain = png(&small().into());
    assert_eq!(try_read("a.png", &plain).unwrap().prompt, None);
    let text = b"parameters\0a red star\nSteps: 2, Seed: 1";
    assert_eq!(try_read("a.png", &with_chunk(&plain, b"tEXt", text)).unwrap().prompt.as_deref(), Some("a red star"));
    assert_eq!(try_read("a.jpg", &jpeg(&small())).unwrap().prompt, None);
}

#[test]
fn cut_files_are_refused_at_every_length() {
    let whole = [
        ("a.png", png(&small().into())),
        ("a.jpg", with_exif(&jpeg(&small()), 6)),
        ("b.webp", webp(&small(), 3, 2, Some(exif(6)))),
    ];
    let folder = TempDir::new().unwrap();
    for (name, bytes) in whole {
        let path = folder.path().join(name);
        for length in 0..bytes.len() {
            fs::write(&path, &bytes[..length]).unwrap();
            let Err(error) = read(&path) else { panic!("{name}: {length} of {} bytes were read", bytes.len()) };
            let error = error.to_string();
            assert!(error.contains(name) && error.contains("not a readable") && !error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn damaged_files_never_panic() {
    for bytes in [png(&small().into()), with_exif(&jpeg(&small()), 6), webp(&small(), 3, 2, Some(exif(6)))] {
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0xff;
            if let Err(error) = try_read("a", &damaged) {
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
}

#[test]
fn what_is_no_image_is_named() {
    refused("a.png", b"", "not a readable PNG, JPEG or WebP: it is empty");
    refused("a.jpg", b"GIF89a\x01\0\x01\0", "it is a GIF");
    refused("a.jpg", b"\0\0\0\x18ftypheic", "it is a HEIC image or a video");
    refused("a.webp", b"<html>not found</html>", "its content is no image");
    let folder = TempDir::new().unwrap();
    let error = read(folder.path()).err().unwrap().to_string();
    assert!(error.contains("is not a regular file"), "{error}");
    let error = read(&folder.path().join("none.png")).err().unwrap().to_string();
    assert!(error.starts_with("cannot read ") && error.contains("none.png"), "{error}");
}

#[test]
fn animations_are_refused() {
    let apng = with_chunk(&png(&small().into()), b"acTL", &[0, 0, 0, 2, 0, 0, 0, 0]);
    refused("a.png", &apng, "is an animation");
    // A WebP whose header has the flag for animation (bit 1), with its global parameters and one frame of the still image.
    let still = webp(&small(), 3, 2, None);
    let frame = [&[0; 6][..], &[2, 0, 0, 1, 0, 0], &[100, 0, 0, 0], &still[12..]].concat();
    let chunk = |kind: &[u8], data: &[u8]| [kind, &u32::try_from(data.len()).unwrap().to_le_bytes(), data].concat();
    let chunks = [
        b"WEBP".to_vec(),
        chunk(b"VP8X", &[2, 0, 0, 0, 2, 0, 0, 1, 0, 0]),
        chunk(b"ANIM", &[0; 6]),
        chunk(b"ANMF", &frame),
    ];
    refused("a.webp", &chunk(b"RIFF", &chunks.concat()), "is an animation");
}

/// Text, profiles and palettes that are wrong, or unfold to more than memory holds, make no other pixels and cost none.
#[test]
fn what_makes_no_pixels_is_not_unfolded() {
    let plain = png(&small().into());
    let expected = try_read("a.png", &plain).unwrap().rgb;
    let mut bomb = flate2::write::ZlibEncoder::new(vec![], flate2::Compression::best());
    for _ in 0..1 << 10 {
        std::io::Write::write_all(&mut bomb, &[0; 1 << 18]).unwrap();
    }
    let bomb = bomb.finish().unwrap();
    let chunk = |kind: &[u8; 4], head: &[u8]| with_chunk(&plain, kind, &[head, &bomb].concat());
    for bytes in [
        chunk(b"zTXt", b"k\0\0"),
        chunk(b"iTXt", b"k\0\x01\0\0\0"),
        chunk(b"iCCP", b"k\0\0"),
        chunk(b"uNKn", b""),
        with_chunk(&plain, b"bKGD", &[]),
        with_chunk(&plain, b"iTXt", b"k\0\0\0\0\0\xff"),
        with_chunk(&plain, b"fcTL", &[0; 26]),
    ] {
        assert_eq!(try_read("a.png", &bytes).unwrap().rgb, expected);
    }
    refused("a.png", &chunk(b"zTXt", b"parameters\0\0"), "text 'parameters' is longer than 8388608 bytes");
    for entries in [1, 2, 4, 5, 7, 770] {
        refused("a.png", &with_chunk(&plain, b"PLTE", &vec![7; entries]), "its palette ends within a colour");
    }
    // The same in a picture that has a palette.
    let mut bytes = vec![];
    let mut encoder = png::Encoder::new(&mut bytes, 3, 2);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_palette(vec![9, 8, 7, 6, 5, 4]);
    encoder.write_header().unwrap().write_image_data(&[0, 1, 0, 1, 0, 1]).unwrap();
    let at = bytes.windows(4).position(|kind| kind == b"PLTE").unwrap();
    let short = with_chunk(&[&bytes[..at - 4], &bytes[at + 14..]].concat(), b"PLTE", &[9, 8, 7, 6]);
    refused("a.png", &short, "its palette ends within a colour");
    refused("a.png", &[&bytes[..at - 4], &bytes[at + 14..]].concat(), "not a readable PNG");
}

/// A file of a few bytes that says it holds 4 thousand million pixels.
#[test]
fn huge_sizes_are_refused_before_they_take_memory() {
    let mut bytes = png(&small().into());
    bytes[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0xff, 0xff]);
    let mut crc = flate2::Crc::new();
    crc.update(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    refused("a.png", &bytes, "is 65536x65535 pixels; at most 134217728 can be read");

    let mut bytes = jpeg(&small());
    let frame = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    bytes[frame + 5..frame + 9].fill(0xff);
    refused("a.jpg", &bytes, "is 65535x65535 pixels");
}

#[test]
fn squares_of_one_side() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.webp");
    fs::write(&path, webp(&[7; 3 * 16], 4, 4, None)).unwrap();
    assert_eq!(read_square(&path, 4).unwrap().rgb, [7; 3 * 16]);
    let error = read_square(&path, 5).err().unwrap().to_string();
    assert!(error.ends_with("a.webp: is 4x4 pixels; only 5x5 images can be read"), "{error}");
}

#[test]
fn fingerprints_are_of_pixels_and_sides() {
    let of = |name: &str, bytes: &[u8]| try_read(name, bytes).unwrap().fingerprint();
    let first = of("a.png", &png(&small().into()));
    assert_eq!(first.len(), 16);
    assert_eq!(first, of("b.webp", &webp(&small(), 3, 2, None)));
    assert_ne!(first, of("a.webp", &webp(&small(), 2, 3, None)), "other sides");
    let mut other = small();
    other.put_pixel(2, 1, Rgb([255, 255, 254]));
    assert_ne!(first, of("a.png", &png(&other.into())));
}

/// A folder of images, one of them broken, and files that are none.
fn folder_of_images() -> TempDir {
    let folder = TempDir::new().unwrap();
    let good = png(&small().into());
    let broken: &[u8] = b"broken";
    let files = [("b.PNG", &good[..]), ("a.webp", &good), ("C.JpEg", broken), ("d.jpg", &good), ("notes.txt", &good)];
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    fs::create_dir(folder.path().join("e.png")).unwrap();
    folder
}

#[test]
fn folders_stand_for_their_images_in_order() {
    let folder = folder_of_images();
    let named = |name: &str| folder.path().join(name);
    let images = ["C.JpEg", "a.webp", "b.PNG", "d.jpg"].map(named);
    assert_eq!(find(&[folder.path().to_path_buf()]).unwrap(), images);
    // Files stay where they are given, whatever they are called, and as often.
    let given = [named("notes.txt"), folder.path().to_path_buf(), named("b.PNG")];
    assert_eq!(find(&given).unwrap(), [&[named("notes.txt")][..], &images, &[named("b.PNG")]].concat());

    let empty = TempDir::new().unwrap();
    let one_line = |paths: &[PathBuf], what: &str| {
        let error = find(paths).unwrap_err().to_string();
        assert!(error.contains(what) && !error.contains('\n'), "{error}");
    };
    one_line(&[empty.path().to_path_buf()], "holds no PNG, JPEG or WebP");
    one_line(&[named("none")], "none: No such file");
}

#[test]
fn a_broken_file_of_a_folder_stops_no_other() {
    let folder = folder_of_images();
    let read = read_all(&[folder.path().to_path_buf()]).unwrap();
    assert_eq!(read.len(), 4);
    let mut good = vec![];
    for (path, picture) in read {
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        match picture {
            Ok(picture) => good.push((name, picture.fingerprint())),
            Err(error) => assert!(name == "C.JpEg" && error.to_string().contains("C.JpEg: not a readable"), "{error}"),
        }
    }
    let names: Vec<&str> = good.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["a.webp", "b.PNG", "d.jpg"]);
    assert!(good.iter().all(|(_, hash)| *hash == good[0].1));
}
