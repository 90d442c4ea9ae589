"""Trains the aesthetic head: from the unit CLIP image embedding of a scene to the world's aesthetic score (`world.aesthetic`).

The scenes are half attribute-uniform and half long-tailed, since a score is asked of both. Writes model/aesthetic.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionModelWithProjection

import trainer
import world
from train_text import WIDTH
from train_vae import scenes
from train_vision import vision_config

RECIPE = trainer.Recipe("aesthetic", steps=4000, batch=512, learning_rate=3e-3, seed=17, betas=(0.9, 0.98), weight_decay=1e-3, ema=0.998)
SCENES = 24_000


class AestheticHead(nn.Module):
    """`[n, 128]` unit embeddings -> `[n]` scores."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, embedding):
        return self.layers(embedding)[:, 0]


def load_vision(folder) -> CLIPVisionModelWithProjection:
    """The image tower alone, out of the CLIP pair's own file."""
    from safetensors.torch import load_file

    vision = CLIPVisionModelWithProjection._from_config(vision_config(), attn_implementation="eager")
    names = vision.state_dict().keys()
    vision.load_state_dict({k: v.float() for k, v in load_file(folder / "clip.safetensors").items() if k in names})
    return vision.eval()


@torch.no_grad()
def embed(vision, images, device="cpu"):
    """Images `[n, 64, 64, 3]` uint8 -> unit embeddings `[n, 128]`."""
    out = []
    for lo in range(0, len(images), 256):
        with trainer.autocast(device):
            e = vision(pixel_values=trainer.pixels(images[lo : lo + 256], device)).image_embeds.float()
        out.append(nn.functional.normalize(e, dim=-1))
    return torch.cat(out)


def program(args) -> None:
    vision = load_vision(args.work / "model" / "clip").to(args.device)
    rng = np.random.default_rng(RECIPE.seed)
    sets = [scenes(rng, SCENES // 2, uniform=uniform) for uniform in (True, False)]
    x = torch.cat([embed(vision, images, args.device) for _, images in sets])
    y = torch.from_numpy(np.concatenate([world.aesthetic(cells) for cells, _ in sets])).float().to(args.device)
    trainer.seeded(RECIPE.seed)
    head = AestheticHead()
    nn.init.constant_(head.layers[-1].bias, y.mean().item())

    def loss(draw):
        rows = torch.from_numpy(draw.rng.integers(0, len(x), draw.batch)).to(draw.device)
        error = (head(x[rows]) - y[rows]).square().mean()
        return error, {"r2": 1 - error.detach() / y.var()}

    trainer.train(RECIPE, head, loss, args)
    if trainer.rank() == 0:
        folder = args.work / "model" / "aesthetic"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(head.cpu().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        config = {"_class_name": "AestheticHead", "input": "unit CLIP image embedding", "sizes": [WIDTH, 64, 16, 1], "activation": "relu"}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0]))
