//! Compiles kernels/*.cu with nvcc into fat binaries that the crate embeds; where there is no nvcc it embeds none and still builds.
//! The numbers of kernels/constants.cuh become Rust constants either way.
//!
//! Environment: `NVCC` (the compiler), `RAREBIT_CUDA_ARCHS` (what to compile for, such as `90a` or `80+ptx,90a`),
//! `RAREBIT_REQUIRE_KERNELS=1` (no nvcc is an error), `RAREBIT_KERNEL_CACHE` (where compiled files are kept).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

/// SASS for each, and PTX of the oldest for devices that come later; PTX of an `a` target would run nowhere else.
const ARCHS: &str = "80+ptx,86,89,90a,100,120";
/// What nvcc before 12.8 knows of them.
const ARCHS_BEFORE_12_8: &str = "80+ptx,86,89,90a";

const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v", "--fatbin"];

/// Variables that decide which compiler runs and what comes out. PATH is not among them: it differs between a shell and an editor,
/// and each would build the crate again after the other.
const ENVIRONMENT: &str = "NVCC CUDA_HOME CUDA_PATH NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS \
                           RAREBIT_CUDA_ARCHS RAREBIT_REQUIRE_KERNELS RAREBIT_KERNEL_CACHE";

const REPORT_HEADER: &str = "kernel\tarch\tregisters\tspill stores\tspill loads\tstatic shared\tstack\tserialised";

/// One line each, for cargo to print.
pub type Errors = Vec<String>;

fn main() {
    for name in ENVIRONMENT.split_whitespace() {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // .cuda is in the repository, empty: installing nvcc into it later is seen.
    for path in ["build.rs", "kernels", ".cuda"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for line in build().err().into_iter().flatten() {
        println!("cargo::error={line}");
    }
}

fn build() -> Result<(), Errors> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    match find_nvcc()? {
        Some(nvcc) => {
            println!("cargo::rerun-if-changed={}", nvcc.display());
            let compiler = Compiler::new(nvcc, cache(&out)?)?;
            generate(&out, &compiler.compile_all(&list("cu")?)?, &compiler.archs)
        }
        None if variable("RAREBIT_REQUIRE_KERNELS").is_some_and(|value| value != "0") => Err(vec![
            "RAREBIT_REQUIRE_KERNELS is set, but no nvcc was found; run tools/install-nvcc, or set NVCC".into(),
        ]),
        None => generate(&out, &[], ""),
    }
}

/// A variable of the environment that is set to something.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn find_nvcc() -> Result<Option<PathBuf>, Errors> {
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    if let Some(nvcc) = variable("NVCC").map(PathBuf::from) {
        let missing = || vec![format!("NVCC={} is not a file; point it at nvcc or unset it", nvcc.display())];
        return if nvcc.is_file() { Ok(Some(nvcc)) } else { Err(missing()) };
    }
    let mut folders: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(PathBuf::from).collect();
    folders.iter_mut().for_each(|folder| folder.push("bin"));
    let root = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    folders.push(Path::new(&root).join(".cuda/nvidia/cu13/bin"));
    folders.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    folders.push("/usr/local/cuda/bin".into());
    Ok(folders.into_iter().map(|folder| folder.join(&name)).find(|path| path.is_file()))
}

