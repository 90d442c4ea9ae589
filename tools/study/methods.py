"""The methods of the study. A method's name is what `rarebit` is called with: its first word says the method, `key=value` is `--key value`.

    mp lr=0.01 t-lo=0.5       rarebit minority --lr 0.01 --t-lo 0.5
    null a circle             rarebit generate --negative "a circle"

Guidance 4 and 50 steps unless the name says otherwise.
"""

START = {
    "ddim": ["generate"],
    "mp": ["minority"],
    "repulsion": ["minority", "--objective", "repulsion"],
    "cads": ["generate", "--cads"],
    "sgms": ["generate", "--sgms"],
    "best": ["generate", "--best-of"],
}


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


# What is reported, by what the tuning captions showed: two strengths of MinorityPrompt and of CADS.
# A negative decay makes the learning rate grow from step to step.
RAMP = "lr=1e-5 lr-decay=-20 t-lo=0.4 every=2 iterations=4 init=word:a"
SOFT = RAMP.replace("1e-5", "4e-6")
CHOSEN = {
    "tune": ["ddim", "mp"],
    "report": [
        "ddim",
        f"mp {RAMP}",
        "mp lr=4.5e-3 t-lo=0.5 every=2 iterations=5 init=word:a",
        "ddim guidance=1.5",
        "cads times=0.3,0.7",
        "cads times=0.3,0.8",
        "sgms 0.4",
        "null a flat circle on a flat background",
    ],
    "batch-tune": ["ddim", f"repulsion {RAMP}", f"repulsion {SOFT}"],
    "batch-report": ["ddim", f"repulsion {RAMP}", f"repulsion {SOFT}"],
}
