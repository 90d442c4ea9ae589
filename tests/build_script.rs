//! What build.rs makes of ptxas' words and of kernels/constants.cuh: what must not be built is an error, whether it was compiled now or
//! lay in the cache.

#[allow(dead_code)]
#[path = "../build.rs"]
mod build;

use build::{constants, judge, report};

/// Of a file of two kernels, one after the other.
fn log(loss: &str, spilled: u32, stack: u32) -> String {
    format!(
        "ptxas info    : 0 bytes gmem\n{loss}ptxas info    : Compiling entry function 'first' for 'sm_90a'\n\
         ptxas info    : Function properties for first\n    {stack} bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads\n\
         ptxas info    : Used 114 registers, used 1 barriers, 1024 bytes smem\n\
         ptxas info    : Compiling entry function 'second' for 'sm_90a'\n\
         ptxas info    : Function properties for second\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
         ptxas info    : Used 90 registers, used 1 barriers\n"
    )
}

const LOSS: &str = "ptxas info    : (C7520) Potential Performance Loss: wgmma.mma_async instructions are serialized due to program \
                    dependence on compiler-inserted WG.AR in divergent path in the function 'NAME'\n";

fn reported(log: &str) -> Result<String, Vec<String>> {
    report("a.cu", &log.lines().collect::<Vec<_>>())
}

#[test]
fn the_report_has_a_line_for_each_kernel() {
    let found = reported(&log("", 0, 0)).unwrap();
    assert_eq!(found, "first\t90a\t114\t0\t0\t1024\t0\t0\nsecond\t90a\t90\t0\t0\t0\t0\t0\n");
    assert!(judge("a.cu", "", &found).is_empty());
}

#[test]
fn serialised_products_are_an_error() {
    let found = reported(&log(&LOSS.replace("NAME", "second"), 0, 0)).unwrap();
    assert_eq!(found, "first\t90a\t114\t0\t0\t1024\t0\t0\nsecond\t90a\t90\t0\t0\t0\t0\t1\n");
    let errors = judge("a.cu", "", &found);
    assert!(
        errors.len() == 1 && errors[0].starts_with("a.cu: second has its wgmma serialised on sm_90a"),
        "{errors:?}"
    );
    // Of a function that is no kernel.
    let errors = reported(&log(&LOSS.replace("NAME", "_Z6helperv"), 0, 0)).unwrap_err();
    assert!(errors.len() == 1 && errors[0].contains("_Z6helperv"), "{errors:?}");
}

#[test]
fn spills_and_local_memory_are_errors() {
    let errors = judge("a.cu", "", &reported(&log("", 8, 8)).unwrap());
    assert!(errors.len() == 1 && errors[0].contains("first spills registers"), "{errors:?}");
    let local = reported(&log("", 0, 8)).unwrap();
    assert!(judge("a.cu", "", &local)[0].contains("first keeps 8 bytes in local memory"));
    assert!(judge("a.cu", "// local memory: first (why)\n", &local).is_empty());
    assert_eq!(judge("a.cu", "// local memory: second\n", &local).len(), 1);
}

#[test]
fn a_report_in_another_form_is_an_error() {
    assert!(judge("a.cu", "", &reported("nothing of use").unwrap())[0].contains("no kernel"));
    assert!(judge("a.cu", "", "first\t90a\t114\t0\t0\t1024\t0\n")[0].contains("another form"));
}

#[test]
fn constants_are_numbers_and_tables() {
    let text = "// Of both.\n#pragma once\nconstexpr int A = 1, B = 22;  // two\nconstexpr int TABLE[][2] = {\n    {1, 2},\n    {3, 4},\n};\n";
    let found = constants(text).unwrap();
    let found: Vec<String> = found.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let table = "pub const TABLE: [[usize; 2]; 2] = [ [1, 2], [3, 4], ];";
    assert_eq!(found, ["pub const A: usize = 1;", "pub const B: usize = 22;", table]);
    for wrong in [
        "constexpr float A = 1;",
        "constexpr int A = B;",
        "constexpr int A = 1 + 2;",
        "int a;",
        "constexpr int A[2] = {1, 2};",
    ] {
        assert!(constants(wrong).is_err(), "{wrong}");
    }
}
