//! Contact sheets: images in a grid, small ones doubled, with small text under each and labels around them.

use crate::cli::atomic;
use crate::data::metadata;
use crate::{Error, Result};
use font8x8::legacy::BASIC_LEGACY;
use std::path::Path;

/// Most images of one sheet: more would make an image that few programs open.
pub const MOST_TILES: usize = 1024;
/// Most pixels of all its images together.
const MOST_PIXELS: usize = 1 << 28;

/// One image and what is written under it.
pub struct Tile {
    /// `[H, W, 3]`.
    pub rgb: Vec<u8>,
    /// Each starts on a line of its own; its words are wrapped.
    pub text: Vec<Vec<(String, Ink)>>,
}

/// How tiles stand, row by row in the order given.
pub enum Grid<'a> {
    /// About as many rows as columns.
    Square,
    /// Under a title, with labels above the columns and left of the rows, and lines under each column where there are any.
    Table { title: &'a str, columns: &'a [String], rows: &'a [String], feet: &'a [Vec<String>] },
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
/// Images up to this side are doubled.
const SMALL: usize = 128;
const GLYPH: usize = 8;
const LINE: usize = GLYPH + 2;
const MARGIN: usize = GLYPH;
/// Characters on a line of a tile that is not wider.
const COLUMNS: usize = 21;

/// Writes a PNG of images of `size`, width and height in pixels.
pub fn write(path: &Path, size: [usize; 2], tiles: &[Tile], grid: &Grid<'_>) -> Result<()> {
    let sheet = draw(size, tiles, grid);
    atomic::write(path, |out| metadata::write_png(out, sheet.width, sheet.height(), &sheet.rgb, None))
}

/// Refuses what [`write`] could not do, before the work is done; `flag` names the sheet.
pub fn probe(path: &Path, flag: &str, [width, height]: [usize; 2], tiles: usize) -> Result<()> {
    let most = MOST_TILES.min(MOST_PIXELS / (width * height).max(1));
    if tiles > most {
        return Err(Error::Usage(format!("{flag}: {tiles} images do not fit one sheet; at most {most} do")));
    }
    metadata::check_name(flag, path)?;
    atomic::probe(path)
}

struct Sheet {
    width: usize,
    /// `[H, W, 3]`.
    rgb: Vec<u8>,
}

fn draw([width, height]: [usize; 2], tiles: &[Tile], grid: &Grid<'_>) -> Sheet {
    let scale = if width.max(height) <= SMALL { 2 } else { 1 };
    let letters = COLUMNS.max(scale * width / GLYPH);
    let texts: Vec<Vec<Line>> =
        tiles.iter().map(|tile| tile.text.iter().flat_map(|words| wrap(words, letters)).collect()).collect();
    let lines = texts.iter().map(Vec::len).max().unwrap_or(0);
    let (across, down) = ((scale * width).max(COLUMNS * GLYPH) + MARGIN, scale * height + lines * LINE + 2 * MARGIN);
    let (columns, left) = match grid {
        // The last rows are perhaps not full.
        Grid::Square => (tiles.len().isqrt() + usize::from(tiles.len().isqrt().pow(2) < tiles.len()), 0),
        Grid::Table { columns, rows, .. } => {
            let longest = rows.iter().map(|label| label.chars().count()).max().unwrap_or(0);
            (columns.len(), longest * GLYPH + MARGIN)
        }
    };
    let full = left + across * columns + MARGIN;
    let title = match grid {
        Grid::Square => vec![],
        Grid::Table { title, .. } => wrap(&words(title, Ink::Faint), (full - 2 * MARGIN) / GLYPH),
    };
    let top = match grid {
        Grid::Square => 0,
        Grid::Table { .. } => title.len() * LINE + MARGIN + LINE,
    };
    let rows = tiles.len().div_ceil(columns.max(1));
    let feet: Vec<Vec<Line>> = match grid {
        Grid::Square => vec![],
        Grid::Table { feet, .. } => {
            let foot =
                |foot: &Vec<String>| foot.iter().flat_map(|line| wrap(&words(line, Ink::Plain), letters)).collect();
            feet.iter().map(foot).collect()
        }
    };
    let bottom = feet.iter().map(Vec::len).max().map_or(0, |lines| lines * LINE + MARGIN);
    let mut sheet = Sheet { width: full, rgb: vec![PAPER; 3 * full * (top + down * rows + bottom + MARGIN)] };
    sheet.lines(MARGIN, MARGIN, &title);
    for (index, foot) in feet.iter().enumerate() {
        sheet.lines(MARGIN + left + index * across, MARGIN + top + rows * down, foot);
    }
    if let Grid::Table { columns, rows, .. } = grid {
        for (index, label) in columns.iter().enumerate() {
            let label: String = label.chars().take(letters).collect();
            sheet.word(MARGIN + left + index * across, MARGIN + top - LINE, &label, Ink::Plain);
        }
        for (index, label) in rows.iter().enumerate() {
            sheet.word(MARGIN, MARGIN + top + index * down + (scale * height - GLYPH) / 2, label, Ink::Plain);
        }
    }
    for (index, (tile, text)) in tiles.iter().zip(&texts).enumerate() {
        let (x, y) = (MARGIN + left + index % columns * across, MARGIN + top + index / columns * down);
        sheet.image(x, y, [width, height], scale, &tile.rgb);
        sheet.lines(x, y + scale * height + MARGIN / 2, text);
    }
    sheet
}

