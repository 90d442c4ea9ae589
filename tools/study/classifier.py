"""A small classifier of images, trained from nothing on few real images and some generated ones."""

import numpy as np
import torch
from torch import nn

STEPS = 200
# Images of a class in every batch; where a class has generated images, half of these are.
PER_CLASS = 4
RATE = 2e-3
DECAY = 0.02
# What an image may be moved, pixels, and brightened, of the range of 1, before it is seen. Nothing is flipped: what is left is part of a class.
SHIFT = 4
BRIGHTNESS = 0.1
# Of one core (a Zen 5 that others use too), per image of a batch and step: for estimates.
SECONDS = 1.3e-3


def one_thread() -> None:
    """As much of the machine as a training takes."""
    torch.set_num_threads(1)


def seconds(classes: int) -> float:
    """Of one core, for a training."""
    return SECONDS * STEPS * PER_CLASS * classes


def network(classes: int) -> nn.Sequential:
    """`[n, 3, 64, 64]` in [-1, 1] -> logits `[n, classes]`. The last layer sees a map of 4 x 4: it can tell where a thing stands."""
    layers = []
    for wide, out in ((3, 32), (32, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(wide, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, classes))


def tensor(images: np.ndarray) -> torch.Tensor:
    """`[n, 64, 64, 3]` of bytes -> `[n, 3, 64, 64]` in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def augment(images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Each image moved, its edge repeated, and brightened on its own."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    corners = rng.integers(0, 2 * SHIFT + 1, (len(images), 2))
    moved = np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, corners)])
    brighter = torch.from_numpy(rng.uniform(-2 * BRIGHTNESS, 2 * BRIGHTNESS, (len(images), 1, 1, 1)).astype(np.float32))
    return (tensor(moved) + brighter).clamp(-1, 1)


def draw(real: np.ndarray, made: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The images of a class in a batch."""
    generated = PER_CLASS // 2 if len(made) else 0
    parts = [real[rng.integers(len(real), size=PER_CLASS - generated)]]
    if generated:
        parts.append(made[rng.integers(len(made), size=generated)])
    return np.concatenate(parts)


def train(real: list[np.ndarray], made: list[np.ndarray], seed: int) -> nn.Sequential:
    """A classifier of as many classes as there are lists of images, `[n, 64, 64, 3]` of bytes each. Whatever their numbers, every class has the
    same part in every batch, and its generated images together weigh as much as its real ones."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = network(len(real))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    labels = torch.arange(len(real)).repeat_interleave(PER_CLASS)
    for _ in range(STEPS):
        batch = np.concatenate([draw(*images, rng) for images in zip(real, made)])
        loss = nn.functional.cross_entropy(model(augment(batch, rng)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Sequential, images: list[np.ndarray]) -> list[float]:
    """The share of the images of each class that is called by its name."""
    return [float((model(tensor(of)).argmax(1) == label).float().mean()) for label, of in enumerate(images)]
