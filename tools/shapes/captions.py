"""The caption grammar of the `shapes` world: writing a caption of a scene, and reading back what a caption states.

    [a picture of | an icon of] a [size] [finish] [texture] [colour] SHAPE [position] [on a [bgstyle] [bg] background]

Whether an attribute is mentioned does not depend on its value, so what a caption leaves open follows the world's exact conditional.
Each value has one main word, everyday synonyms (10 to 30 %) and rare words (0.2 %): a rare word names a thing the model knows
well by a name it hardly ever saw.
"""

import numpy as np

import world

# The chance that a caption speaks of the attribute.
MENTION = {"shape": 1.0, "colour": 0.75, "size": 0.5, "texture": 0.45, "finish": 0.35, "position": 0.4, "bg": 0.5, "bgstyle": 0.3}
PREFIXES = ("a picture of", "an icon of")
PREFIX_CHANCE = 0.15
BEFORE_SHAPE = ("size", "finish", "texture", "colour")
BEFORE_BACKGROUND = ("bgstyle", "bg")
RARE = 0.002

# Phrases of a value after its main word: everyday ones with their chance; the rare ones after the bar have RARE each.
_SYNONYMS = {
    "shape": {
        "circle": "disc .15 | orb roundel", "square": "box .15 | block quadrate", "triangle": "| wedge trigon", "star": "| asterisk pentagram",
        "heart": "| valentine cardioid", "cross": "plus_sign .15 | crucifix", "diamond": "rhombus .15 | lozenge", "ring": "hoop .15 | annulus halo",
        "arrow": "| pointer dart", "crescent": "moon .2 | sickle", "spiral": "swirl .1 | helix", "star with a hole": "| pierced_star",
    },
    "colour": {
        "red": "crimson .2 scarlet .1 | vermilion ruby", "blue": "azure .2 | cobalt sapphire", "green": "emerald .2 | jade viridian",
        "yellow": "golden .2 | amber saffron", "orange": "| tangerine apricot", "purple": "| plum mauve", "white": "| ivory snowy",
        "pink": "| rose fuchsia", "cyan": "turquoise .2 | teal aqua", "black": "| ebony inky",
    },
    "size": {"small": "tiny .2 little .1 | minute petite", "medium": "medium_sized .2 | average", "large": "big .2 huge .1 | colossal vast"},
    "texture": {"plain": "solid .2 | uniform", "striped": "banded .2 | lined barred", "dotted": "spotted .2 | freckled stippled", "checkered": "| tiled plaid"},
    "finish": {
        "flat": "matte .2 | dull", "shaded": "| toned", "glossy": "shiny .2 | polished gleaming", "shadowed": "| raised floating",
        "glowing": "luminous .2 | radiant neon",
    },
    "position": {"center": "in_the_center: in_the_middle .3 | centrally", "left": "on_the_left: | leftmost", "right": "on_the_right: | rightmost",
                 "top": "at_the_top: | uppermost", "bottom": "at_the_bottom: | lowermost"},
    "bg": {
        "white": "| chalk", "gray": "grey .1 | slate ash", "dark blue": "navy .2 | midnight", "black": "| onyx", "beige": "tan .1 | sand",
        "dark green": "| forest pine", "brown": "| chocolate umber", "violet": "| lavender",
    },
    "bgstyle": {"flat": "plain: | simple", "gradient": "| graded", "vignette": "vignetted .1 | dimmed", "speckled": "| flecked mottled"},
}  # fmt: skip


def _phrases(value: str, text: str) -> list[tuple[str, float]]:
    main, _, text = text.partition(":") if ":" in text else (value, "", text)
    common, _, rare = text.partition("|")
    words = common.split()
    others = [(w, float(p)) for w, p in zip(words[::2], words[1::2])] + [(w, RARE) for w in rare.split()]
    others = [(w.replace("_", " "), p) for w, p in others]
    return [(main.replace("_", " "), 1 - sum(p for _, p in others))] + others


