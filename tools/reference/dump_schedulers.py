"""Writes tests/data/schedulers.json: where the diffusers schedulers end under an analytic stand-in for the network.

Needs numpy, torch and diffusers 0.42. Run from the repository root: `python tools/reference/dump_schedulers.py`.
Everything is deterministic: initial latents, ancestral noise and both guidance branches are closed formulas, which
tests/models/sampler.rs repeats in f64. Cases marked `wide` start where latents are scaled by thousands; there the f32 rounding of
diffusers' own steps drowns the comparison, so its steps run in f64 over its f32 tables.
"""

import itertools
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

SIZE = 16
FLOAT32 = torch.float32
STEPS = [1, 2, 5, 10, 20]
SPACINGS = ["leading", "linspace", "trailing"]
PREDICTIONS = {
    "ddim": ["epsilon", "v_prediction", "sample"],
    "euler": ["epsilon", "v_prediction", "sample"],
    "euler-a": ["epsilon", "v_prediction"],
    "dpmpp-2m": ["epsilon", "v_prediction", "sample"],
    "dpmpp-2m-karras": ["epsilon", "v_prediction", "sample"],
    "pndm": ["epsilon", "v_prediction"],
}
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp-2m-karras": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def unit_noise(draw: int) -> torch.Tensor:
    """Draw 0 is the initial noise, draw k + 1 belongs to step k."""
    return torch.tensor([1.5 * math.sin(1.0 + 1.7 * i + 12.9898 * draw) for i in range(SIZE)], dtype=FLOAT32)


def cond(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x) + 0.1 * math.sin(t / 100)


def uncond(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.5 * x) - 0.1 * math.cos(t / 100)


def make(case: dict):
    method = case["method"]
    config = {k: case[k] for k in ("beta_schedule", "beta_start", "beta_end", "steps_offset")}
    config["prediction_type"] = case["prediction"]
    config["timestep_spacing"] = case["spacing"]
    if method == "ddim":
        config["clip_sample"] = False
    if method == "pndm":
        config["skip_prk_steps"] = True
    if method in ("ddim", "pndm"):
        config["set_alpha_to_one"] = case.get("set_alpha_to_one", False)
    if case.get("rescale_zero_snr"):
        config["rescale_betas_zero_snr"] = True
    if method == "dpmpp-2m-karras" or case.get("karras"):
        config["use_karras_sigmas"] = True
    return CLASSES[method](**config)


def cfg_pp_step(scheduler, e: torch.Tensor, e_u: torch.Tensor, t: int, x: torch.Tensor, stride: int) -> torch.Tensor:
    """DDIM with the clean image from the guided prediction and the noise from the unconditional one (arXiv 2406.08070)."""
    _, x0 = scheduler.step(e, t, x, return_dict=False)
    a = scheduler.alphas_cumprod[t]
    back = scheduler.alphas_cumprod[t - stride] if t >= stride else scheduler.final_alpha_cumprod
    eps = {"epsilon": e_u, "v_prediction": a**0.5 * e_u + (1 - a) ** 0.5 * x}[scheduler.config.prediction_type]
    return back**0.5 * x0 + (1 - back) ** 0.5 * eps


