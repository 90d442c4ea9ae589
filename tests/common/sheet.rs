//! Images, contact sheets and events that commands leave.

use serde_json::Value;
use std::fs;

/// Width and `[H, W, 3]` of a PNG.
#[track_caller]
pub fn pixels(path: &str) -> (usize, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(path).unwrap())).read_info().unwrap();
    let mut buffer = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut buffer).unwrap();
    (info.width as usize, buffer)
}

/// JSON lines.
pub fn lines(json: &str) -> Vec<Value> {
    json.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The events of this name.
pub fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == name).collect()
}

/// Where the image stands in the sheet, doubled.
pub fn find((width, sheet): &(usize, Vec<u8>), image: &str) -> Option<(usize, usize)> {
    let (side, image) = pixels(image);
    let row =
        |y: usize| -> Vec<u8> { image[3 * side * y..][..3 * side].chunks(3).flat_map(|p| [p, p].concat()).collect() };
    let (first, step) = (row(0), 3 * width);
    let is_here = |at: &usize| (0..2 * side).all(|y| sheet[at + y * step..].starts_with(&row(y / 2)));
    let room = sheet.len() - (2 * side - 1) * step - first.len();
    let at = (0..=room).step_by(3).filter(|at| sheet[*at..].starts_with(&first)).find(is_here)?;
    Some((at / 3 % width, at / 3 / width))
}