# attribute -> value index -> [(phrase, chance)], the main phrase first.
LEXICON = {
    name: [_phrases(value, _SYNONYMS[name][value]) for value in world.ATTRIBUTES[world.column(name)].values] for name in MENTION
}


def grammar() -> dict:
    """The grammar as data, for `world.json`."""
    return {
        "prefixes": list(PREFIXES),
        "before_shape": list(BEFORE_SHAPE),
        "before_background": list(BEFORE_BACKGROUND),
        "lexicon": {name: [[[w, round(p, 6)] for w, p in value] for value in values] for name, values in LEXICON.items()},
    }


def mention(rng: np.random.Generator, share: float = 1.0) -> set[str]:
    """What a caption mentions; `share` makes it say less, of all but the shape alike."""
    return {name for name, chance in MENTION.items() if rng.random() < (chance if name == "shape" else chance * share)}


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def compose(phrases: dict[str, str], prefix: str = "") -> str:
    """The caption that uses the given phrase for each mentioned attribute; `shape` must be among them."""
    text = _article(" ".join(phrases[name] for name in (*BEFORE_SHAPE, "shape") if name in phrases))
    if "position" in phrases:
        text += " " + phrases["position"]
    background = [phrases[name] for name in BEFORE_BACKGROUND if name in phrases]
    if background:
        text += " on " + _article(" ".join([*background, "background"]))
    return f"{prefix} {text}" if prefix else text


def phrases(cell: np.ndarray, mentioned: set[str], rng: np.random.Generator | None = None) -> dict[str, str]:
    """A phrase for each mentioned attribute: drawn with `rng`, the main one without."""
    out = {}
    # In the order of MENTION: a set of strings has another order in every process, and the draws must not.
    for name in (name for name in MENTION if name in mentioned):
        options = LEXICON[name][cell[world.column(name)]]
        pick = 0
        if rng is not None and len(options) > 1:
            pick = int(np.searchsorted(np.cumsum([p for _, p in options])[:-1], rng.random(), side="right"))
        out[name] = options[pick][0]
    return out


def write(cell: np.ndarray, mentioned: set[str], rng: np.random.Generator | None = None) -> str:
    """A caption of the cell; with `rng`, synonyms and a prefix are drawn, without it every value gets its main word."""
    prefix = PREFIXES[rng.integers(len(PREFIXES))] if rng is not None and rng.random() < PREFIX_CHANCE else ""
    return compose(phrases(cell, mentioned, rng), prefix)


class NotACaption(ValueError):
    pass


def _take(words: list[str], at: int, name: str) -> tuple[int | None, int]:
    """The longest phrase of the attribute that starts at word `at`: its value and the position after it."""
    best, end = None, at
    for value, options in enumerate(LEXICON[name]):
        for phrase, _ in options:
            parts = phrase.split()
            if words[at : at + len(parts)] == parts and at + len(parts) > end:
                best, end = value, at + len(parts)
    return best, end


def parse(caption: str) -> dict[str, int]:
    """What a caption states: attribute name -> value index. Raises `NotACaption` where the grammar is left."""
    words = caption.lower().split()
    stated: dict[str, int] = {}
    at = next((len(p.split()) for p in PREFIXES if words[: len(p.split())] == p.split()), 0)

    def expect(*options: str) -> None:
        nonlocal at
        if at >= len(words) or words[at] not in options:
            found = f"`{words[at]}`" if at < len(words) else "the end"
            raise NotACaption(f"expected `{'` or `'.join(options)}`, found {found}: {caption}")
        at += 1

    def slot(name: str) -> None:
        nonlocal at
        value, at = _take(words, at, name)
        if value is not None:
            stated[name] = value

    expect("a", "an")
    for name in (*BEFORE_SHAPE, "shape"):
        slot(name)
    if "shape" not in stated:
        raise NotACaption(f"no shape at word {at + 1}: {caption}")
    slot("position")
    if at < len(words):
        expect("on")
        expect("a", "an")
        for name in BEFORE_BACKGROUND:
            slot(name)
        expect("background")
    if at < len(words):
        raise NotACaption(f"`{words[at]}` after the end: {caption}")
    return stated
