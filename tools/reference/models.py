"""Published configurations of SD 1.5, SD 2.1 (v) and SDXL base, and a writer of randomly initialised diffusers folders from them.

A component is laid out on torch's meta device (names and shapes only), its tensors are drawn one by one from a generator seeded by
the tensor's own name, and written straight to safetensors: no component is ever held twice, and no tensor depends on another.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

VAE = dict(
    in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, act_fn="silu", latent_channels=4, norm_num_groups=32,
    sample_size=512, scaling_factor=0.18215,
)  # fmt: skip

CLIP_L = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768,
    bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip

UNET = dict(
    sample_size=64, in_channels=4, out_channels=4, center_input_sample=False, flip_sin_to_cos=True, freq_shift=0,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, downsample_padding=1, mid_block_scale_factor=1,
    act_fn="silu", norm_num_groups=32, norm_eps=1e-5, cross_attention_dim=768, attention_head_dim=8,
)  # fmt: skip

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, trained_betas=None)

SD15 = dict(
    pipeline="StableDiffusionPipeline",
    text=[CLIP_L],
    unet=UNET,
    vae=VAE,
    scheduler=dict(
        _class_name="PNDMScheduler", _diffusers_version="0.6.0", **BETAS,
        clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
    ),
)  # fmt: skip

SD21 = dict(
    pipeline="StableDiffusionPipeline",
    text=[dict(CLIP_L, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu", projection_dim=512)],
    unet=dict(
        UNET, sample_size=96, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True, upcast_attention=True
    ),
    vae=dict(VAE, sample_size=768),
    scheduler=dict(
        _class_name="DDIMScheduler", _diffusers_version="0.8.0", **BETAS,
        clip_sample=False, prediction_type="v_prediction", set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
    ),
)  # fmt: skip

SDXL = dict(
    pipeline="StableDiffusionXLPipeline",
    text=[
        CLIP_L,
        dict(CLIP_L, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280),
    ],
    unet=dict(
        UNET, sample_size=128, attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280], cross_attention_dim=2048,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
    vae=dict(VAE, sample_size=1024, scaling_factor=0.13025),
    scheduler=dict(
        _class_name="EulerDiscreteScheduler", _diffusers_version="0.19.0.dev0", **BETAS,
        clip_sample=False, interpolation_type="linear", prediction_type="epsilon", sample_max_value=1.0, set_alpha_to_one=False,
        skip_prk_steps=True, steps_offset=1, timestep_spacing="leading", use_karras_sigmas=False,
    ),
)  # fmt: skip

PUBLISHED = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


def is_xl(spec):
    return spec["pipeline"] == "StableDiffusionXLPipeline"


def text_folders(spec):
    return ["text_encoder", "text_encoder_2"][: len(spec["text"])]


def component(spec, name):
    """An empty (meta device) module of a pipeline: `unet`, `vae`, `text_encoder` or `text_encoder_2`."""
    with torch.device("meta"), quiet():
        if name == "unet":
            return UNet2DConditionModel.from_config(copy.deepcopy(spec["unet"]))
        if name == "vae":
            return AutoencoderKL.from_config(copy.deepcopy(spec["vae"]))
        second = name == "text_encoder_2"
        cls = CLIPTextModelWithProjection if second else CLIPTextModel
        config = CLIPTextConfig(**spec["text"][int(second)], architectures=[cls.__name__])
        return cls(config)


@contextlib.contextmanager
def quiet():
    """Keeps the libraries' own messages out of the scripts' output."""
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield


def fan_in(shape):
    return math.prod(shape[1:])


def draw(name, shape, seed, coarse):
    """One tensor: matrices keep unit variance, norm weights scatter around 1, biases around 0, so that any two tensors differ.

    `coarse` rounds to 7 levels times a power of two: such values are the same number in f32, f16 and bf16, and compress well.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    values = torch.randn(shape, generator=generator)
    if coarse:
        values = values.round().clamp(-3, 3)
    if len(shape) == 1:
        is_norm_weight = name.endswith("weight")
        return values * 0.25 + 1 if is_norm_weight else values * 0.125
    if "embedding.weight" in name:
        return values * 0.5
    scale = fan_in(shape) ** -0.5
    if "time_emb_proj" in name:
        scale *= 4  # most of it is normalised away again where a group has one or two channels
    return values * (2.0 ** round(math.log2(scale)) if coarse else scale)


def write_component(spec, name, folder, seed, dtype, coarse=False, prefix="", shards=1):
    """Writes `folder/name/`: config.json and the tensors, in as many files as asked for."""
    path = os.path.join(folder, name)
    os.makedirs(path, exist_ok=True)
    module = component(spec, name)
    if name.startswith("text"):
        module.config.save_pretrained(path)
        stem = "model"
    else:
        module.save_config(path)
        stem = "diffusion_pytorch_model"
    one = lambda item: (prefix + item[0], draw(f"{name}/{item[0]}", tuple(item[1].shape), seed, coarse).to(DTYPES[dtype]))  # noqa: E731
    with ThreadPoolExecutor() as pool:
        tensors = dict(pool.map(one, module.state_dict().items()))
    if shards == 1:
        save_file(tensors, os.path.join(path, f"{stem}.safetensors"), metadata={"format": "pt"})
        return
    keys, weight_map, total = sorted(tensors), {}, 0
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in keys[shard::shards]}
        total += sum(t.nbytes for t in part.values())
        weight_map.update({key: file for key in part})
        save_file(part, os.path.join(path, file), metadata={"format": "pt"})
    write_json(os.path.join(path, f"{stem}.safetensors.index.json"), {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path, value):
    with open(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def write_tokenizer(source, folder, name, pad):
    """Copies a tokenizer folder; `pad` is what special_tokens_map.json says, which wins over tokenizer_config.json (as SD 2 ships it)."""
    path = os.path.join(folder, name)
    os.makedirs(path, exist_ok=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(os.path.join(source, file), os.path.join(path, file))
    with open(os.path.join(source, "tokenizer_config.json")) as file:
        config = json.load(file)
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if name == "tokenizer_2":
        config["pad_token"] = pad
    write_json(os.path.join(path, "tokenizer_config.json"), config)
    write_json(os.path.join(path, "special_tokens_map.json"), dict(special, pad_token=pad))


def write_pipeline(spec, folder, tokenizer=None):
    """Writes what belongs to no network: model_index.json, the scheduler and the tokenizers, copied from a folder; none without, where a reader
    takes CLIP's own."""
    os.makedirs(os.path.join(folder, "scheduler"), exist_ok=True)
    write_json(os.path.join(folder, "scheduler", "scheduler_config.json"), spec["scheduler"])
    index = {"_class_name": spec["pipeline"], "_diffusers_version": "0.42.1"}
    if is_xl(spec):
        index |= {"force_zeros_for_empty_prompt": True, "feature_extractor": [None, None], "image_encoder": [None, None]}
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"]}
        if tokenizer:
            write_tokenizer(tokenizer, folder, "tokenizer_2", "!")
    else:
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False, "safety_checker": [None, None]}
    index |= {
        "scheduler": ["diffusers", spec["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    is_sd2 = not is_xl(spec) and spec["text"][0]["hidden_act"] == "gelu"
    if tokenizer:
        write_tokenizer(tokenizer, folder, "tokenizer", "!" if is_sd2 else "<|endoftext|>")
    write_json(os.path.join(folder, "model_index.json"), index)
