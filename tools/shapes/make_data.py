"""Draws the long-tailed training set of the UNets: scenes and their latents, in shards that are complete or absent.

Each shard is a function of its number, so cutting and restarting, or another number of processes, changes nothing. Writes
data/scenes-NNN.npz with `cells [n, 10]` int8 and `latents [n, 4, 16, 16]` f16: posterior means times the scaling factor.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL

import trainer
from train_vae import scenes

SEED = 13
SHARD = 4096
SHARDS = 48


def program(args) -> None:
    vae = AutoencoderKL.from_pretrained(args.work / "model" / "vae").eval().to(args.device)
    (args.work / "data").mkdir(exist_ok=True)
    for shard in range(trainer.rank(), args.shards, trainer.world_size()):
        path = args.work / "data" / f"scenes-{shard:03}.npz"
        if path.exists():
            continue
        cells, images = scenes(np.random.default_rng([SEED, shard]), SHARD, uniform=False)
        latents = np.empty((SHARD, 4, 16, 16), np.float16)
        with torch.no_grad(), trainer.autocast(args.device):
            for lo in range(0, SHARD, 128):
                mean = vae.encode(trainer.pixels(images[lo : lo + 128], args.device)).latent_dist.mean
                latents[lo : lo + 128] = (mean.float() * vae.config.scaling_factor).cpu().numpy()
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, cells=cells.astype(np.int8), latents=latents)
        temporary.replace(path)
        print(f"data {shard + 1}/{args.shards}", flush=True)
    trainer.barrier()


def load(work, shards=SHARDS):
    """All shards: cells `[n, 10]` int64 and latents `[n, 4, 16, 16]` f16."""
    files = [np.load(work / "data" / f"scenes-{shard:03}.npz") for shard in range(shards)]
    return np.concatenate([f["cells"] for f in files]).astype(np.int64), torch.from_numpy(np.concatenate([f["latents"] for f in files]))


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0], shards={"type": int, "default": SHARDS}))
