//! Packing: a weight's stored tensors read by rows as the matrix the executors use, without holding a tensor.

use super::file::{File, Stored};
use super::{Model, Pack, Tensor, Weight};
use crate::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::borrow::Cow;

/// Most kernel taps times channels permuted at a time: small enough for the stack and the first-level cache.
const CHUNK: usize = 1024;

/// Elements converted at a time through a buffer.
const STEP: usize = 256;

/// Bytes read from a file at a time, if a row is not longer: enough for a disk, few enough for the second-level cache.
const BLOCK: usize = 1 << 18;

/// A weight as a matrix of output rows.
///
/// Row `n` holds the `K` input coefficients of output `n`; convolutions are permuted to `k = (ky * kw + kx) * I + i`.
/// A table gives its rows, a vector is one row. Reading is `Sync`: threads may take rows in any order. It fails, naming the file, where
/// that cannot be read or has changed since it was opened; what was written to `out` is then worth nothing.
pub struct Rows<'a> {
    parts: Vec<Part<'a>>,
    rows: usize,
    columns: usize,
    /// One row, the parts side by side.
    vector: bool,
}

/// The rows (of a vector: the columns) that one key contributes, from `first` on.
struct Part<'a> {
    file: &'a File,
    /// Of the tensor's first byte in the file.
    start: usize,
    stored: Stored,
    first: usize,
    count: usize,
    order: Order,
    /// All bytes of a tensor whose order is swapped, as each of its rows is scattered over all of them; empty for others.
    scattered: Cow<'a, [u8]>,
}

/// How the coefficients of a row lie in the file.
#[derive(Clone, Copy)]
enum Order {
    /// One after another, rows one after another.
    Plain,
    /// Rows and columns swapped.
    Swapped,
    /// Input channels outside, this many kernel taps inside.
    Taps(usize),
}

/// What a key's shape says about its place in the matrix.
struct Layout {
    rows: usize,
    columns: usize,
    order: Order,
}

impl<'a> Rows<'a> {
    /// Output rows `N` (1 for a vector).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Coefficients per row `K` (the length of a vector).
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows that are well read at once.
    pub fn block(&self) -> usize {
        (BLOCK / (4 * self.columns).max(1)).clamp(1, self.rows.max(1))
    }

    /// Writes the rows from `first` on to `out`, which holds some times `columns()` values. Panics when there are not so many rows.
    pub fn read_f32(&self, first: usize, out: &mut [f32]) -> Result<()> {
        self.read(first, out)
    }

    /// [`Rows::read_f32`] in double precision; exact for every stored type.
    pub fn read_f64(&self, first: usize, out: &mut [f64]) -> Result<()> {
        self.read(first, out)
    }

    /// Gives `visit` every row in turn with its number, in double precision.
    pub fn each_f64(&self, mut visit: impl FnMut(usize, &[f64])) -> Result<()> {
        let mut values = vec![0.0; self.block() * self.columns];
        for first in (0..self.rows).step_by(self.block()) {
            let values = &mut values[..self.block().min(self.rows - first) * self.columns];
            self.read_f64(first, values)?;
            values.chunks_exact(self.columns.max(1)).enumerate().for_each(|(n, row)| visit(first + n, row));
        }
        Ok(())
    }

    fn read<T: Real>(&self, first: usize, out: &mut [T]) -> Result<()> {
        let width = self.columns;
        let end = first + out.len() / width.max(1);
        assert!(
            end <= self.rows && out.len() == (end - first) * width,
            "rows {first}..{end} of {} x {width}",
            self.rows
        );
        for part in &self.parts {
            if self.vector {
                part.read(0, part.count, &mut out[part.first..][..part.count])?;
                continue;
            }
            let (from, to) = (first.max(part.first), end.min(part.first + part.count));
            if from < to {
                part.read(from - part.first, width, &mut out[(from - first) * width..(to - first) * width])?;
            }
        }
        Ok(())
    }

