"""The methods of the study. A method's name is what `rarebit` is called with: its first word says the method, `key=value` is `--key value`.

    mp lr=0.01 t-lo=0.5       rarebit minority --lr 0.01 --t-lo 0.5
    null a circle             rarebit generate --negative "a circle"

Guidance 4 and 50 steps unless the name says otherwise; `plain` and `defaults` are `rarebit generate` and `rarebit minority` as a
user gives them, without a flag.
"""

START = {
    "plain": ["generate"],
    "defaults": ["minority"],
    "ddim": ["generate"],
    "mp": ["minority"],
    "repulsion": ["minority", "--objective", "repulsion"],
    "both": ["minority", "--objective", "minority,repulsion"],
    "cads": ["generate", "--cads"],
    "sgms": ["generate", "--sgms"],
    "best": ["generate", "--best-of"],
}


# Neither guidance nor steps are given.
WITHOUT_FLAGS = ["plain", "defaults"]


def words(method: str) -> list[str]:
    """The arguments of a method, from its name."""
    first, *rest = method.split()
    if first == "null":
        return ["generate", "--negative", " ".join(rest)]
    out = list(START[first])
    for part in rest:
        key, equals, value = part.partition("=")
        # `mp lr=1` is a flag with a value, `sgms 5` the value of the method's own flag, `mp after` a flag alone.
        prefix = "cads-" if first == "cads" else "sgms-" if first == "sgms" else ""
        prefix = "" if key == "guidance" else prefix
        out += [f"--{prefix}{key}={value}"] if equals else [key] if key[0].isdigit() else [f"--{prefix}{key}"]
    return out


def plain(method: str) -> str:
    """What a method is compared with: DDIM at the study's guidance, or, of another guidance, DDIM at that one. Less guidance is itself a way
    to rarer images and is compared with the study's."""
    first, *rest = method.split()
    if first in WITHOUT_FLAGS:
        return "plain"
    guidance = [part for part in rest if part.startswith("guidance=")]
    return " ".join(["ddim", *guidance]) if guidance and first != "ddim" else "ddim"


# What is reported, by what the tuning captions showed: MinorityPrompt at the learning rate that gives the least log-density within 2
# points of DDIM's agreement, and a stronger one; the same tokens without optimisation; CADS by the same rule, and stronger.
GATES = "t-lo=0.5 t-hi=0.86 tokens=16 every=2"
CHOSEN = {
    "tune": ["ddim", "mp"],
    "tune-again": ["ddim", "mp"],
    "report": [
        "ddim",
        f"mp lr=5e-4 {GATES} iterations=5 init=word:a",
        f"mp lr=1.6e-3 {GATES} iterations=5 init=word:a",
        f"mp lr=0 {GATES} iterations=1 init=word:a",
        "cads times=0.3,0.75",
        "cads times=0.35,0.7",
        "ddim guidance=1.5",
        "sgms 0.4",
        "null a flat circle on a flat background",
        "best 4 by=elbo",
        "ddim guidance=7.5",
        f"mp guidance=7.5 lr=3e-4 {GATES} iterations=5 init=word:a",
    ],
    "defaults": ["plain", "defaults"],
    "batch-tune": ["ddim"],
    "batch-report": [
        "ddim",
        f"both lr=2.5e-4 {GATES} iterations=5 init=word:a",
        f"repulsion lr=3e-4 {GATES} iterations=5 init=word:a",
    ],
}
