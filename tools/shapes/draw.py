"""Writes real images of the world as PNG files, each with its caption where `rarebit score --shapes` looks for it.

    python tools/shapes/draw.py FOLDER --count 100                        scenes of the world, a caption each
    python tools/shapes/draw.py FOLDER --count 5 --prompt "a spiral"      scenes that a caption describes, exactly as frequent as in the world
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import captions
import render
import world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uniform", action="store_true", help="every possible value of an attribute as often as any other")
    parser.add_argument("--prompt", help="a caption of the world that all images fit")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.prompt:
        try:
            conditional = world.Conditional(captions.parse(args.prompt))
        except captions.NotACaption as error:
            parser.error(f"--prompt: {error}")
        except world.Impossible:
            parser.error(f"--prompt: the world holds nothing of the kind: {args.prompt}")
        cells = conditional.sample(rng, args.count)
    else:
        cells = world.sample(rng, args.count, uniform=args.uniform)
    images = render.render(cells, render.sample_nuisances(rng, args.count))
    args.folder.mkdir(parents=True, exist_ok=True)
    for i, (cell, image) in enumerate(zip(cells, images)):
        note = PngInfo()
        note.add_text("parameters", args.prompt or captions.write(cell, captions.mention(rng), rng))
        Image.fromarray(image).save(args.folder / f"{i:05}.png", pnginfo=note)


if __name__ == "__main__":
    main()
