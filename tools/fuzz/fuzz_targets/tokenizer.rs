//! Tokenizer files: any bytes give a tokenizer that encodes, or an error.
#![no_main]

use rarebit::text::Tokenizer;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // The files of a tokenizer folder, separated by a zero byte.
    let mut files = bytes.split(|&b| b == 0);
    let (first, second) = (files.next().unwrap_or(&[]), files.next());
    let (config, map) = (files.next(), files.next());
    let tokenizer = match second {
        Some(merges) => Tokenizer::from_bytes(first, merges, config, map),
        None => Tokenizer::from_tokenizer_json(first, config, map),
    };
    let tokenizer = tokenizer.and_then(|tokenizer| tokenizer.with_added_tokens(files.next(), config, None, 1 << 16));
    if let Ok(tokenizer) = tokenizer {
        let tokenizer = tokenizer.with_max_length(77);
        if let Ok(encoded) = tokenizer.encode("A red star, 2 stars!") {
            assert_eq!(encoded.ids.len(), tokenizer.max_length());
        }
    }
});
