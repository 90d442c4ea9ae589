//! What is asked of a run, and what comes of it.

/// One image to make.
#[derive(Clone, Debug)]
pub struct Job {
    pub prompt: String,
    /// `None`: no negative prompt was given (SDXL base then uses a zero context).
    pub negative: Option<String>,
    pub seed: u64,
    /// Unit-variance draws `[C, H/f, W/f]` in place of the generator's first ones: the starting noise, then one per noisy step.
    pub draws: Vec<Vec<f32>>,
}

/// A finished image.
#[derive(Clone, Debug)]
pub struct Image {
    pub width: usize,
    pub height: usize,
    /// `[H, W, 3]`.
    pub rgb: Vec<u8>,
    /// The latents it was decoded from, `[C, H/f, W/f]`, scaled as the UNet sees them.
    pub latents: Vec<f32>,
}
