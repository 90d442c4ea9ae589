//! Which fat binaries are loaded: those that this build embeds, or in their place files of a folder, so that a kernel is mended and run
//! again without building the program.

use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The variable that names the folder.
pub const FOLDER: &str = "RAREBIT_KERNELS";

/// What a file may end in: fat binaries, and code of one architecture, both as nvcc writes them.
const EXTENSIONS: [&str; 2] = ["fatbin", "cubin"];

/// A stem of kernels/, the architectures that the file is for alone (or empty), its compiled code.
pub type Embedded = (&'static str, &'static str, &'static [u8]);

/// What is loaded for a stem.
#[derive(Debug)]
pub struct Image {
    pub stem: &'static str,
    pub only: &'static str,
    /// Aligned to 16 bytes.
    pub code: &'static [u8],
    /// Where it is not the embedded one.
    pub file: Option<PathBuf>,
}

/// What this build embeds, but `STEM.fatbin` or `STEM.cubin` of the folder where there is one. A folder that replaces nothing is an
/// error, and so is a file of a stem that is not embedded.
pub fn images(embedded: &[Embedded], folder: Option<&Path>) -> Result<Vec<Image>> {
    let of_build = |&(stem, only, code): &Embedded| Image { stem, only, code, file: None };
    let mut images: Vec<Image> = embedded.iter().map(of_build).collect();
    let Some(folder) = folder else { return Ok(images) };
    let wrong = |path: &Path, what: String| Error::file(path, format!("{what} ({FOLDER})"));
    let entries = fs::read_dir(folder).map_err(|error| wrong(folder, format!("cannot be read: {error}")))?;
    for entry in entries {
        let path = entry.map_err(|error| wrong(folder, format!("cannot be read: {error}")))?.path();
        if !EXTENSIONS.iter().any(|extension| path.extension().is_some_and(|of| of == *extension)) {
            continue;
        }
        let stem = path.file_stem().unwrap_or_default();
        let Some(image) = images.iter_mut().find(|image| *image.stem == *stem) else {
            let stems: Vec<&str> = embedded.iter().map(|(stem, ..)| *stem).collect();
            return Err(wrong(&path, format!("is named after no file of kernels/; those are {}", stems.join(", "))));
        };
        if let Some(other) = &image.file {
            return Err(wrong(&path, format!("is for the same kernels as {}; remove one", other.display())));
        }
        let code = fs::read(&path).map_err(|error| wrong(&path, format!("cannot be read: {error}")))?;
        (image.code, image.file) = (aligned(&code), Some(path));
    }
    if images.iter().all(|image| image.file.is_none()) {
        return Err(wrong(folder, "has no .fatbin and no .cubin; tools/kernels/compile makes one".into()));
    }
    Ok(images)
}

/// A copy that lies at a multiple of 16 bytes and is never freed: the driver may read it as long as the process lives.
fn aligned(code: &[u8]) -> &'static [u8] {
    let words: &mut [u128] = Box::leak(vec![0u128; code.len().div_ceil(16)].into_boxed_slice());
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
    bytes[..code.len()].copy_from_slice(code);
    &bytes[..code.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMBEDDED: [Embedded; 2] = [("gemm", "", b"old gemm"), ("sm90_gemm", "90a", b"old product")];

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            fs::write(folder.path().join(name), format!("new {name}")).unwrap();
        }
        folder
    }

    #[test]
    fn files_take_the_place_of_what_is_embedded() {
        let found = images(&EMBEDDED, None).unwrap();
        assert!(found.iter().zip(EMBEDDED).all(|(image, (.., code))| image.code == code && image.file.is_none()));
        for (file, place) in [("gemm.fatbin", 0), ("sm90_gemm.cubin", 1)] {
            // What is not compiled code is of no matter.
            let folder = folder(&[file, "gemm.cu", "notes.txt"]);
            let found = images(&EMBEDDED, Some(folder.path())).unwrap();
            let (new, old) = (&found[place], &found[1 - place]);
            assert_eq!((new.stem, new.only), (EMBEDDED[place].0, EMBEDDED[place].1));
            assert_eq!(new.code, format!("new {file}").as_bytes());
            assert!((new.code.as_ptr() as usize).is_multiple_of(16));
            assert_eq!(new.file.as_deref(), Some(folder.path().join(file).as_path()));
            assert_eq!((old.code, &old.file), (EMBEDDED[1 - place].2, &None));
        }
    }

    #[test]
    fn a_folder_that_replaces_nothing_is_an_error() {
        let refused = |files: &[&str], words: &[&str]| {
            let folder = folder(files);
            let error = images(&EMBEDDED, Some(folder.path())).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)) && !error.contains('\n'), "{error}");
            assert!(error.contains(FOLDER), "{error}");
        };
        refused(&[], &["has no .fatbin"]);
        refused(&["gemm.cu"], &["has no .fatbin"]);
        refused(&["gem.fatbin"], &["gem.fatbin", "gemm, sm90_gemm"]);
        refused(&["gemm.fatbin", "conv2d.cubin"], &["conv2d.cubin"]);
        refused(&["gemm.fatbin", "gemm.cubin"], &["gemm.", "same kernels"]);
        let error = images(&EMBEDDED, Some(Path::new("/no/such/folder"))).unwrap_err().to_string();
        assert!(error.contains("/no/such/folder"), "{error}");
    }
}
