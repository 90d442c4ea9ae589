//! Names of CompVis autoencoders in terms of diffusers, and the old diffusers names of their attention.

/// Old diffusers and CompVis names of the parts of an attention, and today's.
const ATTENTION: [(&str, &str); 9] = [
    ("query.", "to_q."),
    ("key.", "to_k."),
    ("value.", "to_v."),
    ("proj_attn.", "to_out.0."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
    ("norm.", "group_norm."),
];

/// The present-day name of a diffusers key.
pub(super) fn from_diffusers(key: &str) -> String {
    match key.split_once(".attentions.0.") {
        Some((block, part)) => format!("{block}.attentions.0.{}", attention(part)),
        None => key.to_string(),
    }
}

/// The diffusers name of a CompVis key without the checkpoint's prefix; `levels` is what [`levels`] counts.
///
/// CompVis numbers the decoder's levels from full resolution down, diffusers in the order they run.
pub(super) fn from_compvis(key: &str, levels: usize) -> Option<String> {
    if key.starts_with("quant_conv.") || key.starts_with("post_quant_conv.") {
        return Some(key.to_string());
    }
    let (half, rest) = key.split_once('.').filter(|(half, _)| matches!(*half, "encoder" | "decoder"))?;
    if let Some(rest) = rest.strip_prefix("mid.") {
        let (part, rest) = rest.split_once('.')?;
        return match part {
            "block_1" => Some(format!("{half}.mid_block.resnets.0.{}", resnet(rest))),
            "block_2" => Some(format!("{half}.mid_block.resnets.1.{}", resnet(rest))),
            "attn_1" => Some(format!("{half}.mid_block.attentions.0.{}", attention(rest))),
            _ => None,
        };
    }
    if let Some((level, rest)) = level_key(rest, "down.") {
        return Some(match rest.strip_prefix("downsample.") {
            Some(rest) => format!("{half}.down_blocks.{level}.downsamplers.0.{rest}"),
            None => format!("{half}.down_blocks.{level}.resnets.{}", resnet(rest.strip_prefix("block.")?)),
        });
    }
    if let Some((level, rest)) = level_key(rest, "up.") {
        let level = levels.checked_sub(1 + level)?;
        return Some(match rest.strip_prefix("upsample.") {
            Some(rest) => format!("{half}.up_blocks.{level}.upsamplers.0.{rest}"),
            None => format!("{half}.up_blocks.{level}.resnets.{}", resnet(rest.strip_prefix("block.")?)),
        });
    }
    match rest.strip_prefix("norm_out.") {
        Some(rest) => Some(format!("{half}.conv_norm_out.{rest}")),
        None => (rest.starts_with("conv_in.") || rest.starts_with("conv_out.")).then(|| key.to_string()),
    }
}

/// The decoder's levels.
pub(super) fn levels<'a>(keys: impl Iterator<Item = &'a str>) -> usize {
    let level = |key: &'a str| Some(level_key(key.strip_prefix("decoder.")?, "up.")?.0);
    keys.filter_map(level).max().map_or(0, |last| last + 1)
}

/// Whether a 1x1 convolution `[C, C, 1, 1]` is a linear layer in diffusers.
pub(super) fn is_linear(name: &str) -> bool {
    name.contains(".attentions.") && name.ends_with(".weight")
}

fn level_key<'a>(key: &'a str, group: &str) -> Option<(usize, &'a str)> {
    let (level, rest) = key.strip_prefix(group)?.split_once('.')?;
    Some((level.parse().ok().filter(|n| *n < 10_000)?, rest))
}

fn attention(part: &str) -> String {
    let renamed = ATTENTION.iter().find_map(|(old, new)| Some(format!("{new}{}", part.strip_prefix(old)?)));
    renamed.unwrap_or_else(|| part.to_string())
}

fn resnet(rest: &str) -> String {
    rest.replace("nin_shortcut.", "conv_shortcut.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compvis_names() {
        let check = |theirs: &str, ours: &str| assert_eq!(from_compvis(theirs, 4).as_deref(), Some(ours), "{theirs}");
        check("encoder.down.1.block.0.nin_shortcut.weight", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight");
        check("encoder.down.2.downsample.conv.bias", "encoder.down_blocks.2.downsamplers.0.conv.bias");
        check("encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.to_q.weight");
        check("decoder.mid.attn_1.norm.bias", "decoder.mid_block.attentions.0.group_norm.bias");
        check("decoder.mid.attn_1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias");
        check("decoder.mid.block_2.conv1.bias", "decoder.mid_block.resnets.1.conv1.bias");
        check("decoder.up.3.block.2.norm1.weight", "decoder.up_blocks.0.resnets.2.norm1.weight");
        check("decoder.up.1.upsample.conv.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight");
        check("decoder.norm_out.weight", "decoder.conv_norm_out.weight");
        check("decoder.conv_out.weight", "decoder.conv_out.weight");
        check("post_quant_conv.bias", "post_quant_conv.bias");
        assert_eq!(from_compvis("decoder.up.4.block.0.norm1.weight", 4), None);
        assert_eq!(from_compvis("loss.logvar", 4), None);
    }

    #[test]
    fn old_attention_names() {
        let key = "decoder.mid_block.attentions.0.proj_attn.weight";
        assert_eq!(from_diffusers(key), "decoder.mid_block.attentions.0.to_out.0.weight");
        for key in [
            "encoder.mid_block.attentions.0.to_q.bias",
            "encoder.mid_block.attentions.0.group_norm.bias",
            "quant_conv.bias",
        ] {
            assert_eq!(from_diffusers(key), key);
        }
    }
}
