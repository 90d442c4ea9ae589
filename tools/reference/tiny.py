"""The tiny pipelines of tests/data: SD 1, SD 2 (v) and SDXL in everything but width, with random weights.

They keep what loaders and shape inference rely on (32 norm groups, 8 heads in SD 1, heads 64 wide in SD 2, SDXL and the text towers),
and differ in storage: f16 with f32 text, bf16, f16 with a sharded UNet; text keys with and without `text_model.`.
"""

import glob
import os

import models
from models import CLIP_L, SD15, SD21, SDXL, VAE
from safetensors.torch import load_file, save_file

POSITIONS = dict(vocab_size=819, max_position_embeddings=32)


def vae(channels, layers, scaling_factor=0.18215):
    levels = len(channels)
    return dict(
        VAE, block_out_channels=channels, layers_per_block=layers, scaling_factor=scaling_factor, sample_size=8 << (levels - 1),
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    )  # fmt: skip


def clip(**fields):
    return dict(CLIP_L, **{**POSITIONS, **fields})


TINY = {
    "tiny-sd1": dict(
        SD15,
        text=[clip(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, projection_dim=64)],
        unet=dict(
            SD15["unet"], sample_size=8, block_out_channels=[32, 64], cross_attention_dim=64,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        ),
        vae=vae([32, 32], layers=2),
    ),
    "tiny-sd2": dict(
        SD21,
        text=[clip(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, hidden_act="gelu", projection_dim=64)],
        unet=dict(
            SD21["unet"], sample_size=8, block_out_channels=[32, 64], layers_per_block=1, cross_attention_dim=64, attention_head_dim=[1, 1],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        ),
        vae=vae([32, 32, 32], layers=1),
    ),
    "tiny-sdxl": dict(
        SDXL,
        text=[
            clip(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, projection_dim=64),
            clip(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu", projection_dim=64),
        ],
        unet=dict(
            SDXL["unet"], sample_size=8, block_out_channels=[32, 64, 64], layers_per_block=1, cross_attention_dim=192,
            attention_head_dim=[1, 1, 1], transformer_layers_per_block=[1, 1, 2],
            addition_time_embed_dim=32, projection_class_embeddings_input_dim=64 + 6 * 32,
        ),
        vae=vae([32, 64], layers=1, scaling_factor=0.13025),
    ),
}  # fmt: skip

# component → storage; anything not named here is f16 in one file
STORAGE = {
    "tiny-sd1": {"text_encoder": dict(prefix="text_model.", dtype="f32")},
    "tiny-sd2": {name: dict(dtype="bf16") for name in ("text_encoder", "unet", "vae")},
    "tiny-sdxl": {"text_encoder": dict(prefix="text_model."), "unet": dict(shards=3)},
}
SEEDS = {"tiny-sd1": 1, "tiny-sd2": 2, "tiny-sdxl": 3}


def write(name, folder, tokenizer):
    """Writes one tiny pipeline as a diffusers folder."""
    spec = TINY[name]
    models.write_pipeline(spec, folder, tokenizer)
    for part in [*models.text_folders(spec), "unet", "vae"]:
        options = {"dtype": "f16", **STORAGE[name].get(part, {})}
        models.write_component(spec, part, folder, SEEDS[name], coarse=True, **options)


def write_lightning(folder, path):
    """A UNet-only file for tiny-sdxl under diffusers keys, as SDXL-Lightning is published: its tensors are those of `unet/`, each with
    its elements in reverse order, so that tests can make the file themselves."""
    unet = {}
    for shard in sorted(glob.glob(os.path.join(folder, "unet", "*.safetensors"))):
        unet |= load_file(shard)
    save_file({key: value.flatten().flip(0).reshape(value.shape) for key, value in unet.items()}, path, metadata={"format": "pt"})
