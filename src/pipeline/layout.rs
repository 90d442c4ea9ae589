//! The two orders of an image's numbers: channels first, as files and torch have them, and last, as programs do.

/// `[C, H, W]` → `[H, W, C]`.
pub fn to_channels_last(x: &[f32], channels: usize) -> Vec<f32> {
    transpose(x, channels)
}

/// `[H, W, C]` → `[C, H, W]`.
pub fn to_channels_first(x: &[f32], channels: usize) -> Vec<f32> {
    transpose(x, x.len() / channels)
}

/// `[rows, columns]` → `[columns, rows]`.
fn transpose(x: &[f32], rows: usize) -> Vec<f32> {
    let columns = x.len() / rows;
    (0..x.len()).map(|i| x[(i % rows) * columns + i / rows]).collect()
}
