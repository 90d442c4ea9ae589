//! Prefixes that tools put before all names of a network: data parallel training, compilation, a module that held it.

/// Each is taken off where every tensor of a file has it, one after the other; none begins a name that a network here has itself.
const WRAPPERS: [&str; 13] = [
    "module.",
    "_orig_mod.",
    "model.",
    "diffusion_model.",
    "unet.",
    "vae.",
    "first_stage_model.",
    "text_encoder.",
    "text_encoder_2.",
    "clip.",
    "state_dict.",
    "net.",
    "network.",
];

/// How much of every key is a wrapper's: the length of the prefix that all of them share, up to where a name begins with one of
/// `known`. Names without a dot are no network's (marks, training state) and do not count.
pub(super) fn prefix<'a>(keys: impl Iterator<Item = &'a str> + Clone, known: &[&str]) -> usize {
    let mut length = 0;
    let keys = keys.filter(|key| key.contains('.'));
    loop {
        let is_known = |key: &str| known.iter().any(|known| key[length..].starts_with(known));
        if keys.clone().any(is_known) {
            return length;
        }
        // Of a shorter key nothing is left to name.
        let all = |wrapper: &&&str| {
            let mut rest = keys.clone().map(|key| &key[length..]).peekable();
            rest.peek().is_some() && rest.all(|key| key.len() > wrapper.len() && key.starts_with(**wrapper))
        };
        match WRAPPERS.iter().find(all) {
            Some(wrapper) => length += wrapper.len(),
            None => return length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_come_off_where_all_names_have_them() {
        const UNET: &[&str] = &["model.diffusion_model."];
        for (keys, expected) in [
            (&["module.conv_in.bias", "module.conv_out.bias"][..], "module."),
            (&["module._orig_mod.conv_in.bias"], "module._orig_mod."),
            (&["module.model.diffusion_model.out.0.bias", "ztsnr"], "module."),
            (&["diffusion_model.out.0.bias", "ztsnr"], "diffusion_model."),
            (&["module.conv_in.bias", "conv_out.bias"], ""),
            (&["model.diffusion_model.out.0.bias", "first_stage_model.a.b"], ""),
            (&["module.model.diffusion_model.out.0.bias", "module.first_stage_model.a.b"], "module."),
            (&["text_model.final_layer_norm.bias"], ""),
            (&["v_pred"], ""),
            (&["module."], ""),
            (&[], ""),
        ] {
            assert_eq!(prefix(keys.iter().copied(), UNET), expected.len(), "{keys:?}");
        }
        assert_eq!(prefix(["model.diffusion_model.out.0.bias"].into_iter(), &[]), "model.diffusion_model.".len());
    }
}
