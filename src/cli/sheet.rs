//! Contact sheets: images in a grid, doubled, with small text under each.

use crate::cli::{atomic, metadata};
use crate::{Error, Result};
use font8x8::legacy::BASIC_LEGACY;
use std::path::Path;

/// Most images of one sheet: more would make an image that few programs open.
pub const MOST_TILES: usize = 1024;

/// One image and what is written under it.
pub struct Tile {
    /// `[H, W, 3]`.
    pub rgb: Vec<u8>,
    /// Each starts on a line of its own; its words are wrapped.
    pub text: Vec<Vec<(String, Ink)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    Plain,
    Wrong,
    Faint,
}

impl Ink {
    fn rgb(self) -> [u8; 3] {
        match self {
            Ink::Plain => [20, 20, 20],
            Ink::Wrong => [210, 0, 0],
            Ink::Faint => [120, 120, 120],
        }
    }
}

const PAPER: u8 = 250;
const SCALE: usize = 2;
const GLYPH: usize = 8;
const LINE: usize = GLYPH + 2;
const MARGIN: usize = GLYPH;
/// Characters on a line of a tile.
const COLUMNS: usize = 21;

/// Writes a PNG of images of `side` x `side` pixels, row by row in the order given.
pub fn write(path: &Path, side: usize, tiles: &[Tile]) -> Result<()> {
    let sheet = draw(side, tiles);
    atomic::write(path, |out| metadata::write_png(out, sheet.width, sheet.height(), &sheet.rgb, None))
}

/// Refuses what [`write`] could not do, before the work is done.
pub fn probe(path: &Path, tiles: usize) -> Result<()> {
    if tiles > MOST_TILES {
        return Err(Error::Usage(format!("--sheet: {tiles} images do not fit one sheet; at most {MOST_TILES} do")));
    }
    atomic::probe(path)
}

struct Sheet {
    width: usize,
    /// `[H, W, 3]`.
    rgb: Vec<u8>,
}

fn draw(side: usize, tiles: &[Tile]) -> Sheet {
    let texts: Vec<Vec<Line>> =
        tiles.iter().map(|tile| tile.text.iter().flat_map(|words| wrap(words)).collect()).collect();
    let lines = texts.iter().map(Vec::len).max().unwrap_or(0);
    let (width, height) = ((SCALE * side).max(COLUMNS * GLYPH) + MARGIN, SCALE * side + lines * LINE + 2 * MARGIN);
    // A square of tiles, the last rows perhaps not full.
    let columns = tiles.len().isqrt() + usize::from(tiles.len().isqrt().pow(2) < tiles.len());
    let full = width * columns + MARGIN;
    let rows = tiles.len().div_ceil(columns);
    let mut sheet = Sheet { width: full, rgb: vec![PAPER; 3 * full * (height * rows + MARGIN)] };
    for (index, (tile, text)) in tiles.iter().zip(&texts).enumerate() {
        let (x, y) = (MARGIN + index % columns * width, MARGIN + index / columns * height);
        sheet.image(x, y, side, &tile.rgb);
        for (line, words) in text.iter().enumerate() {
            for (column, word, ink) in words {
                sheet.word(x + column * GLYPH, y + SCALE * side + MARGIN / 2 + line * LINE, word, *ink);
            }
        }
    }
    sheet
}

/// Words and the column each starts in.
type Line = Vec<(usize, String, Ink)>;

/// Breaks words into lines; a word longer than a line is cut.
fn wrap(words: &[(String, Ink)]) -> Vec<Line> {
    let mut lines: Vec<Line> = vec![Vec::new()];
    let mut column = 0;
    for (word, ink) in words {
        let word: String = word.chars().take(COLUMNS).collect();
        let length = word.chars().count();
        if column + length > COLUMNS {
            lines.push(Vec::new());
            column = 0;
        }
        if let Some(line) = lines.last_mut() {
            line.push((column, word, *ink));
        }
        column += length + 1;
    }
    lines
}

impl Sheet {
    fn height(&self) -> usize {
        self.rgb.len() / 3 / self.width
    }

    fn set(&mut self, x: usize, y: usize, rgb: [u8; 3]) {
        self.rgb[3 * (y * self.width + x)..][..3].copy_from_slice(&rgb);
    }

    fn image(&mut self, x: usize, y: usize, side: usize, rgb: &[u8]) {
        for dy in 0..SCALE * side {
            for dx in 0..SCALE * side {
                let pixel = 3 * (dy / SCALE * side + dx / SCALE);
                self.set(x + dx, y + dy, [rgb[pixel], rgb[pixel + 1], rgb[pixel + 2]]);
            }
        }
    }

    fn word(&mut self, x: usize, y: usize, word: &str, ink: Ink) {
        for (i, c) in word.chars().enumerate() {
            // The font is ASCII's.
            let glyph = BASIC_LEGACY.get(c as usize).unwrap_or(&BASIC_LEGACY[usize::from(b'?')]);
            for (dy, row) in glyph.iter().enumerate() {
                for dx in (0..GLYPH).filter(|dx| row >> dx & 1 == 1) {
                    self.set(x + i * GLYPH + dx, y + dy, ink.rgb());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<(String, Ink)> {
        text.split(' ').map(|word| (word.to_string(), Ink::Plain)).collect()
    }

    #[test]
    fn wraps_at_the_width() {
        let lines = wrap(&words("star with a hole striped 0123456789012345678901234 é"));
        let text: Vec<Vec<(usize, &str)>> =
            lines.iter().map(|line| line.iter().map(|(column, word, _)| (*column, word.as_str())).collect()).collect();
        assert_eq!(text[0], [(0, "star"), (5, "with"), (10, "a"), (12, "hole")]);
        assert_eq!(text[1..], [vec![(0, "striped")], vec![(0, "012345678901234567890")], vec![(0, "é")]]);
        assert_eq!(wrap(&[]).len(), 1);
    }

    #[test]
    fn draws_images_and_coloured_words() {
        let tile = |shade: u8, ink| Tile {
            rgb: vec![shade; 3 * 16],
            text: vec![vec![("I!".into(), ink), ("☆".into(), ink)]],
        };
        let tiles = [tile(1, Ink::Plain), tile(2, Ink::Wrong), tile(3, Ink::Plain)];
        let sheet = draw(4, &tiles);
        let (columns, rows) = (COLUMNS * GLYPH + MARGIN, SCALE * 4 + LINE + 2 * MARGIN);
        assert_eq!((sheet.width, sheet.height()), (2 * columns + MARGIN, 2 * rows + MARGIN));
        let count = |rgb: [u8; 3]| sheet.rgb.chunks(3).filter(|pixel| *pixel == rgb).count();
        assert_eq!([count([1; 3]), count([2; 3]), count([3; 3])], [64; 3], "each image doubled in both directions");
        assert_eq!(count(Ink::Plain.rgb()), 2 * count(Ink::Wrong.rgb()));
        assert!(count(Ink::Wrong.rgb()) > 20);
        let red = sheet.rgb.chunks(3).position(|pixel| pixel == Ink::Wrong.rgb()).unwrap();
        assert!(red % sheet.width > columns, "the wrong word stands under the second image");
    }
}
