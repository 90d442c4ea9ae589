//! Weights: safetensors files, the key names of every checkpoint layout, and packing into the matrices executors use.

mod file;
mod fingerprint;
mod folder;
mod header;
mod keys_text;
mod keys_unet;
mod keys_vae;
mod pack;
mod single_file;

pub use file::{FileId, Stored};
pub use fingerprint::fingerprint;
pub use header::{Header, not_safetensors, parse_header};
pub use pack::Rows;

use crate::{Error, Result};
use file::File;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Which network of a pipeline a weight belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    TextEncoder,
    TextEncoder2,
    Unet,
    Vae,
    /// Reads the attributes of an image of the `shapes` world. From here on: no part of a diffusion pipeline.
    Reader,
    /// `CLIPModel`, or its image tower alone.
    Clip,
    /// A second one, which measures what was optimised by the first.
    HeldOutClip,
    /// Scores a CLIP image embedding.
    Aesthetic,
    /// `GPT2LMHeadModel` that rewrites prompts.
    Policy,
}

impl Component {
    pub const ALL: [Component; 9] = [
        Component::TextEncoder,
        Component::TextEncoder2,
        Component::Unet,
        Component::Vae,
        Component::Reader,
        Component::Clip,
        Component::HeldOutClip,
        Component::Aesthetic,
        Component::Policy,
    ];

    /// What makes images.
    pub const PIPELINE: [Component; 4] =
        [Component::TextEncoder, Component::TextEncoder2, Component::Unet, Component::Vae];

    /// Whether a configuration or tokenizer file of this name is the component's.
    fn owns(self, name: &str) -> bool {
        let folder = name.split('/').next().unwrap_or(name);
        folder.strip_suffix("_preprocessor").unwrap_or(folder) == self.name()
    }

    /// The component's folder in a model; diffusers' name where it has one.
    pub fn name(self) -> &'static str {
        match self {
            Component::TextEncoder => "text_encoder",
            Component::TextEncoder2 => "text_encoder_2",
            Component::Unet => "unet",
            Component::Vae => "vae",
            Component::Reader => "reader",
            Component::Clip => "clip",
            Component::HeldOutClip => "clip_held_out",
            Component::Aesthetic => "aesthetic",
            Component::Policy => "prompt_policy",
        }
    }
}

/// How the stored tensors of a weight become the matrix the executors use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pack {
    /// Stored `[N, K]` (PyTorch linear), or `[N, K, 1, 1]`; value shape `[K, N]`.
    Linear,
    /// As `Linear`; the columns are the value and the gate of a GEGLU, which executors may hold apart.
    Geglu,
    /// Stored `[K, N]` (a bare projection parameter, GPT-2's Conv1D); value shape `[K, N]`.
    LinearTransposed,
    /// Stored `[O, I, kh, kw]`, or `[O, I]` where the kernel is 1x1; value shape `[kh, kw, I, O]`.
    Conv,
    /// Stored `[rows, C]`, used row by row; value shape `[rows, C]`.
    Table,
    /// Stored `[C]`, or `[]` where `C` is 1; value shape `[C]`.
    Vector,
}

impl Pack {
    /// Whether executors hold it as the right operand of products, and not row by row in the order of its shape.
    pub fn is_rhs(self) -> bool {
        match self {
            Pack::Linear | Pack::Geglu | Pack::LinearTransposed | Pack::Conv => true,
            Pack::Table | Pack::Vector => false,
        }
    }
}

/// A weight by name. Several keys are concatenated along the output dimension (fused q/k/v, all K/V of a UNet).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Weight {
    pub component: Component,
    /// diffusers / transformers parameter names.
    pub keys: Vec<String>,
    pub pack: Pack,
    /// The value's shape (see [`Pack`]).
    pub shape: Vec<usize>,
}

impl Weight {
    /// Component and keys: what a named buffer that stands in for the weight is called.
    pub fn name(&self) -> String {
        format!("{}/{}", self.component.name(), self.keys.join("+"))
    }
}

