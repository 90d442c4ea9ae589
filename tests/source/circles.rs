//! No files import each other in a circle.
//!
//! A file imports the files that define what it names, by `use` or by a path in its code. What a folder's `mod.rs` declares (`mod x;`)
//! or passes on (`pub use x::Y;`) is its table of contents and no import: names are followed through it to the file that defines them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Where no circle is.
const FOLDERS: [&str; 4] = ["cli", "exec", "methods", "optimize"];

/// The path of a module from the crate's root.
type Module = Vec<String>;

/// What the files of a tree say of each other.
struct Files {
    sources: BTreeMap<Module, String>,
    /// Per module, what it passes on: the name, and what stands for it.
    passed_on: BTreeMap<Module, BTreeMap<String, Module>>,
}

fn segments(path: &str) -> Module {
    path.split("::").map(|segment| segment.trim().to_string()).collect()
}

/// A file's text without comments and without the unit tests at its end.
fn code(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
    let code = lines.join("\n");
    code.split("#[cfg(test)]\nmod tests").next().unwrap_or("").to_string()
}

/// `a::{b, c::{d, e}}` → `a::b`, `a::c::d`, `a::c::e`; of `x as y` the first.
fn unfold(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        return vec![tree.split(" as ").next().unwrap_or("").to_string()];
    };
    let (head, list) = (&tree[..open], &tree[open + 1..tree.rfind('}').unwrap_or(tree.len())]);
    let (mut depth, mut start, mut entries) = (0, 0, vec![]);
    for (at, c) in list.char_indices().chain([(list.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                entries.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    let named = entries.into_iter().filter(|entry| !entry.trim().is_empty());
    named.flat_map(unfold).map(|entry| format!("{head}{entry}")).collect()
}

/// The `use` declarations of a file and the rest of it: visibility, whether it stands at the margin, tree.
fn uses(code: &str) -> (Vec<(bool, bool, String)>, String) {
    let (mut found, mut rest) = (vec![], String::new());
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        let bare = line.trim_start();
        let is_public = bare.starts_with("pub");
        let after = bare.strip_prefix("pub").map_or(bare, |rest| {
            rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).map_or(rest, |(_, rest)| rest).trim_start()
        });
        let Some(tree) = after.strip_prefix("use ") else {
            rest.push_str(line);
            rest.push('\n');
            continue;
        };
        let mut tree = tree.to_string();
        while !tree.contains(';') {
            tree.push(' ');
            tree.push_str(lines.next().unwrap_or(";").trim());
        }
        found.push((is_public, bare.len() == line.len(), tree.split(';').next().unwrap_or("").to_string()));
    }
    (found, rest)
}

/// Every `a::b::c` in code.
fn paths(code: &str) -> Vec<String> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let words = code.split(|c: char| !is_part(c)).map(|word| word.trim_matches(':'));
    words.filter(|word| word.contains("::")).map(str::to_string).collect()
}