    /// Lines up the tensors of `weight`, checking type and shape of each.
    pub(super) fn new(model: &'a Model, weight: &Weight, tensors: &[&'a Tensor]) -> Result<Rows<'a>> {
        let mut parts = Vec::with_capacity(tensors.len());
        let vector = weight.pack == Pack::Vector;
        let mut first = 0;
        for (key, tensor) in weight.keys.iter().zip(tensors) {
            let file = &model.files[tensor.file];
            let wrong = |what: String| Error::Tensor { path: file.path().to_path_buf(), key: key.clone(), what };
            let stored = tensor.dtype;
            if !matches!(stored, Stored::F16 | Stored::BF16 | Stored::F32 | Stored::F64) {
                return Err(wrong(format!("is stored as {stored}; only F16, BF16, F32 and F64 are read")));
            }
            let Some(Layout { rows, columns, order }) = layout(weight, tensor) else {
                return Err(wrong(format!("has shape {:?}, the model needs {}", tensor.shape, needed(weight))));
            };
            let count = if vector { columns } else { rows };
            let scattered = match order {
                Order::Swapped => file.read(&tensor.range)?,
                Order::Plain | Order::Taps(_) => Cow::Borrowed(&[][..]),
            };
            parts.push(Part { file, start: tensor.range.start, stored, first, count, order, scattered });
            first += count;
        }
        let [rows, columns] = matrix(weight);
        let total = if vector { columns } else { rows };
        match weight.keys.first() {
            Some(key) if first != total => Err(Error::Tensor {
                path: model.path().to_path_buf(),
                key: key.clone(),
                what: format!("{first} rows in {} tensor(s), the model needs {total}", weight.keys.len()),
            }),
            Some(_) => Ok(Rows { parts, rows, columns, vector }),
            None => Err(Error::Model("a weight without keys was asked for".into())),
        }
    }
}

impl Part<'_> {
    /// Writes the part's rows of `width` values from `first` on to `out`, which holds some of them.
    fn read<T: Real>(&self, first: usize, width: usize, out: &mut [T]) -> Result<()> {
        if matches!(self.order, Order::Swapped) {
            self.gather(first, width, out);
            return Ok(());
        }
        let size = self.stored.bitsize() / 8;
        let block = (BLOCK / (width * size).max(1)).max(1);
        for (n, out) in out.chunks_mut((block * width).max(1)).enumerate() {
            let start = self.start + (first + n * block) * width * size;
            self.file.visit(start..start + out.len() * size, |bytes| self.decode(bytes, width, out))?;
        }
        Ok(())
    }

    /// Writes the rows that `bytes` holds one after another.
    fn decode<T: Real>(&self, bytes: &[u8], width: usize, out: &mut [T]) {
        match self.order {
            Order::Plain | Order::Swapped => T::decode(self.stored, bytes, out),
            Order::Taps(taps) => {
                let rows = bytes.chunks_exact(width * self.stored.bitsize() / 8).zip(out.chunks_exact_mut(width));
                rows.for_each(|(bytes, out)| untangle(self.stored, bytes, taps, out));
            }
        }
    }

    /// Collects the rows from `first` on where rows and columns are swapped.
    fn gather<T: Real>(&self, first: usize, width: usize, out: &mut [T]) {
        let size = self.stored.bitsize() / 8;
        for (n, row) in out.chunks_exact_mut(width).enumerate() {
            for (k, value) in row.iter_mut().enumerate() {
                let at = (k * self.count + first + n) * size;
                T::decode(self.stored, &self.scattered[at..at + size], std::slice::from_mut(value));
            }
        }
    }
}

/// Decodes `[I, taps]` and writes `[taps, I]`; a chunk of channels at a time, so that each element is decoded in bulk.
fn untangle<T: Real>(stored: Stored, bytes: &[u8], taps: usize, out: &mut [T]) {
    let mut buffer = [T::default(); CHUNK];
    let inputs = out.len() / taps;
    let step = CHUNK / taps;
    let size = stored.bitsize() / 8;
    for first in (0..inputs).step_by(step) {
        let count = step.min(inputs - first);
        let chunk = &mut buffer[..count * taps];
        T::decode(stored, &bytes[first * taps * size..(first + count) * taps * size], chunk);
        for tap in 0..taps {
            let line = &mut out[tap * inputs + first..][..count];
            for (value, &from) in line.iter_mut().zip(chunk[tap..].iter().step_by(taps)) {
                *value = from;
            }
        }
    }
}

/// Rows and columns of the value's matrix.
fn matrix(weight: &Weight) -> [usize; 2] {
    match (weight.pack, &weight.shape[..]) {
        (Pack::Linear | Pack::Geglu | Pack::LinearTransposed, &[k, n]) => [n, k],
        (Pack::Conv, &[kh, kw, i, o]) => [o, kh * kw * i],
        (Pack::Table, &[rows, c]) => [rows, c],
        (Pack::Vector, &[c]) => [1, c],
        (pack, shape) => panic!("a {pack:?} weight cannot have shape {shape:?}"),
    }
}

/// The shape a single stored tensor should have, for messages; `n` stands for its share of the output rows.
fn needed(weight: &Weight) -> String {
    let n = if weight.keys.len() > 1 { "n".to_string() } else { matrix(weight)[0].to_string() };
    match (weight.pack, &weight.shape[..]) {
        (Pack::Linear | Pack::Geglu, shape) => format!("[{n}, {}]", shape[0]),
        (Pack::LinearTransposed, shape) => format!("[{}, {n}]", shape[0]),
        (Pack::Conv, shape) => format!("[{n}, {}, {}, {}]", shape[2], shape[0], shape[1]),
        (Pack::Table, shape) => format!("[{n}, {}]", shape[1]),
        (Pack::Vector, shape) => format!("[{}]", shape[0]),
    }
}

