//! diffusers and transformers JSON configurations → ours, with the defaults of the class named; what we do not build
//! is refused.

pub mod auxiliary;

use super::config::*;
use crate::program::Activation;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Larger numbers are no sizes of a network; refusing them keeps every later product far from overflow.
const LARGEST: u64 = 10_000_000;

/// More levels than any network has (every level halves the image), and more residual blocks than a level of one has.
pub(super) const MOST_LEVELS: usize = 12;
const MOST_LAYERS: usize = 1000;

/// One configuration file; accessors give the default where a field is absent or null and name file and field
/// otherwise.
pub struct Fields<'a> {
    file: PathBuf,
    /// The field of the file that holds them; empty for the file's own.
    inside: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// `file` names the configuration in messages. Errors when `json` is not an object.
    pub fn new(file: PathBuf, json: &'a Value) -> Result<Fields<'a>> {
        match json.as_object() {
            Some(map) => Ok(Fields { file, inside: "", map }),
            None => Err(Error::file(file, "is not a JSON object")),
        }
    }

    pub(super) fn error(&self, what: String) -> Error {
        let inside = if self.inside.is_empty() { String::new() } else { format!("{}: ", self.inside) };
        Error::file(&self.file, format!("{inside}{what}"))
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    fn wrong(&self, field: &str, needed: &str) -> Error {
        let got = self.map.get(field).unwrap_or(&Value::Null);
        self.error(format!("{field} is {got}, needed {needed}"))
    }

    /// A whole number of at least `least`.
    fn count(&self, field: &str, default: usize, least: u64) -> Result<usize> {
        match self.get(field) {
            None => Ok(default),
            Some(v) => self.as_count(field, v, least),
        }
    }

    fn as_count(&self, field: &str, v: &Value, least: u64) -> Result<usize> {
        match v.as_u64().or_else(|| v.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64)) {
            Some(n) if (least..=LARGEST).contains(&n) => Ok(n as usize),
            _ => Err(self.wrong(field, &format!("whole numbers from {least} to {LARGEST}"))),
        }
    }

    fn number(&self, field: &str, default: f64) -> Result<f64> {
        self.get(field).map_or(Ok(default), |v| v.as_f64().ok_or_else(|| self.wrong(field, "a number")))
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool> {
        self.get(field).map_or(Ok(default), |v| v.as_bool().ok_or_else(|| self.wrong(field, "true or false")))
    }

    pub(super) fn text(&self, field: &str, default: &'a str) -> Result<&'a str> {
        self.get(field).map_or(Ok(default), |v| v.as_str().ok_or_else(|| self.wrong(field, "a string")))
    }

    /// A list of sizes.
    fn sizes(&self, field: &str, default: &[usize]) -> Result<Vec<usize>> {
        match self.get(field) {
            None => Ok(default.to_vec()),
            Some(Value::Array(list)) if !list.is_empty() => list.iter().map(|v| self.as_count(field, v, 1)).collect(),
            Some(_) => Err(self.wrong(field, "a list of sizes")),
        }
    }

    /// One size for every level, or a list with one per level.
    fn per_level(&self, field: &str, default: usize, levels: usize) -> Result<Vec<usize>> {
        match self.get(field) {
            Some(Value::Array(_)) => {
                let list = self.sizes(field, &[])?;
                if list.len() == levels { Ok(list) } else { Err(self.wrong(field, &format!("{levels} sizes"))) }
            }
            _ => Ok(vec![self.count(field, default, 1)?; levels]),
        }
    }

    /// Numbers of transformer blocks: one for all levels, or a list with one or with a list of one per attention for each level. Gives a
    /// list for each level, of one number where all its attentions share it.
    fn depths(&self, field: &str, levels: usize) -> Result<Depths> {
        let level = |v: &Value| match v {
            Value::Array(list) if !list.is_empty() => list.iter().map(|v| self.as_count(field, v, 0)).collect(),
            v => Ok(vec![self.as_count(field, v, 0)?]),
        };
        match self.get(field) {
            None => Ok(vec![vec![1]; levels]),
            Some(Value::Array(list)) if list.len() == levels => list.iter().map(level).collect(),
            Some(Value::Array(_)) => Err(self.wrong(field, &format!("{levels} sizes or lists of sizes"))),
            Some(v) => Ok(vec![level(v)?; levels]),
        }
    }

    /// One size, or a list of equal ones (our builders have no other).
    fn uniform(&self, field: &str, default: usize, levels: usize) -> Result<usize> {
        let list = self.per_level(field, default, levels)?;
        match list.iter().all(|n| *n == list[0]) {
            true => Ok(list[0]),
            false => Err(self.wrong(field, "the same size at every level; others are not supported")),
        }
    }

    /// Block types, one per level.
    fn blocks(&self, field: &str, default: &[&'a str]) -> Result<Vec<&'a str>> {
        if self.get(field).is_some() { self.names(field) } else { Ok(default.to_vec()) }
    }

    /// A list of names that must be there.
    fn names(&self, field: &str) -> Result<Vec<&'a str>> {
        let list = self.get(field).and_then(Value::as_array).filter(|list| !list.is_empty());
        let names = list.and_then(|list| list.iter().map(Value::as_str).collect());
        names.ok_or_else(|| self.wrong(field, "a list of names"))
    }

    /// Refuses any value but `value` (absent and null are fine; a list must hold nothing else).
    fn only(&self, field: &str, value: Value) -> Result<()> {
        let same = |v: &Value| match (v.as_f64(), value.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => *v == value,
        };
        match self.get(field) {
            None => Ok(()),
            Some(Value::Array(list)) if list.iter().all(same) => Ok(()),
            Some(v) if same(v) => Ok(()),
            Some(_) => Err(self.wrong(field, &format!("{value}; others are not supported"))),
        }
    }

    /// Refuses a field that is present.
    fn absent(&self, fields: &[&str]) -> Result<()> {
        fields
            .iter()
            .try_for_each(|f| if self.get(f).is_some() { Err(self.wrong(f, "null; not supported")) } else { Ok(()) })
    }

    /// Refuses an explicit null where it means "leave this layer out".
    fn not_null(&self, fields: &[&str]) -> Result<()> {
        let null = |f: &&&str| self.map.get(**f).is_some_and(Value::is_null);
        fields.iter().find(null).map_or(Ok(()), |f| Err(self.wrong(f, "a value; null is not supported")))
    }
}

/// `UNet2DConditionModel`; `sample_size` is 0 where the file gives none.
pub fn unet(f: &Fields) -> Result<UnetConfig> {
    f.only("_class_name", json!("UNet2DConditionModel"))?;
    unsupported_unet(f)?;
    const DOWN: [&str; 4] = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"];
    const UP: [&str; 4] = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"];
    let channels = f.sizes("block_out_channels", &[320, 640, 1280, 1280])?;
    let levels = channels.len();
    let layers = f.per_level("layers_per_block", 2, levels)?;
    if levels > MOST_LEVELS || layers.iter().any(|n| *n > MOST_LAYERS) {
        let what =
            format!("block_out_channels or layers_per_block: more than {MOST_LEVELS} levels or {MOST_LAYERS} layers");
        return Err(f.error(what));
    }
    let down = attention(f, "down_block_types", &DOWN, ["DownBlock2D", "CrossAttnDownBlock2D"], levels)?;
    let mut up = attention(f, "up_block_types", &UP, ["UpBlock2D", "CrossAttnUpBlock2D"], levels)?;
    up.reverse();
    let (down_transformers, up_transformers) = transformers(f, &layers, &down, &up)?;
    let middle = middle(f, levels)?;
    // diffusers calls the number of heads `attention_head_dim`; renaming it would break every published configuration.
    let heads_field = if f.get("num_attention_heads").is_some() { "num_attention_heads" } else { "attention_head_dim" };
    let heads = f.per_level(heads_field, 8, levels)?;
    let norm_groups = f.count("norm_num_groups", 32, 1)?;
    for (c, h) in channels.iter().zip(&heads) {
        if c % h != 0 || c % norm_groups != 0 {
            return Err(f.error(format!("{c} channels do not divide by {h} heads or {norm_groups} norm groups")));
        }
    }
    let added = match f.text("addition_embed_type", "")? {
        "" => None,
        _ => Some(AddedConfig {
            time_dim: f.count("addition_time_embed_dim", 256, 2)?,
            input_width: f.count("projection_class_embeddings_input_dim", 2816, 1)?,
        }),
    };
    Ok(UnetConfig {
        in_channels: f.count("in_channels", 4, 1)?,
        out_channels: f.count("out_channels", 4, 1)?,
        down_transformers,
        up_transformers,
        middle,
        heads,
        context_width: f.uniform("cross_attention_dim", 1280, levels)?,
        norm_groups,
        norm_eps: f.number("norm_eps", 1e-5)?,
        linear_projection: f.flag("use_linear_projection", false)?,
        flip_sin_to_cos: f.flag("flip_sin_to_cos", true)?,
        freq_shift: f.number("freq_shift", 0.0)?,
        added,
        sample_size: sample_size(f)?,
        channels,
    })
}

/// Settings of `UNet2DConditionModel` that change the network and that we do not build.
fn unsupported_unet(f: &Fields) -> Result<()> {
    f.absent(&[
        "class_embed_type",
        "num_class_embeds",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_embedding_dim",
        "time_embedding_act_fn",
        "timestep_post_act",
        "time_cond_proj_dim",
        "cross_attention_norm",
    ])?;
    f.not_null(&["norm_num_groups"])?;
    let act_fn = if f.text("act_fn", "silu")? == "swish" { "swish" } else { "silu" };
    let fixed = [
        ("act_fn", json!(act_fn)),
        ("addition_embed_type", json!("text_time")),
        ("attention_type", json!("default")),
        ("center_input_sample", json!(false)),
        ("class_embeddings_concat", json!(false)),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("downsample_padding", json!(1)),
        ("dual_cross_attention", json!(false)),
        ("mid_block_only_cross_attention", json!(false)),
        ("mid_block_scale_factor", json!(1)),
        ("only_cross_attention", json!(false)),
        ("resnet_out_scale_factor", json!(1)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_time_scale_shift", json!("default")),
        ("time_embedding_type", json!("positional")),
    ];
    fixed.into_iter().try_for_each(|(field, value)| f.only(field, value))
}

/// Per level, the transformer blocks of each attention.
type Depths = Vec<Vec<usize>>;

/// The depths of all attentions, down and up, levels from the highest resolution down. `layers` are the residual blocks of each level
/// on the way down; `down` and `up` say which levels have attention.
fn transformers(f: &Fields, layers: &[usize], down: &[bool], up: &[bool]) -> Result<(Depths, Depths)> {
    const DOWN: &str = "transformer_layers_per_block";
    const UP: &str = "reverse_transformer_layers_per_block";
    let expand = |field, level: usize, given: &[usize], n: usize, on: bool| match given {
        _ if !on => Ok(vec![0; n]),
        [depth] if *depth > 0 => Ok(vec![*depth; n]),
        list if list.len() == n && !list.contains(&0) => Ok(list.to_vec()),
        _ => Err(f.wrong(field, &format!("{n} depths above 0 for level {level}"))),
    };
    let given = f.depths(DOWN, layers.len())?;
    let reversed = match f.get(UP) {
        // This field lists the levels in the order they run.
        Some(_) => f.depths(UP, layers.len())?.into_iter().rev().collect(),
        None if f.get(DOWN).and_then(Value::as_array).is_some_and(|list| list.iter().any(Value::is_array)) => {
            return Err(f.wrong(UP, "the depths on the way up, since those on the way down differ within a level"));
        }
        None => given.clone(),
    };
    let levels = 0..layers.len();
    let on_the_way_down = levels.clone().map(|i| expand(DOWN, i, &given[i], layers[i], down[i]));
    let on_the_way_up = levels.map(|i| expand(UP, i, &reversed[i], layers[i] + 1, up[i]));
    Ok((on_the_way_down.collect::<Result<_>>()?, on_the_way_up.collect::<Result<_>>()?))
}

/// The middle of a UNet; its transformer is as deep as the first one of the last level.
fn middle(f: &Fields, levels: usize) -> Result<Middle> {
    const FIELD: &str = "mid_block_type";
    const DEPTHS: &str = "transformer_layers_per_block";
    if f.map.get(FIELD).is_some_and(Value::is_null) {
        return Ok(Middle::Absent);
    }
    match f.text(FIELD, "UNetMidBlock2DCrossAttn")? {
        "UNetMidBlock2D" => Ok(Middle::Resnet),
        "UNetMidBlock2DCrossAttn" => match f.depths(DEPTHS, levels)?[levels - 1][0] {
            0 => Err(f.wrong(DEPTHS, "a depth above 0 of the last level, which is that of the middle")),
            depth => Ok(Middle::Transformer(depth)),
        },
        _ => Err(f.wrong(FIELD, "UNetMidBlock2DCrossAttn, UNetMidBlock2D or null; others are not supported")),
    }
}

/// Which levels have attention, in the order the field lists them.
fn attention(f: &Fields, field: &str, default: &[&'static str], kinds: [&str; 2], levels: usize) -> Result<Vec<bool>> {
    let [plain, attending] = kinds;
    let blocks = f.blocks(field, default)?;
    if let Some(other) = blocks.iter().find(|b| **b != plain && **b != attending) {
        return Err(f.error(format!("{field} has '{other}'; only {plain} and {attending} are supported")));
    }
    match blocks.len() == levels {
        true => Ok(blocks.iter().map(|b| *b == attending).collect()),
        false => Err(f.error(format!("{field} has {} entries, block_out_channels {levels}", blocks.len()))),
    }
}

/// Side of the latents the UNet was trained on; 0 where none is given.
fn sample_size(f: &Fields) -> Result<usize> {
    match f.get("sample_size") {
        None => Ok(0),
        Some(Value::Array(sides)) if sides.len() == 2 && sides[0] == sides[1] => {
            f.as_count("sample_size", &sides[0], 1)
        }
        Some(v) => f.as_count("sample_size", v, 1),
    }
}

/// `AutoencoderKL`; `upcast` is its `force_upcast` where the file does not say. The class's own default is no answer: of diffusers'
/// pipelines those of SDXL alone heed it.
pub fn vae(f: &Fields, upcast: bool) -> Result<VaeConfig> {
    f.only("_class_name", json!("AutoencoderKL"))?;
    f.only("act_fn", json!("silu"))?;
    f.only("down_block_types", json!("DownEncoderBlock2D"))?;
    f.only("up_block_types", json!("UpDecoderBlock2D"))?;
    f.absent(&["latents_mean", "latents_std"])?;
    let config = VaeConfig {
        image_channels: f.count("out_channels", 3, 1)?,
        latent_channels: f.count("latent_channels", 4, 1)?,
        channels: f.sizes("block_out_channels", &[64])?,
        layers_per_block: f.count("layers_per_block", 1, 1)?,
        norm_groups: f.count("norm_num_groups", 32, 1)?,
        scaling_factor: f.number("scaling_factor", 0.18215)?,
        shift_factor: f.number("shift_factor", 0.0)?,
        mid_attention: f.flag("mid_block_add_attention", true)?,
        quant_conv: f.flag("use_quant_conv", true)?,
        post_quant_conv: f.flag("use_post_quant_conv", true)?,
        force_upcast: f.flag("force_upcast", upcast)?,
    };
    f.only("in_channels", json!(config.image_channels))?;
    if config.scaling_factor == 0.0 || !config.scaling_factor.is_finite() {
        return Err(f.wrong("scaling_factor", "a number other than 0"));
    }
    match config.channels.iter().find(|c| *c % config.norm_groups != 0) {
        Some(c) => Err(f.error(format!("{c} channels do not divide by {} norm groups", config.norm_groups))),
        None => Ok(config),
    }
}

/// `AttributeReader`; `values` tells the number of values of an attribute, which is for the weights to say.
pub fn reader(f: &Fields, values: impl Fn(&str) -> Result<usize>) -> Result<ReaderConfig> {
    f.only("_class_name", json!("AttributeReader"))?;
    let head = |name: &&str| Ok((name.to_string(), values(name)?));
    let config = ReaderConfig {
        sample_size: f.count("sample_size", 64, 1)?,
        image_channels: f.count("in_channels", 3, 1)?,
        channels: f.sizes("block_out_channels", &[16, 48, 96, 128])?,
        norm_groups: f.count("norm_num_groups", 8, 1)?,
        squeeze_channels: f.count("squeeze_channels", 32, 1)?,
        hidden_size: f.count("hidden_size", 256, 1)?,
        heads: f.names("attributes")?.iter().map(head).collect::<Result<_>>()?,
    };
    let halvings = config.channels.len() as u32 - 1;
    if config.sample_size.trailing_zeros() < halvings {
        return Err(f.wrong("sample_size", &format!("a side that halves {halvings} times")));
    }
    let normed = [&config.channels[..], &[config.hidden_size]].concat();
    match normed.iter().find(|c| *c % config.norm_groups != 0) {
        Some(c) => Err(f.error(format!("{c} channels do not divide by {} norm groups", config.norm_groups))),
        None => Ok(config),
    }
}

/// `CLIPTextModel` or `CLIPTextModelWithProjection`; whether there is a projection is for the weights to say.
pub fn text(f: &Fields) -> Result<ClipTextConfig> {
    f.only("model_type", json!("clip_text_model"))?;
    let config = ClipTextConfig {
        vocab_size: f.count("vocab_size", 49408, 1)?,
        width: f.count("hidden_size", 512, 1)?,
        layers: f.count("num_hidden_layers", 12, 1)?,
        heads: f.count("num_attention_heads", 8, 1)?,
        mlp_width: f.count("intermediate_size", 2048, 1)?,
        max_positions: f.count("max_position_embeddings", 77, 1)?,
        activation: gelu(f)?,
        layer_norm_eps: f.number("layer_norm_eps", 1e-5)?,
        projection: None,
    };
    match config.width % config.heads {
        0 => Ok(config),
        _ => Err(f.error(format!("hidden_size {} does not divide by {} heads", config.width, config.heads))),
    }
}

/// The activation of a CLIP tower.
fn gelu(f: &Fields) -> Result<Activation> {
    match f.text("hidden_act", "quick_gelu")? {
        "quick_gelu" => Ok(Activation::QuickGelu),
        "gelu" => Ok(Activation::Gelu),
        _ => Err(f.wrong("hidden_act", "\"quick_gelu\" or \"gelu\"; others are not supported")),
    }
}

/// Defaults of the scheduler classes of diffusers: name, beta start and end, beta schedule.
const SCHEDULERS: [(&str, f64, f64, &str); 14] = [
    ("DDIMScheduler", 0.0001, 0.02, "linear"),
    ("DDPMScheduler", 0.0001, 0.02, "linear"),
    ("PNDMScheduler", 0.0001, 0.02, "linear"),
    ("LMSDiscreteScheduler", 0.0001, 0.02, "linear"),
    ("EulerDiscreteScheduler", 0.0001, 0.02, "linear"),
    ("EulerAncestralDiscreteScheduler", 0.0001, 0.02, "linear"),
    ("HeunDiscreteScheduler", 0.00085, 0.012, "linear"),
    ("KDPM2DiscreteScheduler", 0.00085, 0.012, "linear"),
    ("KDPM2AncestralDiscreteScheduler", 0.00085, 0.012, "linear"),
    ("DPMSolverMultistepScheduler", 0.0001, 0.02, "linear"),
    ("DPMSolverSinglestepScheduler", 0.0001, 0.02, "linear"),
    ("DEISMultistepScheduler", 0.0001, 0.02, "linear"),
    ("UniPCMultistepScheduler", 0.0001, 0.02, "linear"),
    ("LCMScheduler", 0.00085, 0.012, "scaled_linear"),
];

/// `scheduler_config.json`. `old_pipeline` says that the pipeline is `StableDiffusionPipeline`, which overrules two
/// fields: `steps_offset` is 1 and `clip_sample` false whatever the file says.
pub fn scheduler(f: &Fields, old_pipeline: bool) -> Result<SchedulerConfig> {
    let class = f.text("_class_name", "")?;
    check_noise(f)?;
    let known = SCHEDULERS.iter().find(|s| s.0 == class);
    let unsupported = match known {
        Some(_) => unsupported_scheduler(f, class, old_pipeline).err(),
        None => Some(f.error(format!("scheduler class '{class}' is not known"))),
    };
    f.absent(&["trained_betas"])?;
    // What the other classes have where the file says nothing.
    let &(_, beta_start, beta_end, schedule) = known.unwrap_or(&SCHEDULERS[0]);
    let config = SchedulerConfig {
        class: class.to_string(),
        train_timesteps: f.count("num_train_timesteps", 1000, 2)?,
        beta_start: f.number("beta_start", beta_start)?,
        beta_end: f.number("beta_end", beta_end)?,
        beta_schedule: match f.text("beta_schedule", schedule)? {
            "linear" => BetaSchedule::Linear,
            "scaled_linear" => BetaSchedule::ScaledLinear,
            "squaredcos_cap_v2" => BetaSchedule::SquaredCosCapV2,
            _ => return Err(f.wrong("beta_schedule", "linear, scaled_linear or squaredcos_cap_v2")),
        },
        prediction: match f.text("prediction_type", "epsilon")? {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::V,
            "sample" => Prediction::Sample,
            _ => return Err(f.wrong("prediction_type", "epsilon, v_prediction or sample")),
        },
        spacing: match f.text("timestep_spacing", "")? {
            "" => None,
            name => match name.parse() {
                Ok(spacing) => Some(spacing),
                Err(_) => return Err(f.wrong("timestep_spacing", "leading, linspace or trailing")),
            },
        },
        steps_offset: if old_pipeline { 1 } else { f.count("steps_offset", 0, 0)? },
        // Classes without the field leave the default of the DDIM that may take over their configuration.
        set_alpha_to_one: f.flag("set_alpha_to_one", class != "PNDMScheduler")?,
        rescale_zero_snr: f.flag("rescale_betas_zero_snr", false)?,
        karras: f.flag("use_karras_sigmas", false)?,
        unsupported: unsupported.map(|error| error.to_string()),
    };
    let (start, end) = (config.beta_start, config.beta_end);
    if !(0.0 < start && start <= end && end < 1.0) {
        return Err(f.error(format!("beta_start {start} and beta_end {end} are not between 0 and 1 in this order")));
    }
    match config.steps_offset < config.train_timesteps {
        true => Ok(config),
        false => Err(f.wrong("steps_offset", "less than num_train_timesteps")),
    }
}

/// Refuses the schedulers of models that were not trained on the noise levels of betas: no sampler here follows those, whichever is
/// chosen.
fn check_noise(f: &Fields) -> Result<()> {
    let refused = |what: &str| Err(f.error(format!("{what}, which no sampler here can follow")));
    let class = f.text("_class_name", "")?;
    let has = |field: &&str| f.map.contains_key(*field);
    if has(&"sigma_data") || class.starts_with("EDM") {
        return refused(&format!("'{class}' is for a model on continuous noise levels (EDM)"));
    }
    if class.starts_with("FlowMatch")
        || f.flag("use_flow_sigmas", false)?
        || f.text("prediction_type", "")?.contains("flow")
    {
        return refused(&format!("'{class}' is for a model trained by flow matching"));
    }
    if f.text("timestep_type", "discrete")? != "discrete" {
        return refused("timestep_type is for a model that takes noise levels instead of timesteps");
    }
    let is_known = SCHEDULERS.iter().any(|known| known.0 == class);
    match is_known || ["beta_start", "beta_end", "beta_schedule"].iter().any(has) {
        true => Ok(()),
        false => refused(&format!("'{class}' is not known and has no betas")),
    }
}

/// Settings of schedulers that change the trajectory and that we do not have; each only where its class reads it.
fn unsupported_scheduler(f: &Fields, class: &str, old_pipeline: bool) -> Result<()> {
    for field in ["thresholding", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting"]
    {
        f.only(field, json!(false))?;
    }
    match class {
        "DDIMScheduler" if !old_pipeline && f.flag("clip_sample", true)? => {
            Err(f.error("clip_sample is true or absent (which means true), needed false".to_string()))
        }
        "PNDMScheduler" if !f.flag("skip_prk_steps", false)? => {
            Err(f.error("skip_prk_steps is false or absent (which means false), needed true".to_string()))
        }
        "EulerDiscreteScheduler" => {
            f.only("interpolation_type", json!("linear"))?;
            f.only("final_sigmas_type", json!("zero"))?;
            f.absent(&["sigma_min", "sigma_max"])
        }
        "DPMSolverMultistepScheduler" => {
            f.only("algorithm_type", json!("dpmsolver++"))?;
            f.only("solver_order", json!(2))?;
            f.only("solver_type", json!("midpoint"))?;
            f.only("lower_order_final", json!(true))?;
            f.only("euler_at_final", json!(false))?;
            f.only("final_sigmas_type", json!("zero"))?;
            // As JSON from Python has it.
            f.only("lambda_min_clipped", json!("-Infinity"))?;
            f.absent(&["variance_type"])
        }
        _ => Ok(()),
    }
}
