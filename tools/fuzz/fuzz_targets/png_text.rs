//! PNG text chunks: any bytes give texts or an error.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(texts) = rarebit::data::metadata::read_text("fuzz.png", std::io::Cursor::new(bytes)) {
        rarebit::data::metadata::record(&texts);
    }
});
