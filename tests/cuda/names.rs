//! Kernel names can be searched for: each is spelt out in the file that makes it, and its stem in the code that launches it.

use crate::common::emulated::build;
use rarebit::exec::cuda::{Emulated, Settings};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What is in the files of a folder of the repository with this extension.
fn texts(folder: &str, extension: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect()
}

/// Names in kernels/*.cu: of kernels that are written out, `KERNEL(name, …)`, and those listed above the macros that make them,
/// `// Kernels: name name`.
fn spelt() -> Vec<String> {
    let mut names = vec![];
    for text in texts("kernels", "cu") {
        for line in text.lines().map(str::trim_start) {
            let definition = line.strip_prefix("KERNEL(").or_else(|| line.strip_prefix("KERNEL_RESIDENT("));
            if let Some(listed) = line.strip_prefix("// Kernels: ") {
                names.extend(listed.split_whitespace().map(str::to_string));
            } else if let Some((name, _)) = definition.and_then(|rest| rest.split_once(','))
                && !name.contains('#')
            {
                names.push(name.to_string());
            }
        }
    }
    names
}

/// A name without the sizes and types at its end.
fn stem(name: &str) -> &str {
    let varies = |part: &str| matches!(part, "f16" | "bf16" | "f32") || part.bytes().all(|b| b.is_ascii_digit());
    match name.rsplit_once('_') {
        Some((rest, part)) if varies(part) => stem(rest),
        _ => name,
    }
}

/// String literals of the launch code.
fn literals() -> Vec<String> {
    let quoted = |text: String| text.split('"').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>();
    let code = texts("src/exec/cuda", "rs").into_iter();
    code.flat_map(|text| {
        text.lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .map(str::to_string)
            .flat_map(quoted)
            .collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn every_kernel_is_spelt_once_and_nothing_else_is() {
    let emulated = Emulated::open(&build(), Settings::default()).unwrap();
    let made: BTreeSet<&str> = emulated.kernels().collect();
    let spelt = spelt();
    let names: BTreeSet<&str> = spelt.iter().map(String::as_str).collect();
    assert_eq!(names, made);
    assert_eq!(spelt.len(), names.len(), "a name is spelt twice");
}

/// So no name is put together from parts that occur in no file of kernels/.
#[test]
fn launches_spell_stems_that_kernels_have() {
    let spelt = spelt();
    let (tests, kernels): (Vec<&str>, Vec<&str>) =
        spelt.iter().map(|name| stem(name)).partition(|name| name.starts_with("conformance"));
    assert!(!tests.is_empty());
    let stems: BTreeSet<&str> = kernels.into_iter().collect();
    let literals = literals();
    for stem in &stems {
        let is_it = |literal: &String| {
            literal == stem || literal.strip_prefix(stem).is_some_and(|rest| rest.starts_with("_{") || rest == "_f32")
        };
        assert!(literals.iter().any(is_it), "nothing in src/exec/cuda says '{stem}'");
    }
    // A format whose first part is written out begins with a whole stem.
    let is_name = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let begun = literals.iter().filter_map(|literal| literal.split_once("_{")).filter(|(part, _)| is_name(part));
    let mut count = 0;
    for (part, _) in begun {
        assert!(stems.contains(part), "src/exec/cuda makes names of '{part}_', which is no kernel's stem");
        count += 1;
    }
    assert!(count > 10, "{count} formats");
}
