"""The attribute reader: a convolutional network from pixels to one distribution per attribute of the `shapes` world."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import world

CONFIG = {
    "_class_name": "AttributeReader", "sample_size": world.IMAGE_SIZE, "in_channels": 3, "block_out_channels": [16, 48, 96, 128],
    "norm_num_groups": 8, "squeeze_channels": 32, "hidden_size": 256, "attributes": list(world.NAMES),
}  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class AttributeReader(nn.Module):
    """`[n, 3, 64, 64]` in [-1, 1] -> ten logit tensors `[n, values]`."""

    def __init__(self):
        super().__init__()
        widths, groups = CONFIG["block_out_channels"], CONFIG["norm_num_groups"]
        squeeze, hidden = CONFIG["squeeze_channels"], CONFIG["hidden_size"]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(_Residual(width, groups) for width in widths)
        self.downsamplers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.norm_out, self.conv_out = nn.GroupNorm(groups, widths[-1]), nn.Conv2d(widths[-1], squeeze, 1)
        self.hidden = nn.Conv2d(squeeze, hidden, world.IMAGE_SIZE >> (len(widths) - 1))
        self.hidden_norm = nn.GroupNorm(groups, hidden)
        self.heads = nn.ModuleDict({a.name: nn.Linear(hidden, len(a.values)) for a in world.ATTRIBUTES})

    def forward(self, x):
        x = self.conv_in(x)
        for block, down in zip(self.blocks, [*self.downsamplers, None]):
            x = block(x)
            x = down(x) if down is not None else x
        x = self.hidden(self.conv_out(F.silu(self.norm_out(x))))
        x = F.silu(self.hidden_norm(x)).flatten(1)
        return [head(x) for head in self.heads.values()]

    @torch.no_grad()
    def read(self, x):
        """`[n, 3, 64, 64]` -> cells `[n, 10]`, the most probable value of each attribute."""
        return torch.stack([logits.argmax(1) for logits in self(x)], 1)


def save(reader: AttributeReader, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in reader.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def note_reference(folder: Path, reference: dict) -> None:
    """What the reader reads on reconstructions of real images, kept beside it: every report of its readings shows it."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"reference": reference}, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> AttributeReader:
    reader = AttributeReader()
    reader.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return reader.eval()