/// Fits one stored tensor into the weight's matrix; `None` when its shape does not match.
fn layout(weight: &Weight, tensor: &Tensor) -> Option<Layout> {
    let plain = if tensor.transposed { Order::Swapped } else { Order::Plain };
    let swapped = if tensor.transposed { Order::Plain } else { Order::Swapped };
    let [rows, columns] = matrix(weight);
    // A lone tensor must fill the matrix; several share its rows, and their sum is checked by the caller.
    let share = |n: usize| weight.keys.len() > 1 || n == if weight.pack == Pack::Vector { columns } else { rows };
    let found = match (weight.pack, &tensor.shape[..]) {
        (Pack::Linear | Pack::Geglu, &[n, k] | &[n, k, 1] | &[n, k, 1, 1]) => {
            Layout { rows: n, columns: k, order: plain }
        }
        (Pack::LinearTransposed, &[k, n]) => Layout { rows: n, columns: k, order: swapped },
        (Pack::Conv, &[o, i]) if weight.shape[..2] == [1, 1] => Layout { rows: o, columns: i, order: plain },
        (Pack::Conv, &[o, i, kh, kw]) if weight.shape[..3] == [kh, kw, i] && kh * kw <= CHUNK => {
            let order = if kh * kw == 1 { Order::Plain } else { Order::Taps(kh * kw) };
            Layout { rows: o, columns: kh * kw * i, order }
        }
        (Pack::Table, &[rows, c]) => Layout { rows, columns: c, order: plain },
        (Pack::Vector, &[c]) => return share(c).then_some(Layout { rows: 1, columns: c, order: plain }),
        (Pack::Vector, &[]) => return share(1).then_some(Layout { rows: 1, columns: 1, order: plain }),
        _ => return None,
    };
    (found.columns == columns && share(found.rows)).then_some(found)
}

/// A float that stored elements decode to.
trait Real: Copy + Default {
    /// `bytes` holds as many elements as `out`; only float types get this far.
    fn decode(stored: Stored, bytes: &[u8], out: &mut [Self]);
}

impl Real for f32 {
    fn decode(stored: Stored, bytes: &[u8], out: &mut [f32]) {
        match stored {
            Stored::F16 if out.len() == 1 => read(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Stored::F16 => decode_f16(bytes, out),
            // Sixteen zero bits more: exact, and a loop the compiler vectorises.
            Stored::BF16 => read(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            Stored::F64 => read(bytes, out, |b| f64::from_le_bytes(b) as f32),
            _ => read(bytes, out, f32::from_le_bytes),
        }
    }
}

impl Real for f64 {
    fn decode(stored: Stored, bytes: &[u8], out: &mut [f64]) {
        if stored == Stored::F64 {
            return read(bytes, out, f64::from_le_bytes);
        }
        let mut buffer = [0f32; STEP];
        for (bytes, out) in bytes.chunks(STEP * stored.bitsize() / 8).zip(out.chunks_mut(STEP)) {
            let narrow = &mut buffer[..out.len()];
            f32::decode(stored, bytes, narrow);
            out.iter_mut().zip(narrow).for_each(|(o, x)| *o = f64::from(*x));
        }
    }
}

/// Element by element; files are not aligned, so the elements are read as bytes (which costs nothing once vectorised).
fn read<T, const N: usize>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = convert(*bytes);
    }
}

