"""Trains the attribute reader on attribute-uniform scenes: half of them as rendered, half as the autoencoder gives them back.

What it will read are decoded latents that are never quite those of a render, so half of the reconstructions start from a latent with a
little noise, and some images are blurred or grained. Writes model/reader.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import reader
import trainer
from train_vae import scenes

RECIPE = trainer.Recipe("reader", steps=3000, batch=96, learning_rate=2e-3, seed=14, weight_decay=0.02, ema=0.998)
LATENT_NOISE = 0.15


def reconstruct(vae, x, noise=0.0):
    """Through the autoencoder's mean; `noise` is the largest standard deviation added to the scaled latent."""
    latent = vae.encode(x).latent_dist.mean
    if noise:
        strength = noise * torch.rand(len(x), 1, 1, 1, device=x.device) * (torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5)
        latent = latent + strength * torch.randn_like(latent) / vae.config.scaling_factor
    return vae.decode(latent).sample.float().clamp(-1, 1)


def _spoil(x):
    """Grain on half of the images, a 3 x 3 blur on a third."""
    n = (len(x), 1, 1, 1)
    grain = 0.1 * torch.rand(n, device=x.device) * (torch.rand(n, device=x.device) < 0.5)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(torch.rand(n, device=x.device) < 0.33, blurred, x)
    return x + grain * torch.randn_like(x)


def program(args) -> None:
    vae = AutoencoderKL.from_pretrained(args.work / "model" / "vae").eval().to(args.device)
    trainer.seeded(RECIPE.seed)
    network = reader.AttributeReader()

    def loss(draw):
        cells, images = scenes(draw.rng, draw.batch, uniform=True)
        x = trainer.pixels(images, draw.device)
        half = draw.batch // 2
        with torch.no_grad(), trainer.autocast(draw.device):
            x = torch.cat([_spoil(x[:half]), reconstruct(vae, x[half:], LATENT_NOISE)])
        target = torch.from_numpy(cells).to(draw.device)
        with trainer.autocast(draw.device):
            logits = network(x)
        value = sum(F.cross_entropy(l.float(), target[:, i]) for i, l in enumerate(logits))
        right = torch.stack([l.argmax(1) == target[:, i] for i, l in enumerate(logits)], 1).all(1).float()
        return value, {"all_raw": right[:half].mean(), "all_reconstructed": right[half:].mean()}

    trainer.train(RECIPE, network, loss, args)
    if trainer.rank() == 0:
        reader.save(network.cpu(), args.work / "model" / "reader")


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0]))