/// Files of kernels/ itself (not of its folders) by extension, sorted.
fn list(extension: &str) -> Result<Vec<PathBuf>, Errors> {
    let folder = Path::new("kernels");
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(io("read", folder))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(io("read", folder))?.path();
        if path.extension().is_some_and(|e| e == extension) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Where compiled files are kept: one place for all profiles of a target folder, `<target>/<profile>/build/<package>/out` being ours.
fn cache(out: &Path) -> Result<PathBuf, Errors> {
    let target = out.ancestors().find(|path| path.ends_with("build")).and_then(|build| build.ancestors().nth(2));
    let cache =
        variable("RAREBIT_KERNEL_CACHE").map_or_else(|| target.unwrap_or(out).join("kernels-cache"), PathBuf::from);
    fs::create_dir_all(&cache).map_err(io("create", &cache))?;
    Ok(cache)
}

fn io<'a>(action: &'a str, path: &'a Path) -> impl Fn(std::io::Error) -> Errors + 'a {
    move |error| vec![format!("cannot {action} {}: {error}", path.display())]
}

struct Compiler {
    nvcc: PathBuf,
    flags: Vec<String>,
    archs: String,
    cache: PathBuf,
    /// Of all that the kernel files share: compiler, flags, headers.
    hash: u64,
}

/// A fat binary in the cache, and its lines of the report.
struct Compiled {
    stem: String,
    /// The architectures that the file is for, or nothing where it is for all.
    only: String,
    binary: PathBuf,
    report: String,
}

impl Compiler {
    fn new(nvcc: PathBuf, cache: PathBuf) -> Result<Compiler, Errors> {
        let output = Command::new(&nvcc).arg("--version").output().map_err(io("run", &nvcc))?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        let release = release(&version).ok_or_else(|| {
            vec![format!("{} --version names no release; point NVCC at NVIDIA's nvcc", nvcc.display())]
        })?;
        let recent = release >= (12, 8);
        let archs =
            variable("RAREBIT_CUDA_ARCHS").unwrap_or_else(|| if recent { ARCHS } else { ARCHS_BEFORE_12_8 }.into());
        let mut flags: Vec<String> = FLAGS.map(String::from).into();
        flags.extend(recent.then(|| "--compress-mode=size".into()));
        archs.split(',').try_for_each(|arch| targets(arch.trim()).map(drop))?;
        let mut hash = 0xcbf2_9ce4_8422_2325;
        let environment = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"].map(|name| variable(name).unwrap_or_default());
        for text in flags.iter().chain(&environment).chain([&version, &REPORT_HEADER.to_string()]) {
            add(&mut hash, text.as_bytes());
        }
        for header in list("cuh")? {
            add(&mut hash, header.as_os_str().as_encoded_bytes());
            add(&mut hash, &fs::read(&header).map_err(io("read", &header))?);
        }
        Ok(Compiler { nvcc, flags, archs, cache, hash })
    }

    /// As many files at a time as cargo was given jobs.
    fn compile_all(&self, sources: &[PathBuf]) -> Result<Vec<Compiled>, Errors> {
        let jobs = variable("NUM_JOBS").and_then(|jobs| jobs.parse().ok()).unwrap_or(1).min(sources.len());
        let next = AtomicUsize::new(0);
        let work = || -> Vec<_> {
            std::iter::from_fn(|| sources.get(next.fetch_add(1, Ordering::Relaxed))).map(|s| self.compile(s)).collect()
        };
        let results: Vec<Result<Option<Compiled>, Errors>> = thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("a compiling thread panicked")).collect()
        });
        let (mut compiled, mut errors) = (Vec::new(), Errors::new());
        for result in results {
            match result {
                Ok(one) => compiled.extend(one),
                Err(lines) => errors.extend(lines),
            }
        }
        compiled.sort_by(|a, b| a.stem.cmp(&b.stem));
        if errors.is_empty() { Ok(compiled) } else { Err(errors) }
    }

    /// A file whose first line is `// architectures: ` and a list is compiled for those alone; where none of them is asked for,
    /// not at all.
    fn compile(&self, source: &Path) -> Result<Option<Compiled>, Errors> {
        let text = fs::read_to_string(source).map_err(io("read", source))?;
        let stem = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let only = text.lines().next().and_then(|line| line.strip_prefix("// architectures: ")).unwrap_or_default();
        let wanted = |arch: &&str| only.is_empty() || only.split(',').any(|one| one == arch.trim_end_matches("+ptx"));
        let archs: Vec<&str> = self.archs.split(',').map(str::trim).filter(wanted).collect();
        if archs.is_empty() {
            return Ok(None);
        }
        let mut hash = self.hash;
        add(&mut hash, archs.join(",").as_bytes());
        add(&mut hash, text.as_bytes());
        let stored = |extension| self.cache.join(format!("{stem}-{hash:016x}.{extension}"));
        let (binary, report) = (stored("fatbin"), stored("tsv"));
        if !binary.is_file() || !report.is_file() {
            // Written beside its place and renamed, the binary last: neither a build that was broken off nor one at the same
            // time leaves half a file under the final name.
            let unfinished = self.cache.join(format!("{stem}.{}.tmp", std::process::id()));
            let rows = self.run(source, &archs, &unfinished).inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
            let unfinished_report = unfinished.with_extension("tsv.tmp");
            fs::write(&unfinished_report, rows).map_err(io("write", &unfinished_report))?;
            fs::rename(&unfinished_report, &report).map_err(io("create", &report))?;
            fs::rename(&unfinished, &binary).map_err(io("create", &binary))?;
        }
        let report = fs::read_to_string(&report).map_err(io("read", &report))?;
        let wrong = judge(&source.display().to_string(), &text, &report);
        if wrong.is_empty() { Ok(Some(Compiled { stem, only: only.to_string(), binary, report })) } else { Err(wrong) }
    }

    /// Runs nvcc and returns ptxas' report.
    fn run(&self, source: &Path, archs: &[&str], binary: &Path) -> Result<String, Errors> {
        let mut command = Command::new(&self.nvcc);
        command.args(&self.flags);
        for arch in archs {
            command.args(targets(arch)?);
        }
        command.arg("-o").arg(binary).arg(source);
        let output = command.output().map_err(io("run", &self.nvcc))?;
        let log = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        if !output.status.success() {
            let printed = lines.iter().filter(|line| !line.starts_with("ptxas info")).map(|line| line.to_string());
            return Err(printed.chain([format!("{}: nvcc failed", source.display())]).collect());
        }
        let mut warnings: Vec<_> = lines.iter().filter(|line| line.contains(": warning")).collect();
        warnings.sort();
        warnings.dedup();
        warnings.iter().for_each(|line| println!("cargo::warning={line}"));
        report(&source.display().to_string(), &lines)
    }
}

