//! Pictures: any file gives pixels of the size that was asked for, or an error.
#![no_main]

mod file;

use rarebit::data::images;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Large sides are a matter of time, not of what is read.
    if let Ok(picture) = images::read_square(&file::holding(bytes), 16) {
        assert_eq!(picture.rgb.len(), 16 * 16 * 3);
    }
});