/// Through an aligned buffer, to use the vectorised conversion of `half`.
fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut buffer = [f16::ZERO; STEP];
    for (bytes, out) in bytes.chunks(2 * STEP).zip(out.chunks_mut(STEP)) {
        let narrow = &mut buffer[..out.len()];
        read(bytes, narrow, f16::from_le_bytes);
        narrow.convert_to_f32_slice(out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{file, typed};
    use super::*;
    use crate::weights::Component;
    use half::bf16;

    /// The rows of a weight in a UNet file that is this single set of tensors.
    fn rows(bytes: &'static [u8], keys: &[&str], pack: Pack, shape: &[usize]) -> Result<Vec<Vec<f32>>> {
        let files = Box::leak(Box::new([("unet/diffusion_pytorch_model.safetensors", bytes)]));
        let model = Model::embedded(files)?;
        let keys = keys.iter().map(|k| k.to_string()).collect();
        let weight = Weight { component: Component::Unet, keys, pack, shape: shape.to_vec() };
        let rows = model.rows(&weight)?;
        let read = |n| {
            let (mut single, mut double) = (vec![f32::NAN; rows.columns()], vec![f64::NAN; rows.columns()]);
            rows.read_f32(n, &mut single).unwrap();
            rows.read_f64(n, &mut double).unwrap();
            assert!(single.iter().zip(&double).all(|(s, d)| f64::from(*s) == *d));
            single
        };
        Ok((0..rows.rows()).map(read).collect())
    }

    #[test]
    fn linear_layers_and_tables_are_read_as_stored() {
        let bytes = file(&[("w", &[2, 3]), ("c", &[2, 3, 1, 1])]);
        let want = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]];
        assert_eq!(rows(bytes, &["w"], Pack::Linear, &[3, 2]).unwrap(), want);
        assert_eq!(rows(bytes, &["c"], Pack::Linear, &[3, 2]).unwrap(), want);
        assert_eq!(rows(bytes, &["w"], Pack::Table, &[2, 3]).unwrap(), want);
        assert_eq!(rows(bytes, &["w"], Pack::Conv, &[1, 1, 3, 2]).unwrap(), want);
        let swapped = [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]];
        assert_eq!(rows(bytes, &["w"], Pack::LinearTransposed, &[2, 3]).unwrap(), swapped);
    }

    #[test]
    fn convolutions_are_permuted_to_taps_outside_channels_inside() {
        // More channels than fit one chunk of taps, so that chunks meet.
        let (o, i, kh, kw) = (2, 700, 1, 3);
        let got = rows(file(&[("w", &[o, i, kh, kw])]), &["w"], Pack::Conv, &[kh, kw, i, o]).unwrap();
        for (n, row) in got.iter().enumerate() {
            for (k, x) in row.iter().enumerate() {
                let (tap, channel) = (k / i, k % i);
                assert_eq!(*x, ((n * i + channel) * kh * kw + tap) as f32);
            }
        }
    }

    #[test]
    fn several_keys_follow_each_other() {
        let bytes = file(&[("a", &[1, 2]), ("b", &[2, 2]), ("x", &[1]), ("y", &[3])]);
        let want = [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0]];
        assert_eq!(rows(bytes, &["a", "b"], Pack::Linear, &[2, 3]).unwrap(), want);
        assert_eq!(rows(bytes, &["x", "y"], Pack::Vector, &[4]).unwrap(), [[0.0, 0.0, 1.0, 2.0]]);
    }

    #[test]
    fn every_float_type_is_exact() {
        let values: Vec<f64> = (0..900).map(|i| f64::from(i % 97) * 0.125 - 3.0).collect();
        let bytes = |one: fn(f64) -> Vec<u8>| values.iter().flat_map(|v| one(*v)).collect::<Vec<u8>>();
        let half = bytes(|v| f16::from_f64(v).to_le_bytes().to_vec());
        let brain = bytes(|v| bf16::from_f64(v).to_le_bytes().to_vec());
        let double = bytes(|v| v.to_le_bytes().to_vec());
        let shape: &[usize] = &[3, 300];
        let bytes = typed(&[
            ("f16", Stored::F16, shape, &half),
            ("bf16", Stored::BF16, shape, &brain),
            ("f64", Stored::F64, shape, &double),
            ("i8", Stored::I8, &[1, 900], &half[..900]),
        ]);
        for key in ["f16", "bf16", "f64"] {
            let got = rows(bytes, &[key], Pack::Linear, &[300, 3]).unwrap().concat();
            assert!(got.iter().zip(&values).all(|(got, want)| f64::from(*got) == *want), "{key}");
            let got = rows(bytes, &[key], Pack::LinearTransposed, &[3, 300]).unwrap();
            assert_eq!(f64::from(got[7][2]), values[607]);
        }
        let e = rows(bytes, &["i8"], Pack::Linear, &[900, 1]).unwrap_err().to_string();
        assert!(e.contains("tensor 'i8': is stored as I8"), "{e}");
    }

    #[test]
    fn wrong_shapes_and_missing_tensors_are_named() {
        let bytes = file(&[("w", &[2, 3]), ("b", &[2])]);
        let refused = |keys: &[&str], pack, shape: &[usize], why: &str| {
            let e = rows(bytes, keys, pack, shape).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        };
        refused(&["v"], Pack::Linear, &[3, 2], "tensor 'v': is missing from the unet");
        refused(&["w"], Pack::Linear, &[2, 3], "tensor 'w': has shape [2, 3], the model needs [3, 2]");
        refused(&["w"], Pack::Conv, &[3, 3, 3, 2], "the model needs [2, 3, 3, 3]");
        refused(&["b"], Pack::Vector, &[3], "has shape [2], the model needs [3]");
        refused(&["b"], Pack::Table, &[2, 1], "has shape [2], the model needs [2, 1]");
        refused(&["w", "w"], Pack::Linear, &[3, 5], "4 rows in 2 tensor(s), the model needs 5");
    }
}