/// All components of a pipeline on disk (or in the binary): tensors under diffusers / transformers names, and configs.
///
/// Whatever the layout of the checkpoint, keys are those diffusers saves; text towers carry the `text_model.` prefix.
pub struct Model {
    path: PathBuf,
    single_file: bool,
    files: Vec<File>,
    tensors: [BTreeMap<String, Tensor>; Component::ALL.len()],
    configs: BTreeMap<String, (PathBuf, serde_json::Value)>,
    tokenizers: BTreeMap<String, Cow<'static, [u8]>>,
    metadata: BTreeMap<String, String>,
    ignored: Vec<String>,
    open_clip: [bool; Component::ALL.len()],
    fingerprint: OnceLock<String>,
}

/// Where a tensor, or some rows of one, lies.
struct Tensor {
    file: usize,
    dtype: Stored,
    /// As diffusers / transformers would store it.
    shape: Vec<usize>,
    range: Range<usize>,
    /// The file holds the two dimensions in the other order.
    transposed: bool,
}

impl Model {
    /// Opens a diffusers folder or a single `.safetensors` checkpoint (CompVis / SGM names).
    ///
    /// Every header is checked here; shapes are checked by [`Model::rows`]. Errors name the file and what was expected.
    pub fn open(path: &Path) -> Result<Model> {
        let mut model = Model::empty(path.to_path_buf());
        if path.is_dir() {
            folder::load(&mut model, &folder::Source::Disk(path))?;
        } else {
            model.single_file = true;
            single_file::load(&mut model, File::open(path)?)?;
        }
        Ok(model)
    }

    /// Puts other weights in the UNet's place: of a UNet-only `.safetensors` file (diffusers or CompVis names), a whole
    /// checkpoint, or a diffusers `unet` folder (or one that holds it), whose `config.json` then counts too.
    pub fn replace_unet(&mut self, path: &Path) -> Result<()> {
        self.tensors[Component::Unet as usize].clear();
        self.fingerprint = OnceLock::new();
        if path.is_dir() {
            folder::load_unet(self, &folder::Source::Disk(path))
        } else {
            single_file::load_unet(self, File::open(path)?)
        }
    }

    /// A diffusers folder compiled into the binary: pairs of the path inside the folder (`unet/config.json`) and the
    /// bytes.
    pub fn embedded(files: &'static [(&'static str, &'static [u8])]) -> Result<Model> {
        let mut model = Model::empty(PathBuf::from("embedded model"));
        folder::load(&mut model, &folder::Source::Embedded(files))?;
        Ok(model)
    }

    /// One network alone: see [`Model::add`].
    pub fn network(c: Component, path: &Path) -> Result<Model> {
        let mut model = Model::empty(path.to_path_buf());
        model.add(c, path)?;
        Ok(model)
    }

    /// Adds a network in the layout of transformers, or puts it in the place of the one there is: CLIP, an aesthetic head, a
    /// prompt policy. `path` is its folder or its `.safetensors` file. Of a file under a name transformers gives weights
    /// (`model.safetensors`), the `config.json` beside it counts too.
    pub fn add(&mut self, c: Component, path: &Path) -> Result<()> {
        self.remove(c);
        if path.is_dir() {
            return folder::load_network(self, &folder::Source::Disk(path), c);
        }
        folder::load_file(self, path, c)
    }

    /// Forgets a network and what belongs to it.
    fn remove(&mut self, c: Component) {
        self.tensors[c as usize].clear();
        self.fingerprint = OnceLock::new();
        self.configs.retain(|name, _| !c.owns(name));
        self.tokenizers.retain(|name, _| !c.owns(name));
    }

