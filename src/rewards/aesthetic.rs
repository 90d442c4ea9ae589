//! Aesthetic score: what a head makes of an image's CLIP features (the LAION predictor, and heads like it).

use super::{Reward, clip, total};
use crate::models::config::{ClipConfig, HeadConfig};
use crate::models::{detect, heads};
use crate::program::{Builder, ValueId};
use crate::weights::{Component, Model};
use crate::{Error, Result};

/// A model's aesthetic head over one of its CLIPs; LAION's gives about 1 to 10.
pub struct Aesthetic {
    component: Component,
    clip: ClipConfig,
    head: HeadConfig,
}

impl Aesthetic {
    /// `component` is the CLIP whose features the head was trained on: [`Component::Clip`] or [`Component::HeldOutClip`].
    pub fn new(model: &Model, component: Component) -> Result<Aesthetic> {
        let clip = detect::clip_config(model, component)?;
        let head = detect::head_config(model)?;
        let (takes, given) = (head.input, clip.image.projection);
        let outputs = head.layers.last().map_or(0, |layer| layer.width);
        if takes != given || outputs != 1 {
            let what = format!("makes {outputs} numbers of {takes} features; a score is 1 of the {given} of the CLIP");
            return Err(Error::file(model.source(Component::Aesthetic), what));
        }
        Ok(Aesthetic { component, clip, head })
    }
}

impl Reward for Aesthetic {
    fn name(&self) -> &str {
        Component::Aesthetic.name()
    }

    fn append(&self, b: &mut Builder, image: ValueId) -> ValueId {
        let unit = clip::image_features(b, &self.clip.image, self.component, &self.clip.preprocess, image);
        let score = heads::aesthetic(b, &self.head, unit);
        total(b, score)
    }
}
