//! Textual inversions: any file gives embeddings, all of them finite and of one number of rows, or an error.
#![no_main]

mod file;

use rarebit::data::textual_inversion;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = textual_inversion::read(&file::holding(bytes));
});
