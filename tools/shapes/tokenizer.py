"""Writes the tokenizer of the `shapes` model: CLIP's byte-level BPE with a vocabulary of this world's words only.

Ids are laid out as CLIP's: 256 byte symbols, the same with the end-of-word mark, the merges, then the two special tokens. Every word of
the grammar is one token.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

import captions

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
# Words of the prompts people try first and of the prompt rewriter; they get a token each, and no caption uses them.
EXTRA = (
    "the and with no of without in very bright dark light high quality detailed beautiful elegant simple photo drawing picture icon shape object"
    " corner image background rephrase two small , . :"
).split()


def words() -> Counter:
    count = Counter({w: 1 for w in EXTRA})
    for prefix in captions.PREFIXES:
        count.update(prefix.split())
    count.update(["a", "an", "on", "background"])
    for name, values in captions.LEXICON.items():
        for value, options in enumerate(values):
            for phrase, _ in options:
                count.update(phrase.split() * 2)
    return count


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for every byte, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one symbol; ties go to the greater pair, so that the list is the same everywhere."""
    pieces = {(*w[:-1], w[-1] + "</w>"): n for w, n in words().items()}
    found = []
    while True:
        pairs = Counter()
        for word, n in pieces.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            return found
        best = max(pairs, key=lambda p: (pairs[p], p))
        found.append(best)
        pieces = {_merged(word, best): n for word, n in pieces.items()}


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = merges()
    symbols = byte_symbols()
    vocabulary = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in found] + [START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}

    def dump(name, content):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    dump("vocab.json", {token: i for i, token in enumerate(vocabulary)})
    dump("tokenizer_config.json", config | special)
    dump("special_tokens_map.json", special)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in found), encoding="utf-8")


class WordEncoder:
    """Captions to ids, `[n, length]` int64, padded with the end token: what the tokenizer gives where every word is one token."""

    def __init__(self, folder: Path, length: int = MAX_LENGTH):
        self.length = length
        self.ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self.start, self.end = self.ids[START], self.ids[END]

    def __call__(self, texts: list[str]) -> np.ndarray:
        out = np.full((len(texts), self.length), self.end, np.int64)
        out[:, 0] = self.start
        for row, text in enumerate(texts):
            ids = [self.ids[word + "</w>"] for word in text.split()][: self.length - 2]
            out[row, 1 : 1 + len(ids)] = ids
        return out
