"""Writes tests/data/clip_tokens.json: token ids of transformers' CLIPTokenizer for awkward prompts.

Needs transformers. Run from the repository root: `python tools/reference/dump_clip_tokens.py SHAPES [--all FILE]`, where SHAPES is
the tokenizer folder of the `shapes` model. `--all` writes every prompt instead of a selection, for a one-off comparison.
The CLIP vocabulary is rebuilt from src/assets/clip/merges.txt.gz.
"""

import argparse
import gzip
import json
import random
import tempfile
from pathlib import Path

import transformers

START, END = "<|startoftext|>", "<|endoftext|>"

# The first ones are kept in the golden file, one kind of trouble each.
AWKWARD = [
    "",
    " ",
    "\t\n",
    "a photo of an astronaut riding a horse on mars",
    "A PHOTO, in 4K; (masterpiece:1.2), [ugly], {x|y} <lora:foo:0.8>",
    "don't can't I'm we've he'll she'd they're it's DON'T I'M",
    "it’s a “quoted” — dashed… word",
    "12345 3.14 1,000,000 2nd 50mm f/1.8 ½ ² Ⅷ ٣ 四",
    "naïve café résumé Ångström ÇEDILLA ẞ straße İstanbul ǅ",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 \u1e9b\u0323 Å \u212b",
    "日本の浮世絵 北斎、富士山",
    "한국어 텍스트 안녕하세요",
    "中文提示词,一只猫",
    "Привет, мир! ЖЁЛТЫЙ",
    "مرحبا بالعالم، صورة",
    "שלום עולם",
    "नमस्ते दुनिया",
    "ภาษาไทย สวัสดี",
    "Ελληνικά ΣΊΣΥΦΟΣ ς",
    "😀 😂😂 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 👍🏽 🇩🇪",
    "<b>bold</b> &amp; &lt;tag&gt; &#39;x&#39; http://a.b/c?d=e&f=g",
    "a<|endoftext|>b <|startoftext|> <|ENDOFTEXT|> < |endoftext| >",
    "!!! wow! hey!you ! ?! !?!?",
    "....----____====####****~~~~",
    "\\(escaped\\) \\n \\\\ /path/to c:\\dir",
    "tab\there\r\nnew\nline\x0bvt\x0cff",
    "non\u00a0breaking\u2003em\u3000ideographic\u200bzero\ufeffbom\u2028ls\u2029ps\u0085nel\u180emvs",
    "nul\x00 bell\x07 esc\x1b del\x7f c1\x9b",
    "snake_case camelCase kebab-case dot.case a_b_c _ __ -",
    "a.b,c;d:e!f?g'h\"i(j)k[l]m{n}o@p#q$r%s^t&u*v+w=x|y~z`",
    "'s 't 're 've 'm 'll 'd ''s 'S s' s's 'x",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３",
    "ﬁ ﬂ ﬃ ligatures ™ © ® ℃ № ㎏",
    "𝕳𝖊𝖑𝖑𝖔 𝒲𝑜𝓇𝓁𝒹 𐐀𐐨 🂡",
    "z̸̢̛a̵l̷g̶o̴ text",
    "\u202eright to left override\u202c",
    "\ud7ff \ue000 \uf8ff \ufffd \U0010ffff",
    "cat" + " very" * 80 + " end",
    "word " * 200,
    "猫" * 120,
    "😀" * 60,
    "a, " * 100,
    "1" * 100,
    "!" * 100,
    "  leading and   multiple    spaces  trailing  ",
    "C++ C# .NET node.js 3d-render 8k_uhd iso-100",
    "a red circle to the left of a blue square on a plain background",
    "two large green triangles and one small yellow star",
    "x" * 5 + "é" * 5 + "日" * 5 + "😀" * 5,
    "masterpiece,best quality,1girl,solo,long hair,looking at viewer",
    "by greg rutkowski, trending on artstation, octane render",
    "she's the dog's' 'quoted' rock'n'roll o'clock y'all'd've",
    "10,000 m² in 1.5×10⁻³ s ≈ ∞ ± √2 ∑ ∂",
    "A\u0300\u0301\u0302\u0303 \u0300 combining first",
    "ǆ ǅ Ǆ ŉ ΐ ﬀ İ i̇ ı K Ω",
    "ʼn ‘single’ ‚low‘ «guillemets» „Gänsefüßchen“",
    "$100 €50 £20 ¥1000 ₿ ¢",
    "#hashtag @mention :smile: :-) ;) <3 ^_^ ¯\\_(ツ)_/¯",
]

PIECES = (
    "a the Photo CAT café Ünïcödé 日本 한글 😀 👨‍🚀 ❤️ don't it's ’s 'LL 42 3.5 ½ ! !! ... , ; -- _ ( ) [x] <b> &amp; \\ / | ~ \t \n \u00a0 "
    "\u200b \u0301 e\u0301 ß İ Σ ς ﬁ Ⅷ ٣ नमस्ते שלום \u202e \x00 \x7f \ufffd <|endoftext|> <|startoftext|> \U0001d573 x" + "y" * 30
).split(" ")


def prompts() -> list[str]:
    rng = random.Random(7)
    mixed = [rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(1, 24))) for _ in range(400)]
    points = [i for i in range(1, 0x110000) if not 0xD800 <= i < 0xE000]
    wild = ["".join(chr(rng.choice(points)) for _ in range(rng.randint(1, 12))) for _ in range(300)]
    low = ["".join(chr(rng.randint(1, 0x2FFF)) for _ in range(rng.randint(1, 30))) for _ in range(800)]
    return AWKWARD + mixed + wild + low


def clip_folder(folder: Path, pad: str) -> None:
    """A model's tokenizer folder with CLIP's vocabulary."""
    merges = gzip.decompress(Path("src/assets/clip/merges.txt.gz").read_bytes()).decode().split("\n")[:-1]
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    characters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = characters + [c + "</w>" for c in characters] + [m.replace(" ", "") for m in merges] + [START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def ids(tokenizer, prompt: str) -> list[int]:
    return tokenizer(prompt, padding="max_length", truncation=True)["input_ids"]


def shorten(row: list[int]) -> list[int]:
    """Without the repeated padding, which the test restores: the last id is kept once."""
    while len(row) > 1 and row[-1] == row[-2]:
        row = row[:-1]
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", type=Path)
    parser.add_argument("--all", type=Path)
    args = parser.parse_args()
    tokenizers = {"shapes": transformers.CLIPTokenizer.from_pretrained(args.shapes)}
    for name, pad in (("clip", END), ("open_clip", "!")):
        with tempfile.TemporaryDirectory() as folder:
            clip_folder(Path(folder), pad)
            tokenizers[name] = transformers.CLIPTokenizer.from_pretrained(folder)
    chosen = prompts() if args.all else AWKWARD
    cases = [{"prompt": p, **{n: shorten(ids(t, p)) for n, t in tokenizers.items()}} for p in chosen]
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    text = '{"transformers":"%s","cases":[\n%s\n]}\n' % (transformers.__version__, lines)
    (args.all or Path("tests/data/clip_tokens.json")).write_text(text)
    print(len(cases), "prompts")


if __name__ == "__main__":
    main()
