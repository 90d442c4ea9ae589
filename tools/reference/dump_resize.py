"""Writes tests/data/resize.safetensors: what `torch.nn.functional.interpolate` makes of small images, and its gradients.

Needs torch. Run from the repository root: `python tools/reference/dump_resize.py`. Computed in float64: torch computes where a
pixel lies in the type of the image, which in float32 moves weights by more than our tolerance. All tensors `[B, H, W, C]`.
"""

import torch
from safetensors.torch import save_file

BATCH, CHANNELS = 1, 2
# Height and width before and after: down, up, mixed, one pixel, far down, and the factor of 512 to 224.
SIZES = [((5, 7), (3, 4)), ((4, 6), (9, 11)), ((3, 8), (7, 5)), ((1, 1), (4, 3)), ((9, 13), (1, 2)), ((16, 18), (7, 8)), ((6, 5), (6, 5))]


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(height: int, width: int) -> torch.Tensor:
        # Exact in float32.
        return (torch.rand(BATCH, height, width, CHANNELS, generator=generator) * 2 - 1).double()

    tensors = {}
    for before, after in SIZES:
        case = "{}x{}-{}x{}".format(*before, *after)
        x, d_y = noise(*before), noise(*after)
        tensors[f"{case}/x"], tensors[f"{case}/d_y"] = x, d_y
        for mode in ["bilinear", "bicubic"]:
            for antialias in [False, True]:
                leaf = x.permute(0, 3, 1, 2).clone().requires_grad_()
                y = torch.nn.functional.interpolate(leaf, size=after, mode=mode, antialias=antialias)
                y.backward(d_y.permute(0, 3, 1, 2))
                name = f"{case}/{mode}{' antialias' if antialias else ''}"
                tensors[f"{name}/y"] = y.detach().permute(0, 2, 3, 1).contiguous()
                tensors[f"{name}/d_x"] = leaf.grad.permute(0, 2, 3, 1).contiguous()
    save_file(tensors, "tests/data/resize.safetensors")


if __name__ == "__main__":
    main()