    /// Moves a network with its configuration here from another model, into the place of the one there is.
    ///
    /// `Error::File` where the other model has none.
    pub fn take(&mut self, c: Component, from: Model) -> Result<()> {
        if !from.has(c) {
            return Err(Error::file(from.path(), format!("has no {}", c.name())));
        }
        self.remove(c);
        let Model { files, mut tensors, configs, tokenizers, open_clip, .. } = from;
        self.open_clip[c as usize] = open_clip[c as usize];
        let before = self.files.len();
        self.files.extend(files);
        let moved = std::mem::take(&mut tensors[c as usize]).into_iter();
        self.tensors[c as usize] = moved.map(|(key, t)| (key, Tensor { file: before + t.file, ..t })).collect();
        self.configs.extend(configs.into_iter().filter(|(name, _)| c.owns(name)));
        self.tokenizers.extend(tokenizers.into_iter().filter(|(name, _)| c.owns(name)));
        Ok(())
    }

    fn empty(path: PathBuf) -> Model {
        Model {
            path,
            single_file: false,
            files: Vec::new(),
            tensors: Default::default(),
            configs: BTreeMap::new(),
            tokenizers: BTreeMap::new(),
            metadata: BTreeMap::new(),
            ignored: Vec::new(),
            open_clip: Default::default(),
            fingerprint: OnceLock::new(),
        }
    }

    /// The folder or file given to [`Model::open`]; `embedded model` where there is none.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_single_file(&self) -> bool {
        self.single_file
    }

    /// The safetensors files in use, in the order they were opened.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(File::path)
    }

    /// The file a component's weights come from (one of them), or the model's path where it has none; for messages.
    pub fn source(&self, c: Component) -> &Path {
        self.tensors[c as usize].values().next().map_or(&self.path, |t| self.files[t.file].path())
    }

    pub fn has(&self, c: Component) -> bool {
        !self.tensors[c as usize].is_empty()
    }

    /// Whether a text tower came under the names of OpenCLIP (single files of SD 2 and SDXL); its activation is the
    /// exact GELU.
    pub fn is_open_clip(&self, c: Component) -> bool {
        self.open_clip[c as usize]
    }

    /// The shape of a tensor as diffusers / transformers would store it.
    pub fn shape(&self, c: Component, key: &str) -> Option<Vec<usize>> {
        self.tensors[c as usize].get(key).map(|t| t.shape.clone())
    }

    pub fn dtype(&self, c: Component, key: &str) -> Option<Stored> {
        self.tensors[c as usize].get(key).map(|t| t.dtype)
    }

    /// Sorted.
    pub fn keys(&self, c: Component) -> Vec<&str> {
        self.tensors[c as usize].keys().map(String::as_str).collect()
    }

    /// Number of elements of a component's tensors.
    pub fn parameters(&self, c: Component) -> usize {
        self.tensors[c as usize].values().map(|t| t.shape.iter().product::<usize>()).sum()
    }

    /// Bytes a component's tensors take as stored.
    pub fn bytes(&self, c: Component) -> usize {
        self.tensors[c as usize].values().map(|t| t.range.len()).sum()
    }

    /// Tensors of a single file that belong to no component (EMA copies, training state, marks such as `v_pred`),
    /// sorted.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// A parsed configuration file: `model_index`, `scheduler`, `tokenizer`, `tokenizer_2`, `clip_preprocessor` (and
    /// `clip_held_out_preprocessor`), or a component's by its name.
    pub fn config(&self, name: &str) -> Option<&serde_json::Value> {
        self.configs.get(name).map(|(_, json)| json)
    }

    /// Where [`Model::config`] was read from, for messages.
    pub fn config_path(&self, name: &str) -> Option<&Path> {
        self.configs.get(name).map(|(path, _)| path.as_path())
    }

    /// A file of `tokenizer`, `tokenizer_2`, `clip`, `clip_held_out` or `prompt_policy`: `vocab.json`, `merges.txt`, `tokenizer.json`, `special_tokens_map.json`,
    /// `tokenizer_config.json`, `added_tokens.json`.
    pub fn tokenizer_file(&self, folder: &str, file: &str) -> Option<&[u8]> {
        self.tokenizers.get(&format!("{folder}/{file}")).map(|bytes| bytes.as_ref())
    }

    /// An entry of the `__metadata__` of a single file (`modelspec.prediction_type`).
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Opens a weight for reading rows.
    ///
    /// Errors name the key that is missing, is not stored as a float, or has another shape than the weight needs.
    pub fn rows(&self, weight: &Weight) -> Result<Rows<'_>> {
        let found: Result<Vec<_>> = weight.keys.iter().map(|key| self.tensor(weight.component, key)).collect();
        Rows::new(self, weight, &found?)
    }

    /// The opened files that hold a weight. They distinguish it from the weight of that name of another model, and of a network that
    /// this model had before.
    pub fn sources(&self, weight: &Weight) -> Result<Vec<FileId>> {
        weight.keys.iter().map(|key| Ok(self.files[self.tensor(weight.component, key)?.file].id())).collect()
    }

    /// Opens a weight and gives its value, row-major in the weight's shape: what a trainable copy of it starts from.
    pub fn value(&self, weight: &Weight) -> Result<Vec<f32>> {
        let rows = self.rows(weight)?;
        let (n, k) = (rows.rows(), rows.columns());
        let mut values = vec![0.0; n * k];
        rows.read_f32(0, &mut values)?;
        Ok(match weight.pack {
            Pack::Table | Pack::Vector => values,
            // Rows are outputs, which the value has last.
            Pack::Linear | Pack::Geglu | Pack::LinearTransposed | Pack::Conv => {
                (0..n * k).map(|i| values[i % n * k + i / n]).collect()
            }
        })
    }

    /// Has the system read a weight's bytes from disk while the caller works on others; a weight that is not there is left to
    /// [`Model::rows`] to report.
    pub fn prefetch(&self, weight: &Weight) {
        for tensor in weight.keys.iter().filter_map(|key| self.tensor(weight.component, key).ok()) {
            self.files[tensor.file].prefetch(&tensor.range);
        }
    }

    fn tensor(&self, c: Component, key: &str) -> Result<&Tensor> {
        self.tensors[c as usize].get(key).ok_or_else(|| Error::Tensor {
            path: self.source(c).to_path_buf(),
            key: key.to_string(),
            what: format!("is missing from the {}", c.name()),
        })
    }

    /// Enters a tensor under its diffusers name.
    fn insert(&mut self, c: Component, key: String, tensor: Tensor) -> Result<()> {
        let path = self.files[tensor.file].path().to_path_buf();
        match self.tensors[c as usize].insert(key.clone(), tensor) {
            None => Ok(()),
            Some(_) => {
                Err(Error::Tensor { path, key, what: format!("two tensors of the {} have this name", c.name()) })
            }
        }
    }
}

