//! Detection on folders and single files that hold only the tensors it looks at.

use super::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// What detection looks at in a one-level UNet, a two-level VAE and a text tower.
const UNET: [(&str, &[usize]); 9] = [
    ("conv_in.weight", &[32, 4, 3, 3]),
    ("conv_out.weight", &[4, 32, 3, 3]),
    ("down_blocks.0.resnets.0.conv1.weight", &[32, 32, 3, 3]),
    ("up_blocks.0.resnets.0.conv1.weight", &[32, 64, 3, 3]),
    ("up_blocks.0.resnets.1.conv1.weight", &[32, 64, 3, 3]),
    ("mid_block.resnets.1.conv1.weight", &[32, 32, 3, 3]),
    ("mid_block.attentions.0.proj_in.weight", &[32, 32, 1, 1]),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", &[32, 32]),
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", &[32, 16]),
];
const VAE: [(&str, &[usize]); 6] = [
    ("decoder.conv_in.weight", &[32, 4, 3, 3]),
    ("decoder.conv_out.weight", &[3, 32, 3, 3]),
    ("decoder.up_blocks.0.resnets.0.conv1.weight", &[32, 32, 3, 3]),
    ("decoder.up_blocks.0.resnets.1.conv1.weight", &[32, 32, 3, 3]),
    ("decoder.up_blocks.1.resnets.0.conv1.weight", &[32, 32, 3, 3]),
    ("decoder.up_blocks.1.resnets.1.conv1.weight", &[32, 32, 3, 3]),
];
const TEXT: [(&str, &[usize]); 3] = [
    ("text_model.embeddings.token_embedding.weight", &[50, 16]),
    ("text_model.embeddings.position_embedding.weight", &[77, 16]),
    ("text_model.encoder.layers.0.mlp.fc1.weight", &[64, 16]),
];

fn weights(tensors: &[(&str, &[usize])]) -> &'static [u8] {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| vec![0; 2 * shape.iter().product::<usize>()]).collect();
    let each = tensors.iter().zip(&data);
    let views = each.map(|((k, s), d)| (*k, TensorView::new(Dtype::F16, s.to_vec(), d).unwrap()));
    safetensors::serialize(views, None).unwrap().leak()
}

