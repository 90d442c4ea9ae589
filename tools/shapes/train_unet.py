"""Trains a UNet (epsilon prediction, classifier-free dropout) on captions and latents of the long-tailed world.

`--variant a` is the model of the folder, `--variant b` an independent one of another width for transfer tests. Writes model/unet or
model-b/unet, and the scheduler beside it.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

import captions
import make_data
import tokenizer
import trainer

# Widths, and the phases of the training: all but the first weigh coarse errors (`coarse_errors`) and have terse captions too (`TERSE`).
VARIANTS = {
    "a": (
        (64, 96, 96),
        trainer.Recipe("unet", steps=6000, batch=96, learning_rate=1.5e-3, seed=21, hold=0.4, ema=0.9995),
        trainer.Recipe("unet-coarse", steps=2400, batch=96, learning_rate=5e-4, seed=23, ema=0.999),
        trainer.Recipe("unet-settle", steps=2000, batch=96, learning_rate=2.5e-4, seed=25, ema=0.9995),
    ),
    "b": (
        (48, 80, 80),
        trainer.Recipe("unet-b", steps=2400, batch=96, learning_rate=1.5e-3, seed=22, hold=0.4, ema=0.999),
        trainer.Recipe("unet-b-coarse", steps=1200, batch=96, learning_rate=5e-4, seed=24, ema=0.999),
    ),
}
CAPTION_DROPOUT = 0.1
# Share of the later phases' captions that mention every attribute but the shape as rarely as this: one caption in a hundred is a bare
# "a star" otherwise, too few to learn what all it leaves open.
TERSE, TERSE_MENTION = 0.3, 0.3
# Loss weight min(SNR, 5) / SNR (Hang et al. 2023, epsilon form).
SNR_CAP = 5.0


def build(widths) -> UNet2DConditionModel:
    cross_down, cross_up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=1,
        down_block_types=("DownBlock2D", cross_down, cross_down), up_block_types=(cross_up, cross_up, "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    # The explicit form: on a CPU the fused one spends 40 % of the step in its backward.
    unet.set_attn_processor(AttnProcessor())
    return unet


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's, except `beta_end`: 0.012 leaves 7 % of the signal at the last step, enough to read a flat background there,
    while sampling starts from none: generated backgrounds would turn gray. 0.025 leaves 0.6 %."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.025, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


def coarse_errors(error: torch.Tensor) -> torch.Tensor:
    """Mean square per sample of the errors `[n, 4, 16, 16]` averaged over 4 x 4 latents and over all, each in units of the noise's own.

    Colours and grounds are decided there, at high noise, by 20 of 256 coefficients a channel, which the plain mean square hardly weighs:
    generated colours stay too evenly spread for a long time. Any such weights leave the minimum where it is, at the conditional mean
    (the multiscale loss of Hoogeboom et al. 2023, "simple diffusion").
    """
    return sum(F.avg_pool2d(error, size).square().mean((1, 2, 3)) * size**2 for size in (4, 16))


def denoising_loss(unet, x: torch.Tensor, context: torch.Tensor, alphas: torch.Tensor, coarse: bool):
    """The loss of clean latents `x [n, 4, 16, 16]`, and what to log; noise and timesteps are drawn from torch's generator."""
    # One timestep per stratum: the same distribution, less variance. Later phases ask more of high noise, with density t^(1/2).
    strata = (torch.arange(len(x)) + torch.rand(len(x))) / len(x)
    t = ((strata ** (2 / 3) if coarse else strata) * len(alphas)).long().clamp(max=len(alphas) - 1).to(x.device)
    noise = torch.randn_like(x)
    a = alphas[t]
    noisy = a.sqrt()[:, None, None, None] * x + (1 - a).sqrt()[:, None, None, None] * noise
    with trainer.autocast(x.device):
        predicted = unet(noisy, t, context).sample
    error = predicted.float() - noise
    squared, pooled = error.square().mean((1, 2, 3)), coarse_errors(error)
    snr = a / (1 - a)
    weight = snr.clamp(max=SNR_CAP) / snr
    return (weight * (squared + pooled if coarse else squared)).mean(), {"mse": squared.mean(), "coarse": pooled.detach().mean()}


def program(args) -> None:
    widths, *recipes = VARIANTS[args.variant]
    encode = tokenizer.WordEncoder(args.work / "model" / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.work / "model" / "text_encoder", attn_implementation="eager").eval().to(args.device)
    cells, latents = make_data.load(args.work)
    trainer.seeded(recipes[0].seed)
    unet = build(widths)
    alphas = scheduler().alphas_cumprod.to(args.device)

    def loss(draw, coarse):
        rows = draw.rng.integers(0, len(cells), draw.batch)
        empty = draw.rng.random(draw.batch) < CAPTION_DROPOUT
        shares = np.where(draw.rng.random(draw.batch) < TERSE, TERSE_MENTION, 1.0) if coarse else np.ones(draw.batch)
        said = zip(rows, empty, shares)
        texts = ["" if e else captions.write(cells[r], captions.mention(draw.rng, share), draw.rng) for r, e, share in said]
        with trainer.autocast(draw.device), torch.no_grad():
            context = text(torch.from_numpy(encode(texts)).to(draw.device)).last_hidden_state
        return denoising_loss(unet, latents[torch.from_numpy(rows)].float().to(draw.device), context, alphas, coarse)

    # All matrices but the first and last layer. After 700 steps of 48 on one core: loss 0.0192 against AdamW's 0.0234, for 14 % more time.
    hidden = [p for name, p in unet.named_parameters() if p.ndim > 1 and not name.startswith(("conv_in", "conv_out"))]
    for phase, recipe in enumerate(recipes):
        trainer.train(recipe, unet, partial(loss, coarse=phase > 0), args, hidden)
    if trainer.rank() == 0:
        folder = args.work / ("model" if args.variant == "a" else "model-b")
        unet.cpu().save_pretrained(folder / "unet")
        scheduler().save_pretrained(folder / "scheduler")


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0], variant={"choices": VARIANTS, "default": "a"}))
