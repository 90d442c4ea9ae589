"""Images of the `shapes` model by diffusers, in bulk, and what the reader sees in them.

The noise of seed s is `torch.randn(4, 16, 16)` from a CPU generator with that seed: `rarebit generate --rng torch-cpu --seed s` draws the
same.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

import reader
import trainer
import world

BATCH = 64


class Model:
    """The networks of a model folder; `unet` may come from another."""

    def __init__(self, folder: Path, device: str = "cpu", unet: Path | None = None):
        self.device = device
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, attn_implementation="eager").eval().to(device)
        self.unet = UNet2DConditionModel.from_pretrained((unet or folder) / "unet", torch_dtype=torch.float32).eval().to(device)
        self.unet.set_attn_processor(AttnProcessor())
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval().to(device)
        self.scheduler = DDIMScheduler.from_pretrained((unet or folder) / "scheduler")
        self.reader = reader.load(folder / "reader").to(device)

    def context(self, prompts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        return self.text(ids.to(self.device)).last_hidden_state

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: list[int], guidance: float, steps: int) -> torch.Tensor:
        """Images `[n, 3, 64, 64]` in [-1, 1], DDIM."""
        self.scheduler.set_timesteps(steps)
        noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        z = torch.stack(noise).to(self.device)
        with trainer.autocast(self.device):
            context = self.context(prompts)
            if guidance != 1:
                context = torch.cat([self.context([""]).expand(len(prompts), -1, -1), context])
            for t in self.scheduler.timesteps:
                if guidance == 1:
                    e = self.unet(z, t, context).sample.float()
                else:
                    empty, stated = self.unet(torch.cat([z, z]), t, context).sample.float().chunk(2)
                    e = empty + guidance * (stated - empty)
                z = self.scheduler.step(e, t, z).prev_sample
            return self.vae.decode(z / self.vae.config.scaling_factor).sample.float().clamp(-1, 1)

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> np.ndarray:
        """Cells `[n, 10]` of images as a PNG holds them, 8 bits a channel."""
        return self.reader.read(trainer.pixels(trainer.bytes_of(images), self.device)).cpu().numpy()

    def cells(self, prompts: list[str], seeds: list[int], guidance: float, steps: int) -> np.ndarray:
        """What the reader sees in the image of each prompt and seed; the work is shared by all processes."""
        mine = range(trainer.rank(), len(prompts), trainer.world_size())
        out = np.zeros((len(prompts), len(world.NAMES)), np.int64)
        for lo in range(0, len(mine), BATCH):
            rows = mine[lo : lo + BATCH]
            out[rows] = self.read(self.generate([prompts[i] for i in rows], [seeds[i] for i in rows], guidance, steps))
        if trainer.world_size() > 1:
            shared = torch.from_numpy(out)
            dist.all_reduce(shared)
        return out
