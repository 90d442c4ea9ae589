"""Writes tests/data/shapes/reader.safetensors: scenes, their attributes, and the reader's logits as PyTorch computes them.

    python tools/shapes/golden.py        (after build.py; tools/reference/dump.py makes the other golden files of the model)

`scenes [n, 64, 64, 3]` u8, attribute-uniform; `cells [n, 10]` i64; `logits [n, 56]` f32, the heads side by side, in f32 from the
shipped f16 weights.
"""

import numpy as np
import torch
from safetensors.torch import save_file

import build
import reader
import trainer
from train_vae import scenes

SEED, SCENES = 9100, 32


@torch.no_grad()
def main() -> None:
    cells, images = scenes(np.random.default_rng(SEED), SCENES, uniform=True)
    logits = torch.cat(reader.load(build.EMBEDDED / "reader")(trainer.pixels(images)), 1)
    tensors = {"scenes": torch.from_numpy(images), "cells": torch.from_numpy(cells), "logits": logits}
    save_file(tensors, build.ROOT / "tests" / "data" / "shapes" / "reader.safetensors")


if __name__ == "__main__":
    main()
