"""Trains the autoencoder (AutoencoderKL, f = 4, 16 x 16 x 4 latents) on renders with attribute-uniform frequencies.

Uniform, so that "rare" never means "cannot be drawn". L1 + squared error + L1 of the image gradients + a little KL; the log-variance
starts near -6, because a latent that starts as noise costs the first thousand steps. Writes model/vae, scaled to unit latents of the
long-tailed world.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL

import render
import trainer
import world

RECIPE = trainer.Recipe("vae", steps=5000, batch=48, learning_rate=2e-3, seed=12, weight_decay=1e-4, ema=0.998)
KL_WEIGHT = 5e-5


def build() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=(16, 32, 64),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=world.IMAGE_SIZE, scaling_factor=1.0,
    )  # fmt: skip
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 4
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6
    return vae


def scenes(rng, n, *, uniform):
    """Cells and their renders: `[n, 10]`, `[n, 64, 64, 3]` uint8."""
    cells = world.sample(rng, n, uniform=uniform)
    return cells, render.render(cells, render.sample_nuisances(rng, n))


def _slopes(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def program(args) -> None:
    trainer.seeded(RECIPE.seed)
    vae = build()

    def loss(draw):
        x = trainer.pixels(scenes(draw.rng, draw.batch, uniform=True)[1], draw.device)
        with trainer.autocast(draw.device):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y, mean, logvar = y.float(), posterior.mean.float(), posterior.logvar.float()
        squared = (x - y).square().mean()
        slopes = sum((a - b).abs().mean() for a, b in zip(_slopes(x), _slopes(y)))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        # Peak-to-peak of [-1, 1] is 2: PSNR = 10 log10(4 / mse).
        psnr = -10 * torch.log10(squared.detach() / 4)
        return (x - y).abs().mean() + squared + 0.5 * slopes + KL_WEIGHT * kl, {"psnr": psnr, "kl": kl}

    trainer.train(RECIPE, vae, loss, args)
    if trainer.rank() == 0:
        vae.cpu()
        rng = np.random.default_rng([RECIPE.seed, RECIPE.steps])
        with torch.no_grad():
            posterior = vae.encode(trainer.pixels(scenes(rng, 2000, uniform=False)[1])).latent_dist
            vae.register_to_config(scaling_factor=round(1 / posterior.sample(torch.Generator().manual_seed(RECIPE.seed)).std().item(), 5))
        vae.save_pretrained(args.work / "model" / "vae")


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0]))
