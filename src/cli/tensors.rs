//! Safetensors files a user hands in or asks for: starting noise and final latents.

use crate::cli::atomic;
use crate::{Error, Result, input, weights};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// Bytes of a header and of what else may lie beside the noise.
const MOST_HEADER: u64 = 1 << 20;
/// Bytes of the noise of one image of the most pixels, with room for more channels than models have.
const MOST_NOISE: u64 = 1 << 30;

/// Tensor `noise`, f32 `[B, C, H/f, W/f]`, unit variance: one row per image.
pub fn read_noise(path: &Path, shape: [usize; 4]) -> Result<Vec<Vec<f32>>> {
    let needed = shape.iter().fold(4usize, |bytes, side| bytes.saturating_mul(*side)) as u64;
    let size = input::open(path)?.metadata().map_err(Error::io("read", path))?.len();
    if size > needed.saturating_add(MOST_HEADER) {
        let what = format!("is {size} bytes; 'noise' as this run needs it, F32 {shape:?}, is {needed}");
        return Err(Error::file(path, what));
    }
    let bytes = input::read(path, needed.saturating_add(MOST_HEADER))?;
    let header = weights::parse_header(&bytes).map_err(|what| Error::file(path, what))?;
    let tensor = header.tensor(&bytes, "noise").ok_or_else(|| Error::file(path, "holds no tensor 'noise'"))?;
    if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
        return Err(Error::file(
            path,
            format!("'noise' is {:?} {:?}, this run needs F32 {shape:?}", tensor.dtype(), tensor.shape()),
        ));
    }
    let values: Vec<f32> =
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if values.iter().any(|x| !x.is_finite()) {
        return Err(Error::file(path, "'noise' holds values that are not finite"));
    }
    Ok(values.chunks(shape[1] * shape[2] * shape[3]).map(<[f32]>::to_vec).collect())
}

/// Whether the file holds a noise, whole, of whatever shape.
pub fn is_noise(path: &Path) -> bool {
    input::read(path, MOST_NOISE)
        .is_ok_and(|bytes| weights::parse_header(&bytes).is_ok_and(|header| header.tensor(&bytes, "noise").is_some()))
}

/// Tensor `latents`, f32, all images of a run in order.
pub fn write_latents(path: &Path, shape: [usize; 4], latents: &[f32]) -> Result<()> {
    write(path, "latents", shape, latents)
}

/// Tensor `noise`, as [`read_noise`] reads it.
pub fn write_noise(path: &Path, shape: [usize; 4], noise: &[f32]) -> Result<()> {
    write(path, "noise", shape, noise)
}

fn write(path: &Path, name: &str, shape: [usize; 4], values: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let invalid = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
    let view = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).map_err(invalid)?;
    let file = safetensors::serialize([(name, view)], None).map_err(invalid)?;
    atomic::write(path, |out| out.write_all(&file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("noise.safetensors");
        let write = |name: &str, values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let view = TensorView::new(Dtype::F32, vec![1, 1, 1, values.len()], &bytes).unwrap();
            std::fs::write(&path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
        };
        write("noise", &[0.5, -1.0]);
        assert_eq!(read_noise(&path, [1, 1, 1, 2]).unwrap(), [[0.5, -1.0]]);
        assert!(read_noise(&path, [2, 1, 1, 1]).unwrap_err().to_string().contains("needs F32 [2, 1, 1, 1]"));
        write("noise", &[f32::NAN]);
        assert!(read_noise(&path, [1, 1, 1, 1]).unwrap_err().to_string().contains("not finite"));
        write("latents", &[0.0]);
        assert!(read_noise(&path, [1, 1, 1, 1]).unwrap_err().to_string().contains("'noise'"));
        std::fs::write(&path, b"short").unwrap();
        assert!(read_noise(&path, [1, 1, 1, 1]).is_err());
        write("noise", &vec![0.0; 1 << 19]);
        assert!(read_noise(&path, [1, 1, 1, 2]).unwrap_err().to_string().contains("F32 [1, 1, 1, 2], is 8"));
        std::fs::write(&path, b"PK\x03\x04........noise/data.pkl").unwrap();
        assert!(read_noise(&path, [1, 1, 1, 1]).unwrap_err().to_string().contains("is a PyTorch pickle"));
        assert!(read_noise(folder.path(), [1, 1, 1, 1]).unwrap_err().to_string().contains("is not a regular file"));
    }
}
