//! Names of CompVis / SGM UNets in terms of diffusers, whatever the number of levels and layers.

use std::collections::BTreeSet;

/// Where the levels of a CompVis UNet begin and end.
///
/// CompVis numbers input and output blocks through; a downsampler closes a level on the way down and an upsampler on
/// the way up, so their places say which level a block belongs to.
pub(super) struct Levels {
    downsamplers: BTreeSet<usize>,
    upsamplers: BTreeSet<usize>,
}

impl Levels {
    /// From all keys of the UNet, without the checkpoint's prefix.
    pub(super) fn find<'a>(keys: impl Iterator<Item = &'a str>) -> Levels {
        let mut levels = Levels { downsamplers: BTreeSet::new(), upsamplers: BTreeSet::new() };
        for key in keys {
            match block(key) {
                Some(("input_blocks", i, "0", rest)) if rest.starts_with("op.") => {
                    levels.downsamplers.insert(i);
                }
                Some(("output_blocks", i, _, rest)) if rest.starts_with("conv.") => {
                    levels.upsamplers.insert(i);
                }
                _ => {}
            }
        }
        levels
    }

    /// The diffusers name of a key; `None` for one that no such UNet has.
    pub(super) fn name(&self, key: &str) -> Option<String> {
        if let Some(name) = outer(key) {
            return Some(name);
        }
        match block(key)? {
            ("input_blocks", i, part, rest) => {
                // Block 0 is conv_in; the first level begins after it as if a downsampler stood there.
                let (level, layer) = place(&self.downsamplers, i.checked_sub(1)?, 1);
                match (part, rest.strip_prefix("op.")) {
                    ("0", Some(rest)) => Some(format!("down_blocks.{level}.downsamplers.0.conv.{rest}")),
                    ("0", None) => Some(format!("down_blocks.{level}.resnets.{layer}.{}", resnet(rest)?)),
                    ("1", None) => Some(format!("down_blocks.{level}.attentions.{layer}.{rest}")),
                    _ => None,
                }
            }
            ("output_blocks", i, part, rest) => {
                let (level, layer) = place(&self.upsamplers, i, 0);
                match (part, rest.strip_prefix("conv.")) {
                    ("1" | "2", Some(rest)) => Some(format!("up_blocks.{level}.upsamplers.0.conv.{rest}")),
                    ("0", None) => Some(format!("up_blocks.{level}.resnets.{layer}.{}", resnet(rest)?)),
                    ("1", None) => Some(format!("up_blocks.{level}.attentions.{layer}.{rest}")),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// Level and layer of a block: the closing blocks before it, and its distance from the last of them.
/// `shift` is what the numbering of the closing blocks is ahead of `i`.
fn place(closing: &BTreeSet<usize>, i: usize, shift: usize) -> (usize, usize) {
    let before = closing.range(..i + shift);
    let first = before.clone().next_back().map_or(0, |last| last + 1 - shift);
    (before.count(), i - first)
}

/// The names outside the numbered blocks.
fn outer(key: &str) -> Option<String> {
    const NAMES: [(&str, &str); 9] = [
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("label_emb.0.0.", "add_embedding.linear_1."),
        ("label_emb.0.2.", "add_embedding.linear_2."),
        ("input_blocks.0.0.", "conv_in."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
        ("middle_block.1.", "mid_block.attentions.0."),
        ("time_embed.cond_proj.", "time_embedding.cond_proj."),
    ];
    for (middle, layer) in [("middle_block.0.", 0), ("middle_block.2.", 1)] {
        if let Some(rest) = key.strip_prefix(middle) {
            return Some(format!("mid_block.resnets.{layer}.{}", resnet(rest)?));
        }
    }
    NAMES.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", key.strip_prefix(theirs)?)))
}

/// `input_blocks.4.1.norm.weight` as (`input_blocks`, 4, `1`, `norm.weight`).
fn block(key: &str) -> Option<(&str, usize, &str, &str)> {
    let (group, rest) = key.split_once('.')?;
    let (number, rest) = rest.split_once('.')?;
    let (part, rest) = rest.split_once('.')?;
    // A number this large is not a block and would only invite overflow.
    Some((group, number.parse().ok().filter(|n| *n < 10_000)?, part, rest))
}

/// Parts of a residual block.
fn resnet(rest: &str) -> Option<String> {
    const NAMES: [(&str, &str); 6] = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    NAMES.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", rest.strip_prefix(theirs)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three levels of two layers, attention on the last two (as SDXL).
    fn sdxl() -> Levels {
        Levels::find(
            [
                "input_blocks.3.0.op.weight",
                "input_blocks.6.0.op.weight",
                "output_blocks.2.2.conv.weight",
                "output_blocks.5.2.conv.weight",
            ]
            .into_iter(),
        )
    }

    #[test]
    fn blocks_find_their_level_and_layer() {
        let levels = sdxl();
        let check = |theirs: &str, ours: &str| assert_eq!(levels.name(theirs).as_deref(), Some(ours), "{theirs}");
        check("input_blocks.0.0.weight", "conv_in.weight");
        check("input_blocks.1.0.in_layers.0.weight", "down_blocks.0.resnets.0.norm1.weight");
        check("input_blocks.2.0.out_layers.3.bias", "down_blocks.0.resnets.1.conv2.bias");
        check("input_blocks.3.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias");
        check("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight");
        check("input_blocks.5.1.proj_in.weight", "down_blocks.1.attentions.1.proj_in.weight");
        check("input_blocks.8.1.norm.bias", "down_blocks.2.attentions.1.norm.bias");
        check(
            "middle_block.1.transformer_blocks.9.norm3.bias",
            "mid_block.attentions.0.transformer_blocks.9.norm3.bias",
        );
        check("middle_block.2.emb_layers.1.bias", "mid_block.resnets.1.time_emb_proj.bias");
        check("output_blocks.0.0.in_layers.2.weight", "up_blocks.0.resnets.0.conv1.weight");
        check("output_blocks.2.2.conv.bias", "up_blocks.0.upsamplers.0.conv.bias");
        check("output_blocks.3.1.proj_out.bias", "up_blocks.1.attentions.0.proj_out.bias");
        check("output_blocks.8.0.out_layers.0.bias", "up_blocks.2.resnets.2.norm2.bias");
        check("label_emb.0.2.weight", "add_embedding.linear_2.weight");
        check("out.2.bias", "conv_out.bias");
    }

    #[test]
    fn upsampler_of_a_level_without_attention() {
        let levels = Levels::find(["output_blocks.2.1.conv.weight"].into_iter());
        assert_eq!(
            levels.name("output_blocks.2.1.conv.weight").as_deref(),
            Some("up_blocks.0.upsamplers.0.conv.weight")
        );
        assert_eq!(levels.name("output_blocks.3.1.norm.bias").as_deref(), Some("up_blocks.1.attentions.0.norm.bias"));
    }

    /// Every block of a UNet under both names; `attention` says which levels have transformers.
    fn pairs(layers: usize, attention: &[bool]) -> Vec<(String, String)> {
        const RESNET: [(&str, &str); 2] = [("in_layers.0.weight", "norm1.weight"), ("out_layers.3.bias", "conv2.bias")];
        let mut pairs = Vec::new();
        let mut block = |theirs: String, ours: String, attends: bool, layer: usize| {
            for (t, o) in RESNET {
                pairs.push((format!("{theirs}.0.{t}"), format!("{ours}.resnets.{layer}.{o}")));
            }
            if attends {
                pairs.push((format!("{theirs}.1.norm.bias"), format!("{ours}.attentions.{layer}.norm.bias")));
            }
        };
        let mut samplers = Vec::new();
        let (mut input, mut output, levels) = (1, 0, attention.len());
        for level in 0..levels {
            for layer in 0..layers {
                block(format!("input_blocks.{input}"), format!("down_blocks.{level}"), attention[level], layer);
                input += 1;
            }
            let up = attention[levels - 1 - level];
            for layer in 0..=layers {
                block(format!("output_blocks.{output}"), format!("up_blocks.{level}"), up, layer);
                output += 1;
            }
            if level + 1 < levels {
                samplers.push((
                    format!("input_blocks.{input}.0.op.bias"),
                    format!("down_blocks.{level}.downsamplers.0.conv.bias"),
                ));
                let theirs = format!("output_blocks.{}.{}.conv.bias", output - 1, 1 + usize::from(up));
                samplers.push((theirs, format!("up_blocks.{level}.upsamplers.0.conv.bias")));
                input += 1;
            }
        }
        pairs.extend(samplers);
        pairs
    }

    #[test]
    fn any_number_of_levels_and_layers() {
        for (layers, attention) in [
            (2, &[true, true, true, false][..]),
            (2, &[false, true, true]),
            (1, &[true]),
            (3, &[true, false]),
            (1, &[false, false, false, false, true]),
        ] {
            let pairs = pairs(layers, attention);
            let levels = Levels::find(pairs.iter().map(|(theirs, _)| theirs.as_str()));
            for (theirs, ours) in &pairs {
                assert_eq!(levels.name(theirs).as_ref(), Some(ours), "{theirs} of {layers} layers, {attention:?}");
            }
        }
    }

    #[test]
    fn strange_keys_have_no_name() {
        for key in
            ["input_blocks.1.0.x.weight", "input_blocks.99999999999999999999.0.op.w", "output_blocks.1.9.a", "loss.x"]
        {
            assert_eq!(sdxl().name(key), None, "{key}");
        }
    }
}