impl Tensor {
    /// A whole tensor of file number `file`.
    fn whole(file: usize, info: &safetensors::tensor::TensorInfo) -> Tensor {
        let (start, end) = info.data_offsets;
        Tensor { file, dtype: info.dtype, shape: info.shape.clone(), range: start..end, transposed: false }
    }
}

#[cfg(test)]
mod testing {
    use super::Stored;
    use safetensors::tensor::TensorView;

    /// A safetensors file of F32 tensors, each counting up from 0; leaked, as embedded files live for ever.
    pub(super) fn file(tensors: &[(&str, &[usize])]) -> &'static [u8] {
        let data =
            |shape: &[usize]| (0..shape.iter().product()).flat_map(|i: usize| (i as f32).to_le_bytes()).collect();
        let data: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| data(shape)).collect();
        typed(&tensors.iter().zip(&data).map(|((k, s), d)| (*k, Stored::F32, *s, &d[..])).collect::<Vec<_>>())
    }

    /// A safetensors file of tensors given as name, type, shape and bytes.
    pub(super) fn typed(tensors: &[(&str, Stored, &[usize], &[u8])]) -> &'static [u8] {
        let views = tensors
            .iter()
            .map(|(key, dtype, shape, data)| (*key, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
        safetensors::serialize(views, None).unwrap().leak()
    }
}
