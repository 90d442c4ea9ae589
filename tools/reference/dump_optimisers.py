"""Writes tests/data/optimisers.json: 20 steps of torch's optimisers on random gradients, in float64.

Needs torch. Run from the repository root: `python tools/reference/dump_optimisers.py`.
"""

import json
from pathlib import Path

import torch

STEPS, LENGTH = 20, 6


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    # Exact in float32; gradients of all magnitudes, one always zero.
    start = torch.randn(LENGTH, generator=generator)
    gradients = torch.randn(STEPS, LENGTH, generator=generator) * torch.tensor([1.0, 1e-2, 1e-4, 1e-6, 0.0, 10.0])
    made = {
        "adamw": lambda p: torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop([p], lr=0.1, alpha=0.99, eps=1e-8, momentum=0.5),
        "nesterov": lambda p: torch.optim.SGD([p], lr=0.05, momentum=0.9, nesterov=True),
    }
    out = {"torch": torch.__version__.split("+")[0], "start": start.double().tolist(), "gradients": gradients.double().tolist()}
    for name, make in made.items():
        p = start.double().clone().requires_grad_()
        optimiser = make(p)
        trace = []
        for gradient in gradients.double():
            p.grad = gradient.clone()
            optimiser.step()
            trace.append(p.tolist())
        out[name] = trace
    Path("tests/data/optimisers.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
