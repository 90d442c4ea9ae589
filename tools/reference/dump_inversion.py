"""Writes tests/data/inversion: DDIM inversions of latents on the tiny pipelines, written with diffusers' networks and schedulers.

    python dump_inversion.py

A step of `DDIMScheduler` is linear in latents and prediction, y = u x + v e, with u and v from the scheduler itself. The inversion goes
through its timesteps backwards and solves each step for x, e being asked at y with the timestep of x, in float64. Where the model predicts
epsilon, `DDIMInverseScheduler` must end at the same noise. `refined` solves each step again, REFINEMENTS times, with e at the x found.
"""

import os

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch.linalg import vector_norm

import dump
import minority

FOLDER = os.path.join(minority.DATA, "inversion")
PROMPTS, STEPS, REFINEMENTS = [dump.PROMPT, dump.NEGATIVE], 10, 2
SEEDS = {"tiny-sd1": 11, "tiny-sd2": 12, "tiny-sdxl": 13}


def coefficients(ddim, t):
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return ddim.step(zero, t, one).prev_sample, ddim.step(one, t, zero).prev_sample


def invert(ddim, predict, x, refinements):
    for t in reversed(ddim.timesteps.tolist()):
        y, (u, v) = x, coefficients(ddim, t)
        for _ in range(1 + refinements):
            x = (y - v * predict(x, t)) / u
    return x


def invert_by_diffusers(ddim, predict, x):
    inverse = DDIMInverseScheduler.from_config(ddim.config)
    inverse.set_timesteps(STEPS)
    for t in inverse.timesteps.tolist():
        x = inverse.step(predict(x, t), t, x).prev_sample
    return x


def case(name, seed):
    model = minority.Model(name, torch.float64)
    condition = model.encode(PROMPTS)
    ddim = DDIMScheduler.from_config(model.pipe.scheduler.config, timestep_spacing="leading")
    ddim.set_timesteps(STEPS)
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    side = model.pipe.unet.config.sample_size
    latents = dump.normal(seed, len(PROMPTS), 4, side, side).double() * 0.8

    def predict(x, t):
        return model.unet(x, t, condition)

    noises = {"noise": invert(ddim, predict, latents, 0), "refined": invert(ddim, predict, latents, REFINEMENTS)}
    if ddim.config.prediction_type == "epsilon":
        apart = vector_norm(invert_by_diffusers(ddim, predict, latents) - noises["noise"]) / vector_norm(noises["noise"])
        assert apart < 1e-6, apart
    return {"latents": latents} | noises


def main():
    os.makedirs(FOLDER, exist_ok=True)
    tensors, cases = {}, []
    with torch.no_grad():
        for name, seed in SEEDS.items():
            found = case(name, seed)
            assert all(t.isfinite().all() for t in found.values())
            tensors |= {f"{name}/{key}": value.float().contiguous() for key, value in found.items()}
            cases.append({"name": name, "prompts": PROMPTS, "steps": STEPS, "spacing": "leading", "guidance": 1.0, "refinements": REFINEMENTS})
            print(name, {key: f"{vector_norm(value):.4g}" for key, value in found.items()})
    dump.write(FOLDER, tensors, cases)


if __name__ == "__main__":
    main()