/// `13.0` of "… release 13.0, V13.0.88".
fn release(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.split("release ").nth(1)?.split(',').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// nvcc's flags for one entry of the list of architectures.
fn targets(arch: &str) -> Result<Vec<String>, Errors> {
    let name = arch.strip_suffix("+ptx").unwrap_or(arch);
    let digits = name.trim_end_matches(['a', 'f']);
    if digits.len() < 2 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(vec![format!(
            "RAREBIT_CUDA_ARCHS: '{arch}' is no architecture; give a list such as 90a or 80+ptx,90a"
        )]);
    }
    let mut flags = vec![format!("-gencode=arch=compute_{name},code=sm_{name}")];
    if name != arch {
        flags.push(format!("-gencode=arch=compute_{name},code=compute_{name}"));
    }
    Ok(flags)
}

/// FNV-1a, with the length so that two texts do not run into each other.
fn add(hash: &mut u64, bytes: &[u8]) {
    for byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
        *hash = (*hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
}

/// How ptxas says that it had to have the products of a warpgroup (wgmma) wait for each other.
const SERIALISED: &str = "Potential Performance Loss";

/// One line per kernel and architecture from what ptxas -v printed, in the columns of [`REPORT_HEADER`]. What it says of no kernel of
/// the file is an error.
pub fn report(file: &str, lines: &[&str]) -> Result<String, Errors> {
    let (mut arch, mut kernel, mut memory) = ("", "", None);
    let (mut rows, mut kernels) = (String::new(), Vec::new());
    let losses: Vec<&str> = lines.iter().copied().filter(|line| line.contains(SERIALISED)).collect();
    let tells_of = |line: &str, kernel: &str| line.contains(&format!("'{kernel}'"));
    for line in lines {
        if let Some((_, name)) = line.split_once("' for 'sm_") {
            arch = name.trim_end_matches('\'');
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            (kernel, memory) = (name, None);
        } else if let Some(stack) = number(line, " bytes stack frame") {
            let (stores, loads) = (number(line, " bytes spill stores"), number(line, " bytes spill loads"));
            memory = stores.zip(loads).map(|(stores, loads)| (stack, stores, loads));
        } else if let (Some(registers), Some((stack, stores, loads))) = (number(line, " registers"), memory) {
            let shared = number(line, " bytes smem").unwrap_or(0);
            let serialised = u32::from(losses.iter().any(|line| tells_of(line, kernel)));
            let _ = writeln!(rows, "{kernel}\t{arch}\t{registers}\t{stores}\t{loads}\t{shared}\t{stack}\t{serialised}");
            kernels.push(kernel);
        }
    }
    let unplaced = losses.iter().filter(|line| !kernels.iter().any(|kernel| tells_of(line, kernel)));
    let errors: Errors = unplaced.map(|line| format!("{file}: {line}")).collect();
    if errors.is_empty() { Ok(rows) } else { Err(errors) }
}

/// What of a file's report is an error: registers that spill to memory; local memory (an array that is not indexed by constants),
/// unless a line `// local memory: <kernel>` in the file's text allows it; products of a warpgroup that wait for each other.
pub fn judge(file: &str, text: &str, report: &str) -> Errors {
    let allowances = text.lines().filter_map(|line| line.trim().strip_prefix("// local memory: "));
    let allowed: Vec<&str> = allowances.filter_map(|line| line.split([' ', ',', ':', ';', '(']).next()).collect();
    let mut errors = Errors::new();
    for row in report.lines() {
        let [kernel, arch, _, stores, loads, _, stack, serialised] = row.split('\t').collect::<Vec<_>>()[..] else {
            errors.push(format!("{file}: its report has a line of another form: {row}"));
            continue;
        };
        if stores != "0" || loads != "0" {
            errors.push(format!(
                "{file}: {kernel} spills registers on sm_{arch} ({stores} bytes stored, {loads} loaded); make its tile smaller"
            ));
        } else if stack != "0" && !allowed.contains(&kernel) {
            errors.push(format!(
                "{file}: {kernel} keeps {stack} bytes in local memory on sm_{arch}; index its arrays by constants, \
                 or allow it by a line '// local memory: {kernel}' that says why"
            ));
        }
        if serialised != "0" {
            errors.push(format!(
                "{file}: {kernel} has its wgmma serialised on sm_{arch}; keep branches and accumulators out of the products' way \
                 (ptxas -v says which)"
            ));
        }
    }
    if report.is_empty() {
        // A report in a form that is not known would hide every spill.
        errors.push(format!(
            "{file}: ptxas reported no kernel; the file has none, or this nvcc words its report in another way"
        ));
    }
    errors
}

/// The number in front of `what`, if the line has it.
fn number(line: &str, what: &str) -> Option<u32> {
    line.split_once(what)?.0.rsplit(' ').next()?.parse().ok()
}

/// Rust constants of what a header declares: `constexpr int NAME = 1, OTHER = 2;` and tables `constexpr int NAME[][2] = {{1, 2}};`.
/// Comments and preprocessor lines aside it may have nothing else.
pub fn constants(text: &str) -> Result<String, String> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code: Vec<&str> = code.filter(|line| !line.trim_start().starts_with('#')).collect();
    let mut rust = String::new();
    for statement in code.join(" ").split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
        let unknown = || format!("'{statement}' is neither numbers nor a table, which is all that this file may have");
        let declared = statement.strip_prefix("constexpr int ").ok_or_else(unknown)?;
        if let Some((name, table)) = declared.split_once("[][") {
            let (columns, rows) = table.split_once("] = ").ok_or_else(unknown)?;
            let count = rows.matches('{').count().saturating_sub(1);
            let rows = rows.replace('{', "[").replace('}', "]");
            let _ = writeln!(rust, "    pub const {name}: [[usize; {columns}]; {count}] = {rows};");
        } else {
            for one in declared.split(',') {
                let (name, value) = one.split_once('=').ok_or_else(unknown)?;
                let value: usize = value.trim().parse().map_err(|_| unknown())?;
                let _ = writeln!(rust, "    pub const {}: usize = {value};", name.trim());
            }
        }
    }
    Ok(rust)
}

