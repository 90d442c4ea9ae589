"""UNets whose blocks differ in depth, as pruned models have them, with one prediction of each by diffusers.

    python tools/reference/dump_pruned.py        writes tests/data/pruned
"""
import json
import os

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/data/pruned")
DOWN = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
UP = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
COMMON = dict(
    sample_size=8, block_out_channels=[4, 8, 8], norm_num_groups=4, attention_head_dim=2, cross_attention_dim=64,
    down_block_types=DOWN, up_block_types=UP,
)
UNETS = {
    # As SSD-1B: other depths up than down, and within a level; one residual block in the middle.
    "depths": dict(
        transformer_layers_per_block=[0, [2, 1], [1, 2]],
        reverse_transformer_layers_per_block=[[1, 2, 1], [2, 1, 1], 0],
        mid_block_type="UNetMidBlock2D",
    ),
    # As BK-SDM's small models: no middle; and levels of different lengths.
    "no-middle": dict(layers_per_block=[2, 1, 1], mid_block_type=None),
}

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(7)
for number, (name, settings) in enumerate(UNETS.items()):
    torch.manual_seed(number)
    unet = UNet2DConditionModel(**COMMON, **settings).half().float().eval()
    folder = os.path.join(OUT, name)
    unet.half().save_pretrained(folder)
    unet.float()
    latents = torch.randn(2, 4, 8, 6, generator=generator)
    context = torch.randn(2, 5, 64, generator=generator)
    with torch.no_grad():
        prediction = unet(latents, 420, context).sample
    save_file(dict(latents=latents, context=context, prediction=prediction.contiguous()), os.path.join(folder, "golden.safetensors"))
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    config.pop("_name_or_path", None)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
