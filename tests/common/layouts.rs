//! The tiny pipelines in other forms, made from their folders: single files (`single_file.json`), a UNet-only file, copies with other
//! numbers.

use super::golden::data_folder;
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorView};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// All tensors of one component folder, shards together.
fn component(model: &str, name: &str) -> BTreeMap<String, Stored> {
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(data_folder(model).join(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        for (key, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let stored = Stored { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() };
            tensors.insert(key, stored);
        }
    }
    assert!(!tensors.is_empty(), "{model}/{name} holds no tensors");
    tensors
}

fn serialize(tensors: &BTreeMap<String, Stored>) -> Vec<u8> {
    let views = tensors.iter().map(|(key, t)| (key, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()
}

/// The UNet with the elements of every tensor in reverse order: other weights, the same architecture.
pub fn reversed_unet(model: &str) -> Vec<u8> {
    let mut tensors = component(model, "unet");
    for tensor in tensors.values_mut() {
        let size = tensor.dtype.bitsize() / 8;
        tensor.data = tensor.data.chunks(size).rev().flatten().copied().collect();
    }
    serialize(&tensors)
}

/// Key, operation, dtype, shape, and the (component, tensor) pairs it is made of.
type Row = (String, String, String, Vec<usize>, Vec<(String, String)>);

/// Writes the single-file checkpoint of a folder, as its plan says.
pub fn write_single_file(model: &str, path: &Path) {
    let plan = std::fs::read(data_folder(model).join("single_file.json")).unwrap();
    let plan: Vec<Row> = serde_json::from_slice(&plan).unwrap();
    let mut components: BTreeMap<String, BTreeMap<String, Stored>> = BTreeMap::new();
    let mut file = BTreeMap::new();
    for (key, op, dtype, shape, sources) in plan {
        let dtype: Dtype = serde_json::from_value(Value::String(dtype)).unwrap();
        let size = dtype.bitsize() / 8;
        let mut parts = Vec::new();
        for (name, tensor) in &sources {
            let tensors = components.entry(name.clone()).or_insert_with(|| component(model, name));
            let stored = &tensors[tensor];
            assert_eq!(stored.dtype, dtype, "{key}");
            parts.push(if op == "transpose" {
                transpose(&stored.data, &stored.shape, size)
            } else {
                stored.data.clone()
            });
        }
        let data = match op.as_str() {
            "copy" | "reshape" | "transpose" | "concat" => parts.concat(),
            "zeros" => vec![0; shape.iter().product::<usize>() * size],
            other => panic!("unknown operation {other}"),
        };
        file.insert(key, Stored { dtype, shape, data });
    }
    std::fs::write(path, serialize(&file)).unwrap();
}

fn transpose(data: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
    let [rows, columns] = shape[..] else { panic!("{shape:?} is no matrix") };
    let element = |r: usize, c: usize| &data[(r * columns + c) * size..][..size];
    (0..columns).flat_map(|c| (0..rows).flat_map(move |r| element(r, c).iter().copied())).collect()
}

/// A writable copy of a tiny pipeline.
pub fn copy_of(name: &str) -> TempDir {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.path().is_dir() {
                copy(&entry.path(), &target)
            } else {
                fs::write(target, fs::read(entry.path()).unwrap()).unwrap()
            }
        }
    }
    let folder = TempDir::new().unwrap();
    copy(&data_folder(name), folder.path());
    folder
}

/// The weights of a component in such a copy.
pub fn weights_of(model: &TempDir, component: &str) -> std::path::PathBuf {
    model.path().join(component).join("diffusion_pytorch_model.safetensors")
}

/// Writes the tensors of a file to another under the names `rename` gives each: none, one or several.
pub fn rename_tensors(from: &Path, to: &Path, rename: impl Fn(&str) -> Vec<String>) {
    let bytes = fs::read(from).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let renamed =
        file.tensors().into_iter().flat_map(|(key, view)| rename(&key).into_iter().map(move |key| (key, view.clone())));
    let renamed: Vec<_> = renamed.collect();
    fs::write(to, safetensors::serialize(renamed, None).unwrap()).unwrap();
}

/// Multiplies tensors of a file of f16, which are f32 from then on.
pub fn scale_tensors(file: &Path, factors: &[(&str, f32)]) {
    let bytes = fs::read(file).unwrap();
    let mut tensors = BTreeMap::new();
    for (key, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let stored = Stored { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() };
        tensors.insert(key, stored);
    }
    for (key, factor) in factors {
        let tensor = tensors.get_mut(*key).unwrap();
        assert_eq!(tensor.dtype, Dtype::F16, "{key}");
        let scaled = |x: &[u8]| (half::f16::from_le_bytes([x[0], x[1]]).to_f32() * factor).to_le_bytes();
        (tensor.dtype, tensor.data) = (Dtype::F32, tensor.data.chunks(2).flat_map(scaled).collect());
    }
    fs::write(file, serialize(&tensors)).unwrap();
}