/// Writes what src/exec/cuda includes: the fat binaries by the file's stem, the report, the architectures they are for, and the
/// constants.
fn generate(out: &Path, compiled: &[Compiled], archs: &str) -> Result<(), Errors> {
    let mut code = String::from("#[repr(C, align(16))]\n#[allow(dead_code)]\nstruct Aligned<T: ?Sized>(T);\n\n");
    code += "/// Stems of files in kernels/, what they are for alone (or empty), fat binaries; none where the crate was built without nvcc.\n";
    code += "pub static FAT_BINARIES: &[(&str, &str, &[u8])] = &[\n";
    for Compiled { stem, only, binary, .. } in compiled {
        let copy = out.join(format!("{stem}.fatbin"));
        fs::copy(binary, &copy).map_err(io("create", &copy))?;
        let _ = writeln!(code, "    ({stem:?}, {only:?}, &Aligned(*include_bytes!({copy:?})).0),");
    }
    code += "];\n\n/// Registers, spills and memory of every kernel on every architecture as ptxas reported them, tab-separated.\n";
    code += "pub static REPORT: &str = include_str!(concat!(env!(\"OUT_DIR\"), \"/kernels.tsv\"));\n\n";
    let _ = writeln!(code, "/// What the fat binaries hold.\npub static ARCHITECTURES: &str = {archs:?};");
    let header = Path::new("kernels/constants.cuh");
    let numbers = constants(&fs::read_to_string(header).map_err(io("read", header))?);
    let numbers = numbers.map_err(|what| vec![format!("{}: {what}", header.display())])?;
    let _ = writeln!(
        code,
        "\n/// What kernels and launches share.\n#[rustfmt::skip]\npub(crate) mod constants {{\n{numbers}}}"
    );
    let mut rows: Vec<&str> = compiled.iter().flat_map(|one| one.report.lines()).collect();
    rows.sort();
    let name_and_arch = |row: &str| row.splitn(3, '\t').take(2).collect::<Vec<_>>().join(" for sm_");
    if let Some(pair) = rows.windows(2).find(|pair| name_and_arch(pair[0]) == name_and_arch(pair[1])) {
        return Err(vec![format!("kernels/: two files hold {}; give one another name", name_and_arch(pair[0]))]);
    }
    rows.insert(0, REPORT_HEADER);
    for (name, text) in [("kernels.tsv", format!("{}\n", rows.join("\n"))), ("kernels.rs", code)] {
        let path = out.join(name);
        fs::write(&path, text).map_err(io("write", &path))?;
    }
    Ok(())
}