def widen(scheduler) -> None:
    """Makes every later step compute in f64."""
    torch.float32 = torch.float64
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def run(case: dict) -> dict:
    scheduler = make(case)
    scheduler.set_timesteps(case["steps"])
    if hasattr(scheduler, "set_begin_index"):
        # Left to itself it looks the first timestep up, and skips a level where Karras levels round to the same timestep.
        scheduler.set_begin_index(0)
    x = unit_noise(0)
    if case.get("wide"):
        widen(scheduler)
        x = x.double()
    x = x * scheduler.init_noise_sigma
    weight, draw = case.get("guidance", 1.0), 0
    for t in scheduler.timesteps:
        draw += 1
        noise = unit_noise(draw)
        ancestral.randn_tensor = lambda *_, **__: noise
        model_input = scheduler.scale_model_input(x, t)
        e_c, e_u = cond(model_input, float(t)), uncond(model_input, float(t))
        e = e_u + weight * (e_c - e_u) if weight != 1.0 or case.get("cfg_pp") else e_c
        if case.get("cfg_pp"):
            x = cfg_pp_step(scheduler, e, e_u, int(t), x, 1000 // case["steps"])
        elif case.get("eta"):
            x = scheduler.step(e, t, x, eta=case["eta"], variance_noise=noise).prev_sample
        else:
            x = scheduler.step(e, t, x).prev_sample
    torch.float32 = FLOAT32
    timesteps = [float(t) for t in scheduler.timesteps]
    latents = [float(f"{v:.8g}") for v in x.tolist()]
    assert all(math.isfinite(v) for v in latents), case
    return {**case, "timesteps": [int(t) if t == int(t) else t for t in timesteps], "latents": latents}


def grid() -> list[dict]:
    """Every sampler, spacing, prediction and step count on Stable Diffusion's schedule."""
    cases = []
    for method, predictions in PREDICTIONS.items():
        for prediction, spacing, steps in itertools.product(predictions, SPACINGS, STEPS):
            cases.append({"method": method, "prediction": prediction, "spacing": spacing, "steps": steps, **STABLE_DIFFUSION})
    return cases


def extras() -> list[dict]:
    """Other beta schedules, ends, guidance, noise and long schedules, away from the grid."""
    linear = {**STABLE_DIFFUSION, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 0}
    cosine = {**STABLE_DIFFUSION, "beta_schedule": "squaredcos_cap_v2", "steps_offset": 0, "wide": True}
    zero_snr = {**STABLE_DIFFUSION, "rescale_zero_snr": True, "prediction": "v_prediction", "spacing": "trailing", "wide": True}
    cases = []
    for method in PREDICTIONS:
        base = {"method": method, "prediction": "epsilon", "spacing": "leading", "steps": 10}
        cases += [{**base, **linear}, {**base, **cosine, "prediction": "v_prediction"}]
        cases += [{**base, **cosine, "prediction": "v_prediction", "spacing": "linspace", "steps": 7}]
        cases += [{**base, **STABLE_DIFFUSION, "steps": steps} for steps in (3, 4, 15, 50)]
        cases += [{**base, **STABLE_DIFFUSION, "guidance": weight} for weight in (0.0, 7.5)]
        cases += [{**base, **STABLE_DIFFUSION, "guidance": 3.0, "prediction": "v_prediction"}]
        if method != "pndm":
            cases += [{**base, **zero_snr, "steps": steps} for steps in (1, 5, 20)]
    for method, spacing in itertools.product(["ddim", "pndm"], SPACINGS):
        base = {"method": method, "prediction": "epsilon", "spacing": spacing, "steps": 10, **STABLE_DIFFUSION}
        cases += [{**base, "set_alpha_to_one": True}]
    for eta, prediction, spacing in itertools.product((0.3, 1.0), ("epsilon", "v_prediction"), SPACINGS):
        base = {"method": "ddim", "prediction": prediction, "spacing": spacing, "steps": 10, **STABLE_DIFFUSION}
        cases += [{**base, "eta": eta}]
    for weight, prediction in itertools.product((0.4, 1.0), ("epsilon", "v_prediction")):
        base = {"method": "ddim", "prediction": prediction, "spacing": "leading", "steps": 10, **STABLE_DIFFUSION}
        cases += [{**base, "guidance": weight, "cfg_pp": True}]
    for spacing, steps in itertools.product(SPACINGS, (2, 10, 20)):
        base = {"method": "euler", "prediction": "epsilon", "spacing": spacing, "steps": steps, **STABLE_DIFFUSION}
        cases += [{**base, "karras": True}]
    cases += [{"method": "dpmpp-2m-karras", "prediction": "v_prediction", "spacing": "linspace", "steps": 20, **cosine}]
    return cases


def checksums() -> list[dict]:
    """Timesteps of many step counts: the sum of (i + 1) times the f32 bits of timestep i, modulo 2^31 - 1, for 1, 2, 3 … steps."""
    rows = []
    for method, spacing in itertools.product(["ddim", "euler", "dpmpp-2m", "pndm"], SPACINGS):
        scheduler = make({"method": method, "prediction": "epsilon", "spacing": spacing, **STABLE_DIFFUSION})
        sums = []
        for steps in range(1, 257):
            scheduler.set_timesteps(steps)
            # "trailing" with 61, 103, 121 … steps gets a surplus timestep of -1 from the rounding of numpy.arange.
            calls = steps + (method == "pndm" and steps > 1)
            bits = scheduler.timesteps.numpy()[:calls].astype(np.float32).view(np.uint32)
            sums.append(sum((i + 1) * int(b) for i, b in enumerate(bits)) % (2**31 - 1))
        rows.append({"method": method, "spacing": spacing, "sums": sums})
    return rows


def main() -> None:
    lines = [json.dumps(run(case), separators=(",", ":")) for case in grid() + extras()]
    rows = [json.dumps(row, separators=(",", ":")) for row in checksums()]
    text = '{"diffusers":"%s","cases":[\n%s\n],"checksums":[\n%s\n]}\n'
    Path("tests/data/schedulers.json").write_text(text % (diffusers.__version__, ",\n".join(lines), ",\n".join(rows)))
    print(len(lines), "cases")


if __name__ == "__main__":
    main()