/// Text as words of one ink.
pub fn words(text: &str, ink: Ink) -> Vec<(String, Ink)> {
    text.split_whitespace().map(|word| (word.to_string(), ink)).collect()
}

/// Words and the column each starts in.
type Line = Vec<(usize, String, Ink)>;

/// Breaks words into lines of so many letters; a word longer than a line is cut.
fn wrap(words: &[(String, Ink)], letters: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = vec![Vec::new()];
    let mut column = 0;
    for (word, ink) in words {
        let word: String = word.chars().take(letters).collect();
        let length = word.chars().count();
        if column + length > letters {
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

    fn image(&mut self, x: usize, y: usize, [width, height]: [usize; 2], scale: usize, rgb: &[u8]) {
        for dy in 0..scale * height {
            for dx in 0..scale * width {
                let pixel = 3 * (dy / scale * width + dx / scale);
                self.set(x + dx, y + dy, [rgb[pixel], rgb[pixel + 1], rgb[pixel + 2]]);
            }
        }
    }

    fn lines(&mut self, x: usize, y: usize, lines: &[Line]) {
        for (line, words) in lines.iter().enumerate() {
            for (column, word, ink) in words {
                self.word(x + column * GLYPH, y + line * LINE, word, *ink);
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

    #[test]
    fn wraps_at_the_width() {
        let lines = wrap(&words("star with a hole striped 0123456789012345678901234 é", Ink::Plain), COLUMNS);
        let text: Vec<Vec<(usize, &str)>> =
            lines.iter().map(|line| line.iter().map(|(column, word, _)| (*column, word.as_str())).collect()).collect();
        assert_eq!(text[0], [(0, "star"), (5, "with"), (10, "a"), (12, "hole")]);
        assert_eq!(text[1..], [vec![(0, "striped")], vec![(0, "012345678901234567890")], vec![(0, "é")]]);
        assert_eq!(wrap(&[], COLUMNS).len(), 1);
    }

    #[test]
    fn draws_images_and_coloured_words() {
        let tile = |shade: u8, ink| Tile {
            rgb: vec![shade; 3 * 16],
            text: vec![vec![("I!".into(), ink), ("☆".into(), ink)]],
        };
        let tiles = [tile(1, Ink::Plain), tile(2, Ink::Wrong), tile(3, Ink::Plain)];
        let sheet = draw([4, 4], &tiles, &Grid::Square);
        let (columns, rows) = (COLUMNS * GLYPH + MARGIN, 2 * 4 + LINE + 2 * MARGIN);
        assert_eq!((sheet.width, sheet.height()), (2 * columns + MARGIN, 2 * rows + MARGIN));
        let count = |rgb: [u8; 3]| sheet.rgb.chunks(3).filter(|pixel| *pixel == rgb).count();
        assert_eq!([count([1; 3]), count([2; 3]), count([3; 3])], [64; 3], "each image doubled in both directions");
        assert_eq!(count(Ink::Plain.rgb()), 2 * count(Ink::Wrong.rgb()));
        assert!(count(Ink::Wrong.rgb()) > 20);
        let red = sheet.rgb.chunks(3).position(|pixel| pixel == Ink::Wrong.rgb()).unwrap();
        assert!(red % sheet.width > columns, "the wrong word stands under the second image");
    }
    #[test]
    fn tables_have_labels_and_large_images_their_size() {
        let (width, height) = (200, 16);
        let tile = |shade: u8| Tile { rgb: vec![shade; 3 * width * height], text: vec![vec![]] };
        let tiles: Vec<Tile> = (1..=6).map(tile).collect();
        let labels = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let (columns, rows) = (labels(&["a", "b", "c"]), labels(&["seed 7", "seed 18446744073709551615"]));
        let table = |feet| Grid::Table { title: "x ☆", columns: &columns, rows: &rows, feet };
        let sheet = draw([width, height], &tiles, &table(&[]));
        let feet = [vec!["one line".to_string()], vec!["two".to_string(), "lines".to_string()]];
        let footed = draw([width, height], &tiles, &table(&feet));
        assert_eq!(footed.height(), sheet.height() + 2 * LINE + MARGIN);
        let end = sheet.rgb.len() - 3 * MARGIN * sheet.width;
        assert!(footed.rgb[..end] == sheet.rgb[..end], "what stands above the feet stays");
        assert!(footed.rgb[end..].chunks(3).any(|pixel| pixel == Ink::Plain.rgb()));
        let (across, down, left) = (width + MARGIN, height + LINE + 2 * MARGIN, 25 * GLYPH + MARGIN);
        assert_eq!((sheet.width, sheet.height()), (left + 3 * across + MARGIN, 2 * LINE + MARGIN + 2 * down + MARGIN));
        let at = |x: usize, y: usize| sheet.rgb[3 * (y * sheet.width + x)];
        for (index, shade) in (1..=6).enumerate() {
            let (x, y) = (MARGIN + left + index % 3 * across, 2 * MARGIN + 2 * LINE + index / 3 * down);
            let corners = [at(x, y), at(x + width - 1, y + height - 1), at(x - 1, y), at(x, y + height)];
            assert_eq!(corners, [shade, shade, PAPER, PAPER]);
        }
        let ink = |rgb: [u8; 3]| sheet.rgb.chunks(3).any(|pixel| pixel == rgb);
        assert!(ink(Ink::Plain.rgb()) && ink(Ink::Faint.rgb()));
    }
}
