"""Trains a UNet (epsilon prediction, classifier-free dropout) on captions and latents of the long-tailed world.

`--variant a` is the model of the folder, `--variant b` an independent one of another width for transfer tests. Writes model/unet or
model-b/unet, and the scheduler beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Phase:
    """A stretch of the training: where its timesteps lie, what errors it weighs, how much its captions say."""

    recipe: trainer.Recipe
    # From uniform numbers in [0, 1) to timesteps as shares of all.
    times: Callable[[torch.Tensor], torch.Tensor] = lambda u: u
    # Weights of the square errors averaged over n x n latents first, by n; the plain square error has weight 1.
    coarse: tuple[tuple[int, float], ...] = ()
    # Share of captions that mention everything but the shape more rarely, and how much. One in a hundred is a bare "a star"
    # otherwise, too few to learn what all it leaves open.
    terse: float = 0.0
    terse_mention: float = 1.0


def high(u: torch.Tensor) -> torch.Tensor:
    """Density t^(1/2)."""
    return u ** (2 / 3)


def middle(u: torch.Tensor) -> torch.Tensor:
    """Density 1.65 from 0.35 to 0.85, 0.35 elsewhere: where colours and positions are decided."""
    return torch.where(u < 0.1225, u / 0.35, torch.where(u < 0.9475, 0.35 + (u - 0.1225) / 1.65, 0.85 + (u - 0.9475) / 0.35))


# Widths and phases.
VARIANTS = {
    "a": (
        (64, 96, 96),
        Phase(trainer.Recipe("unet", steps=6000, batch=96, learning_rate=1.5e-3, seed=21, hold=0.4, ema=0.9995)),
        Phase(trainer.Recipe("unet-coarse", steps=2400, batch=96, learning_rate=5e-4, seed=23, ema=0.999),
              high, coarse=((4, 16.0), (16, 256.0)), terse=0.3, terse_mention=0.3),
        Phase(trainer.Recipe("unet-settle", steps=2000, batch=96, learning_rate=2.5e-4, seed=25, ema=0.9995),
              high, coarse=((4, 16.0), (16, 256.0)), terse=0.3, terse_mention=0.3),
        Phase(trainer.Recipe("unet-middle", steps=3000, batch=96, learning_rate=7e-4, seed=27, ema=0.999),
              middle, coarse=((4, 2.0), (16, 8.0)), terse=0.5, terse_mention=0.2),
    ),
    "b": (
        (48, 80, 80),
        Phase(trainer.Recipe("unet-b", steps=2400, batch=96, learning_rate=1.5e-3, seed=22, hold=0.4, ema=0.999)),
        Phase(trainer.Recipe("unet-b-middle", steps=1200, batch=96, learning_rate=5e-4, seed=24, ema=0.999),
              middle, coarse=((4, 2.0), (16, 8.0)), terse=0.5, terse_mention=0.2),
    ),
}  # fmt: skip
CAPTION_DROPOUT = 0.1
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


def denoising_loss(unet, x: torch.Tensor, context: torch.Tensor, alphas: torch.Tensor, phase: Phase):
    """The loss of clean latents `x [n, 4, 16, 16]`, and what to log; noise and timesteps are drawn from torch's generator.

    Colours and grounds are decided by averages over many latents, at high noise, where the plain mean square hardly weighs them:
    generated colours stay too evenly spread for a long time. Weighing them more leaves the minimum where it is, at the conditional
    mean (the multiscale loss of Hoogeboom et al. 2023, "simple diffusion").
    """
    # One timestep per stratum: the same distribution, less variance.
    strata = (torch.arange(len(x)) + torch.rand(len(x))) / len(x)
    t = (phase.times(strata) * len(alphas)).long().clamp(max=len(alphas) - 1).to(x.device)
    noise = torch.randn_like(x)
    a = alphas[t]
    noisy = a.sqrt()[:, None, None, None] * x + (1 - a).sqrt()[:, None, None, None] * noise
    with trainer.autocast(x.device):
        predicted = unet(noisy, t, context).sample
    error = predicted.float() - noise
    squared = error.square().mean((1, 2, 3))
    coarse = sum(weight * F.avg_pool2d(error, size).square().mean((1, 2, 3)) for size, weight in phase.coarse)
    snr = a / (1 - a)
    weight = snr.clamp(max=SNR_CAP) / snr
    metrics = {"mse": squared.mean()} | ({"coarse": coarse.detach().mean()} if phase.coarse else {})
    return (weight * (squared + coarse)).mean(), metrics


def program(args) -> None:
    widths, *phases = VARIANTS[args.variant]
    encode = tokenizer.WordEncoder(args.work / "model" / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.work / "model" / "text_encoder", attn_implementation="eager").eval().to(args.device)
    cells, latents = make_data.load(args.work)
    trainer.seeded(phases[0].recipe.seed)
    unet = build(widths)
    alphas = scheduler().alphas_cumprod.to(args.device)

    def loss(draw, phase):
        rows = draw.rng.integers(0, len(cells), draw.batch)
        empty = draw.rng.random(draw.batch) < CAPTION_DROPOUT
        shares = np.where(draw.rng.random(draw.batch) < phase.terse, phase.terse_mention, 1.0) if phase.terse else np.ones(draw.batch)
        said = zip(rows, empty, shares)
        texts = ["" if e else captions.write(cells[r], captions.mention(draw.rng, share), draw.rng) for r, e, share in said]
        with trainer.autocast(draw.device), torch.no_grad():
            context = text(torch.from_numpy(encode(texts)).to(draw.device)).last_hidden_state
        return denoising_loss(unet, latents[torch.from_numpy(rows)].float().to(draw.device), context, alphas, phase)

    # All matrices but the first and last layer. After 700 steps of 48 on one core: loss 0.0192 against AdamW's 0.0234, for 14 % more time.
    hidden = [p for name, p in unet.named_parameters() if p.ndim > 1 and not name.startswith(("conv_in", "conv_out"))]
    for phase in phases:
        trainer.train(phase.recipe, unet, partial(loss, phase=phase), args, hidden)
    if trainer.rank() == 0:
        folder = args.work / ("model" if args.variant == "a" else "model-b")
        unet.cpu().save_pretrained(folder / "unet")
        scheduler().save_pretrained(folder / "scheduler")


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0], variant={"choices": VARIANTS, "default": "a"}))