impl Files {
    fn read(root: &Path) -> Files {
        let mut sources = BTreeMap::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let inside = path.strip_prefix(root).unwrap().with_extension("");
                    let mut module: Module = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
                    module.pop_if(|last| last == "mod");
                    sources.insert(module, code(&fs::read_to_string(&path).unwrap()));
                }
            }
        }
        Files::of(sources)
    }

    fn of(sources: BTreeMap<Module, String>) -> Files {
        let mut files = Files { passed_on: BTreeMap::new(), sources };
        for (module, source) in &files.sources {
            let mut names = BTreeMap::new();
            for (is_public, _, tree) in uses(source).0 {
                for path in unfold(&tree).into_iter().map(|path| segments(&path)).filter(|_| is_public) {
                    if files.is_child(module, &path[0]) {
                        names.insert(path.last().unwrap().clone(), [&module[..], &path].concat());
                    }
                }
            }
            files.passed_on.insert(module.clone(), names);
        }
        files
    }

    fn is_child(&self, module: &Module, name: &str) -> bool {
        self.sources.contains_key(&[&module[..], &[name.to_string()]].concat())
    }

    /// The file that defines what a path from the root names.
    fn defines(&self, path: &[String]) -> Option<Module> {
        let mut module = Module::new();
        for (index, name) in path.iter().enumerate() {
            if self.is_child(&module, name) {
                module.push(name.clone());
            } else if let Some(to) = self.passed_on.get(&module).and_then(|names| names.get(name)) {
                return self.defines(&[&to[..], &path[index + 1..]].concat());
            } else {
                break;
            }
        }
        self.sources.contains_key(&module).then_some(module)
    }

    /// A path as a file has it, from the root; `None` where it leads out of the crate.
    fn absolute(&self, module: &Module, path: &[String]) -> Option<Module> {
        let ups = path.iter().take_while(|name| *name == "super").count();
        match path[0].as_str() {
            "crate" => Some(path[1..].to_vec()),
            "super" => Some([&module[..module.len().checked_sub(ups)?], &path[ups..]].concat()),
            name => self.is_child(module, name).then(|| [&module[..], path].concat()),
        }
    }

    fn imports(&self, module: &Module) -> BTreeSet<Module> {
        let (uses, rest) = uses(&self.sources[module]);
        // What an inner module takes from around it is in the same file.
        let is_import =
            |public: bool, at_margin: bool, path: &str| !public && (at_margin || !path.starts_with("super"));
        let uses = uses.into_iter().flat_map(|(public, at_margin, tree)| {
            unfold(&tree).into_iter().filter(move |path| is_import(public, at_margin, path)).collect::<Vec<_>>()
        });
        let named = uses.chain(paths(&rest)).filter_map(|path| self.absolute(module, &segments(&path)));
        named.filter_map(|path| self.defines(&path)).filter(|file| file != module).collect()
    }

    /// Groups of files of which each imports all others, directly or not.
    fn circles(&self, folders: &[&str]) -> Vec<Vec<String>> {
        let is_inside = |module: &&Module| module.first().is_some_and(|first| folders.contains(&first.as_str()));
        let modules: Vec<&Module> = self.sources.keys().filter(is_inside).collect();
        let imports: BTreeMap<&Module, BTreeSet<Module>> = modules.iter().map(|m| (*m, self.imports(m))).collect();
        let reached: BTreeMap<&Module, BTreeSet<Module>> = modules.iter().map(|m| (*m, reached(&imports, m))).collect();
        let circle = |module: &&Module| -> Vec<String> {
            let leads_back = |other: &&Module| reached.get(*other).is_some_and(|back| back.contains(*module));
            reached[*module].iter().filter(leads_back).map(|other| other.join("::")).collect()
        };
        let circles: BTreeSet<Vec<String>> = modules.iter().map(circle).filter(|circle| !circle.is_empty()).collect();
        circles.into_iter().collect()
    }
}

/// What a file imports, directly or not; itself only in a circle.
fn reached(imports: &BTreeMap<&Module, BTreeSet<Module>>, from: &Module) -> BTreeSet<Module> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(module) = open.pop() {
        for next in imports.get(module).into_iter().flatten() {
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    seen
}

#[test]
fn no_file_imports_itself() {
    let files = Files::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let imports: usize = files.sources.keys().map(|module| files.imports(module).len()).sum();
    assert!(imports > 500, "only {imports} imports found: is the test reading the right folder?");
    let circles = files.circles(&FOLDERS);
    let lines: Vec<String> = circles.iter().map(|circle| circle.join(" <-> ")).collect();
    assert!(circles.is_empty(), "{}", lines.join("\n"));
}

#[test]
fn finds_circles() {
    let files =
        |sources: &[(&str, &str)]| Files::of(sources.iter().map(|(path, text)| (segments(path), code(text))).collect());
    let circles = |sources: &[(&str, &str)]| files(sources).circles(&["a"]);
    let chain = [("a", "mod b;\nmod c;\npub use b::B;\n"), ("a::b", "use super::c::{C, D as E};"), ("a::c", "")];
    assert!(circles(&chain).is_empty(), "{:?}", circles(&chain));
    // Through what the parent passes on, a path in code, and `use` in a function; not through tests and comments.
    for back in [
        "use super::B;",
        "fn f() -> crate::a::B {}",
        "fn f() {\n    use crate::a::{b::B};\n}",
        "pub fn f() { super::b::g() }",
    ] {
        let mut files = chain;
        files[2].1 = back;
        assert_eq!(circles(&files), [["a::b", "a::c"]], "{back}");
    }
    for no_import in [
        "// use super::B;",
        "#[cfg(test)]\nmod tests {\n    use super::super::B;\n}",
        "mod inner {\n    use super::*;\n}",
    ] {
        let mut files = chain;
        files[2].1 = no_import;
        assert!(circles(&files).is_empty(), "{no_import}");
    }
    // A parent that uses a child's item itself, and a child that uses the parent's.
    let parent = [("a", "mod b;\nuse b::B;\npub struct A(B);"), ("a::b", "use super::A;")];
    assert_eq!(circles(&parent), [["a", "a::b"]]);
    assert_eq!(unfold("a::{b, c::{d, e as f}}"), ["a::b", "a::c::d", "a::c::e"]);
}
