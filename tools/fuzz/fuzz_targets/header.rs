//! The safetensors header: any bytes give a header whose ranges fit the file, or an error.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = rarebit::weights::parse_header(bytes) {
        for info in header.tensors.values() {
            let (start, end) = info.data_offsets;
            assert!(start <= end && end <= bytes.len());
        }
    }
});
