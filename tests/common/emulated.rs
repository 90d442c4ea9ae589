//! The kernels compiled for the host: built once per content with the system's C++ compiler, opened by every test that runs them.
//!
//! `RAREBIT_KERNEL_SOURCES` names another folder of kernels (planted defects), `RAREBIT_CXXFLAGS` adds flags (sanitizers, coverage), and
//! `RAREBIT_EMULATION` is where the library is kept.

use rarebit::exec::cuda::{Cuda, Emulated, Hopper, Settings};
use rarebit::program::{Op, Program};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::{env, fs};

/// An executor on the emulated driver, with the kernels for any GPU.
pub fn cuda(settings: Settings) -> Cuda {
    on(settings, Hopper::Off)
}

/// Executors for a program: that, and where there are others for Hopper that it could use, one with those.
pub fn cudas(settings: Settings, program: &Program) -> Vec<Cuda> {
    let all = [Hopper::Off, Hopper::Always].into_iter().take(if could_use_hopper(program) { 2 } else { 1 });
    all.map(|hopper| on(settings, hopper)).collect()
}

/// Whether it has products of 16 bits.
pub fn could_use_hopper(program: &Program) -> bool {
    let is_product = |op: &Op| {
        matches!(op, Op::Gemm(_) | Op::GemmBackward(_) | Op::Conv2d(_) | Op::Conv2dBackward(_) | Op::Attention(_))
    };
    program.dtype.bytes() == 2 && program.nodes.iter().any(|node| is_product(&node.op))
}

fn on(settings: Settings, hopper: Hopper) -> Cuda {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let path = LIBRARY.get_or_init(build);
    Cuda::new(Box::new(Emulated::open(path, settings).unwrap())).with_hopper(hopper)
}

/// Whether `RAREBIT_CASES` asks for a case: it names parts of names, separated by `|`.
pub fn wanted(name: &str) -> bool {
    env::var("RAREBIT_CASES").map_or(true, |parts| parts.split('|').any(|part| name.contains(part)))
}

/// Where the library is put, `target/tmp`: cargo names it to tests, but not to examples, which lie in `target/PROFILE/examples`.
fn target() -> PathBuf {
    let asked = env::var_os("RAREBIT_EMULATION").map(PathBuf::from);
    let beside = || Some(env::current_exe().ok()?.ancestors().nth(3)?.join("tmp"));
    let folder =
        asked.or(option_env!("CARGO_TARGET_TMPDIR").map(PathBuf::from)).or_else(beside).expect("a target folder");
    fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    folder
}

/// The emulation of this build's kernels, or of the folder that is named.
pub fn build() -> PathBuf {
    let folder = env::var_os("RAREBIT_KERNEL_SOURCES").map(PathBuf::from);
    build_from(&folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")))
}

/// Compiles the emulation of a folder of kernels unless its library is there, and returns the library.
pub fn build_from(folder: &Path) -> PathBuf {
    // Tests of one process wait for each other, so that it is compiled once.
    static COMPILER: Mutex<()> = Mutex::new(());
    let _waited = COMPILER.lock().unwrap_or_else(PoisonError::into_inner);
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".into());
    let flags = env::var("RAREBIT_CXXFLAGS").unwrap_or_default();
    let mut hash = DefaultHasher::new();
    (&compiler, &flags).hash(&mut hash);
    for file in sources(folder) {
        fs::read(file).unwrap().hash(&mut hash);
    }
    let target = target();
    let library = target.join(format!("emulated-{:016x}.so", hash.finish()));
    if library.exists() {
        return library;
    }
    let partial = target.join(format!("emulated-{}.partial.so", std::process::id()));
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-pthread", "-Wall", "-Wno-unknown-pragmas"])
        .args(["-Wno-unused-function", "-Wno-unused-variable"])
        .args(flags.split_whitespace())
        .arg("-o")
        .args([&partial, &folder.join("host/emulation.cpp")])
        .output()
        .unwrap_or_else(|error| panic!("cannot run the C++ compiler '{compiler}': {error}; install one or set CXX"));
    assert!(output.status.success(), "{compiler} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&partial, &library).unwrap();
    library
}

/// Every file the emulation is made of.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = [folder.to_path_buf(), folder.join("host")]
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end != "md"))
        .collect();
    files.sort();
    files
}
