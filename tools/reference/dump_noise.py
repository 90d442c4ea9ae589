"""Writes tests/data/noise.json: what `torch.randn` with a CPU generator gives, as an FNV-1a hash of the bits and a few values.

Needs torch. Run from the repository root: `python tools/reference/dump_noise.py`. The hashes hold for x86-64 with AVX2.
"""

import json
from pathlib import Path

import torch

SEEDS = [0, 1, 42, 4294967295, 4294967301, 123456789012345]
# Each list is one generator, drawn from in order: lengths below 16, multiples of 16, and neither, alone and mixed.
DRAWS = [[1], [5], [15], [16], [17], [100], [16384], [65536], [5, 5, 5], [3, 16, 3, 17, 1], [16384, 16384], [1000, 7, 1000, 7]]


def fnv1a(data: bytes) -> str:
    state = 0xCBF29CE484222325
    for byte in data:
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{state:016x}"


def main() -> None:
    cases = []
    for seed in SEEDS:
        for draws in DRAWS:
            generator = torch.Generator("cpu").manual_seed(seed)
            values = torch.cat([torch.randn(n, generator=generator) for n in draws]).numpy()
            head = [int(bits) for bits in values[:4].view("uint32")]
            cases.append({"seed": seed, "draws": draws, "hash": fnv1a(values.astype("<f4").tobytes()), "head": head})
    out = {"torch": torch.__version__.split("+")[0], "cases": cases}
    text = json.dumps(out, separators=(",", ":")).replace('{"seed"', '\n{"seed"') + "\n"
    Path("tests/data/noise.json").write_text(text)


if __name__ == "__main__":
    main()
