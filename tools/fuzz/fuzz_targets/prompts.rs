//! Prompt lists: any file gives prompts without line breaks or outer blanks, or an error.
#![no_main]

mod file;

use rarebit::data::prompts;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(prompts) = prompts::read(&file::holding(bytes)) {
        assert!(!prompts.is_empty());
        assert!(prompts.iter().all(|(_, prompt)| !prompt.is_empty() && prompt.trim() == prompt && !prompt.contains('\n')));
    }
});