/// A folder of the tensors above; each edit sets a field of a config.
fn folder(edits: &[(&str, &str, Value)]) -> Model {
    let mut configs = [
        ("model_index.json", json!({"_class_name": "StableDiffusionPipeline"})),
        (
            "unet/config.json",
            json!({"_class_name": "UNet2DConditionModel", "block_out_channels": [32], "layers_per_block": 1,
                "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "attention_head_dim": 4,
                "cross_attention_dim": 16, "sample_size": 8}),
        ),
        (
            "vae/config.json",
            json!({"block_out_channels": [32, 32], "norm_num_groups": 16, "mid_block_add_attention": false,
                "use_post_quant_conv": false}),
        ),
        (
            "text_encoder/config.json",
            json!({"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 64}),
        ),
        ("scheduler/scheduler_config.json", json!({"_class_name": "DDIMScheduler"})),
    ];
    for (file, field, value) in edits {
        let config = configs.iter_mut().find(|(name, _)| name.starts_with(file)).unwrap();
        config.1[*field] = value.clone();
    }
    let mut files: Vec<(&'static str, &'static [u8])> = vec![
        ("unet/diffusion_pytorch_model.safetensors", weights(&UNET)),
        ("vae/diffusion_pytorch_model.safetensors", weights(&VAE)),
        ("text_encoder/model.safetensors", weights(&TEXT)),
    ];
    files.extend(configs.map(|(name, json)| (name, &*json.to_string().into_bytes().leak())));
    Model::embedded(files.leak()).unwrap()
}

fn refused(edits: &[(&str, &str, Value)], why: &str) {
    let e = pipeline_config(&folder(edits), None).unwrap_err().to_string();
    assert!(e.contains(why) && !e.contains('\n'), "{e:?} lacks {why:?}");
}

#[test]
fn a_folder_is_read_with_the_defaults_of_diffusers() {
    let config = pipeline_config(&folder(&[]), None).unwrap();
    assert_eq!((config.family, config.image_size), (Family::Sd1, 16));
    assert_eq!((config.unet.heads[0], config.unet.norm_groups, config.unet.middle), (4, 32, Middle::Transformer(1)));
    assert_eq!((config.vae.norm_groups, config.vae.scaling_factor), (16, 0.18215));
    assert!(!config.vae.force_upcast, "only diffusers' pipelines for SDXL heed what the class says by default");
    let said = folder(&[("vae", "force_upcast", json!(true))]);
    assert!(pipeline_config(&said, None).unwrap().vae.force_upcast);
    assert_eq!(config.text[0].activation, crate::program::Activation::QuickGelu);
    assert!(!config.zero_empty_negative);
    // StableDiffusionPipeline overrules steps_offset and clip_sample.
    let s = &config.scheduler;
    assert_eq!((s.beta_start, s.beta_end, s.steps_offset, s.set_alpha_to_one), (0.0001, 0.02, 1, true));
    assert_eq!((s.beta_schedule, s.spacing), (BetaSchedule::Linear, None));
    let trailing = folder(&[("scheduler", "timestep_spacing", json!("trailing"))]);
    assert_eq!(pipeline_config(&trailing, None).unwrap().scheduler.spacing, Some(Spacing::Trailing));
}

#[test]
fn prediction_of_the_scheduler_gives_way_to_the_argument() {
    let model = folder(&[("scheduler", "prediction_type", json!("v_prediction"))]);
    assert_eq!(pipeline_config(&model, None).unwrap().scheduler.prediction, Prediction::V);
    let epsilon = pipeline_config(&model, Some(Prediction::Epsilon)).unwrap();
    assert_eq!(epsilon.scheduler.prediction, Prediction::Epsilon);
}

#[test]
fn unsupported_settings_name_their_field() {
    for (field, value) in [
        ("act_fn", json!("gelu")),
        ("resnet_time_scale_shift", json!("scale_shift")),
        ("class_embed_type", json!("projection")),
        ("dual_cross_attention", json!(true)),
        ("only_cross_attention", json!([true])),
        ("time_cond_proj_dim", json!(256)),
        ("mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        ("down_block_types", json!(["AttnDownBlock2D"])),
        ("norm_num_groups", json!(null)),
        ("reverse_transformer_layers_per_block", json!([[1], [1]])),
        ("transformer_layers_per_block", json!([0])),
        ("transformer_layers_per_block", json!([[1], [1]])),
        ("transformer_layers_per_block", json!("1")),
        ("transformer_layers_per_block", json!([[]])),
        ("layers_per_block", json!([1, 2])),
        ("attention_head_dim", json!(-8)),
        ("sample_size", json!("big")),
    ] {
        refused(&[("unet", field, value)], &format!("unet/config.json: {field}"));
    }
    refused(&[("vae", "latents_mean", json!([0.0]))], "vae/config.json: latents_mean");
    refused(&[("text", "hidden_act", json!("relu"))], "text_encoder/config.json: hidden_act");
    for (field, value) in [
        ("trained_betas", json!([0.1])),
        ("beta_schedule", json!("sigmoid")),
        ("num_train_timesteps", json!(0)),
        ("beta_start", json!(0)),
    ] {
        refused(&[("scheduler", field, value)], &format!("scheduler/scheduler_config.json: {field}"));
    }
    refused(&[("model_index", "_class_name", json!("FluxPipeline"))], "a FluxPipeline is not supported");
}

/// Settings of the model's own sampler only matter where it is used.
#[test]
fn unsupported_samplers_say_why() {
    for (field, value, why) in [
        ("thresholding", json!(true), "thresholding"),
        ("_class_name", json!("PNDMScheduler"), "skip_prk_steps"),
        ("use_beta_sigmas", json!(true), "use_beta_sigmas"),
    ] {
        let config = pipeline_config(&folder(&[("scheduler", field, value)]), None).unwrap();
        let unsupported = config.scheduler.unsupported.unwrap();
        assert!(unsupported.contains("scheduler/scheduler_config.json") && unsupported.contains(why), "{unsupported}");
    }
    assert_eq!(pipeline_config(&folder(&[]), None).unwrap().scheduler.unsupported, None);
    let unknown = [("scheduler", "_class_name", json!("Mine")), ("scheduler", "beta_schedule", json!("linear"))];
    assert!(pipeline_config(&folder(&unknown), None).unwrap().scheduler.unsupported.unwrap().contains("'Mine'"));
}

#[test]
fn settings_of_dpm_solvers_that_are_not_here() {
    let unsupported = |field: &'static str, value: Value| {
        let edits = [("scheduler", "_class_name", json!("DPMSolverMultistepScheduler")), ("scheduler", field, value)];
        pipeline_config(&folder(&edits), None).unwrap().scheduler.unsupported
    };
    // As diffusers writes the default.
    assert_eq!(unsupported("lambda_min_clipped", json!("-Infinity")), None);
    for (field, value) in [
        ("lambda_min_clipped", json!(-5.1)),
        ("solver_order", json!(3)),
        ("algorithm_type", json!("sde-dpmsolver++")),
        ("use_lu_lambdas", json!(true)),
        ("euler_at_final", json!(true)),
        ("final_sigmas_type", json!("sigma_min")),
        ("variance_type", json!("learned_range")),
    ] {
        let why = unsupported(field, value).unwrap_or_else(|| panic!("{field} is taken"));
        assert!(why.contains(field), "{why}");
    }
}

/// Whatever sampler is chosen: the network takes other times and other noise.
#[test]
fn models_on_other_noise_are_refused() {
    for edits in [
        &[("_class_name", json!("FlowMatchEulerDiscreteScheduler"))][..],
        &[("_class_name", json!("EDMDPMSolverMultistepScheduler"))],
        &[("_class_name", json!("CMStochasticIterativeScheduler")), ("sigma_data", json!(0.5))],
        &[("_class_name", json!("IPNDMScheduler"))],
        &[("_class_name", json!("MyScheduler"))],
        &[("_class_name", json!("DPMSolverMultistepScheduler")), ("use_flow_sigmas", json!(true))],
        &[("_class_name", json!("UniPCMultistepScheduler")), ("prediction_type", json!("flow_prediction"))],
        &[("_class_name", json!("EulerDiscreteScheduler")), ("timestep_type", json!("continuous"))],
    ] {
        let edits: Vec<_> = edits.iter().map(|(field, value)| ("scheduler", *field, value.clone())).collect();
        refused(&edits, "which no sampler here can follow");
    }
}

#[test]
fn depths_within_a_level() {
    let depths = |down: Value, up: Value| {
        let field = |name, value| ("unet", name, value);
        let edits = [field("transformer_layers_per_block", down), field("reverse_transformer_layers_per_block", up)];
        pipeline_config(&folder(&edits), None)
    };
    // Both levels of these folders are without attention; the middle is as deep as the first of the last level.
    assert_eq!(depths(json!([[1, 7]]), json!([[1, 2]])).unwrap().unet.middle, Middle::Transformer(1));
    assert_eq!(depths(json!(1), json!(null)).unwrap().unet.down_transformers, [[0]]);
    let error = depths(json!([[2]]), json!([[1, 2]])).unwrap_err().to_string();
    assert!(error.contains("mid_block_type is Transformer(2), but"), "{error}");
}

#[test]
fn configs_must_agree_with_the_weights() {
    refused(&[("unet", "cross_attention_dim", json!(32))], "cross_attention_dim is 32, but embedded model/unet");
    refused(&[("unet", "block_out_channels", json!([64]))], "block_out_channels is [64]");
    refused(&[("unet", "layers_per_block", json!(1_000_000))], "layers_per_block");
    refused(&[("vae", "latent_channels", json!(16))], "latent_channels");
    refused(&[("text", "vocab_size", json!(49408))], "vocab_size");
}

#[test]
fn head_and_depth_lists_are_per_level() {
    let edits = [("unet", "attention_head_dim", json!([8])), ("unet", "transformer_layers_per_block", json!([1]))];
    assert_eq!(unet_config(&folder(&edits)).unwrap().heads, [8]);
    refused(&[("unet", "attention_head_dim", json!([8, 8]))], "attention_head_dim is [8,8], needed 1 sizes");
}

/// A single file with CompVis names of the tensors above and whatever is added.
fn single(projection: &[usize], more: &[(&str, &[usize])], metadata: &[(&str, &str)]) -> Model {
    let unet = "model.diffusion_model";
    let named: Vec<(String, &[usize])> = vec![
        (format!("{unet}.input_blocks.0.0.weight"), &[32, 4, 3, 3]),
        (format!("{unet}.out.2.weight"), &[4, 32, 3, 3]),
        (format!("{unet}.input_blocks.1.0.in_layers.2.weight"), &[32, 32, 3, 3]),
        (format!("{unet}.output_blocks.0.0.in_layers.2.weight"), &[32, 64, 3, 3]),
        (format!("{unet}.output_blocks.1.0.in_layers.2.weight"), &[32, 64, 3, 3]),
        (format!("{unet}.middle_block.2.in_layers.2.weight"), &[32, 32, 3, 3]),
        (format!("{unet}.middle_block.1.proj_in.weight"), projection),
        (format!("{unet}.middle_block.1.transformer_blocks.0.attn1.to_q.weight"), &[32, 32]),
        (format!("{unet}.middle_block.1.transformer_blocks.0.attn2.to_k.weight"), &[32, 16]),
        ("first_stage_model.decoder.conv_in.weight".into(), &[32, 4, 3, 3]),
        ("first_stage_model.decoder.conv_out.weight".into(), &[3, 32, 3, 3]),
        ("first_stage_model.decoder.up.0.block.0.conv1.weight".into(), &[32, 32, 3, 3]),
    ];
    let text = TEXT.map(|(key, shape)| (format!("cond_stage_model.transformer.{key}"), shape));
    let more = more.iter().map(|(key, shape)| (key.to_string(), *shape));
    let all: Vec<_> = named.into_iter().chain(text).chain(more).collect();
    let data: Vec<Vec<u8>> = all.iter().map(|(_, s)| vec![0; 2 * s.iter().product::<usize>()]).collect();
    let views = all.iter().zip(&data).map(|((k, s), d)| (k, TensorView::new(Dtype::F16, s.to_vec(), d).unwrap()));
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    safetensors::serialize_to_file(views, Some(metadata), file.path()).unwrap();
    Model::open(file.path()).unwrap()
}

#[test]
fn single_files_get_what_diffusers_gives_them() {
    let conv = [32, 32, 1, 1];
    let config = pipeline_config(&single(&conv, &[], &[]), None).unwrap();
    assert_eq!((config.family, config.unet.heads[0], config.unet.sample_size), (Family::Sd1, 8, 64));
    assert_eq!((config.scheduler.class.as_str(), config.scheduler.prediction), ("PNDMScheduler", Prediction::Epsilon));
    let v = single(&conv, &[], &[("modelspec.prediction_type", "v")]);
    assert_eq!(pipeline_config(&v, None).unwrap().scheduler.prediction, Prediction::V);
    let v = pipeline_config(&single(&conv, &[("v_pred", &[0]), ("ztsnr", &[0])], &[]), None).unwrap().scheduler;
    assert_eq!((v.prediction, v.rescale_zero_snr), (Prediction::V, true));
}

#[test]
fn sd2_files_need_to_be_told_what_they_predict() {
    let model = single(&[32, 32], &[], &[]);
    let e = pipeline_config(&model, None).unwrap_err();
    assert!(matches!(e, Error::Usage(_)) && e.to_string().contains("--prediction"), "{e}");
    let config = pipeline_config(&model, Some(Prediction::V)).unwrap();
    assert_eq!((config.family, config.unet.sample_size), (Family::Sd2, 96));
    let base = pipeline_config(&model, Some(Prediction::Epsilon)).unwrap();
    assert_eq!((base.scheduler.class.as_str(), base.unet.sample_size), ("DDIMScheduler", 64));
}

#[test]
fn other_kinds_of_unet_are_named() {
    let key = "model.diffusion_model.label_emb.0.0.weight";
    let e = pipeline_config(&single(&[32, 32], &[(key, &[128, 64])], &[]), None).unwrap_err().to_string();
    assert!(e.contains("no second text encoder"), "{e}");
    let key = "model.diffusion_model.input_blocks.7.0.in_layers.2.weight";
    let e = pipeline_config(&single(&[32, 32], &[(key, &[32, 32, 3, 3])], &[]), None).unwrap_err().to_string();
    assert!(e.contains("down_blocks.0 has 7 residual blocks and up_blocks.0 2, where one more is expected"), "{e}");
}

/// A reader folder with the given fields and two heads, `shape` of 3 values and `frame` of 2.
fn reader(edits: Value) -> Result<ReaderConfig> {
    let mut config = json!({"_class_name": "AttributeReader", "sample_size": 8, "block_out_channels": [4, 8],
        "norm_num_groups": 2, "hidden_size": 16, "attributes": ["shape", "frame"]});
    config.as_object_mut().unwrap().extend(edits.as_object().unwrap().clone());
    let weights = weights(&[("heads.shape.bias", &[3]), ("heads.frame.bias", &[2])]);
    let files: [(&str, &[u8]); 2] =
        [("reader/config.json", config.to_string().into_bytes().leak()), ("reader/model.safetensors", weights)];
    reader_config(&Model::embedded(Box::leak(Box::new(files))).unwrap())
}

#[test]
fn readers_are_checked() {
    let config = reader(json!({})).unwrap();
    assert_eq!(config.heads, [("shape".to_string(), 3), ("frame".to_string(), 2)]);
    assert_eq!((config.last_side(), config.squeeze_channels), (4, 32));
    let refused = |edits: Value, words: &str| {
        let error = reader(edits).unwrap_err().to_string();
        assert!(error.contains("reader/config.json") && error.contains(words), "{error}");
    };
    refused(json!({"attributes": ["shape", "tilt"]}), "attribute 'tilt' has no head 'heads.tilt.bias'");
    refused(json!({"attributes": []}), "attributes is [], needed a list of names");
    refused(json!({"sample_size": 9}), "sample_size is 9, needed a side that halves 1 times");
    refused(json!({"sample_size": 2, "block_out_channels": vec![2; 80]}), "halves 79 times");
    refused(json!({"hidden_size": 15}), "15 channels do not divide by 2 norm groups");
    refused(json!({"_class_name": "Other"}), "_class_name");
}
