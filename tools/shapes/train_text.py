"""Trains the text tower: captions of attribute-uniform scenes against a tower that knows the attributes.

Multi-positive InfoNCE: a caption matches every scene that agrees with all it states, so an under-specified caption makes no false
negatives. Values are uniform, words are not: a rare word stays rare. The attribute tower is the teacher of the image tower afterwards.
No pixels: minutes on a CPU.
Writes model/text_encoder, model/tokenizer and data/contrast.pt (attribute tower, text projection, temperature).
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import captions
import tokenizer
import trainer
import world

RECIPE = trainer.Recipe("text", steps=1600, batch=192, learning_rate=1e-3, seed=11, betas=(0.9, 0.98), weight_decay=0.02)
WIDTH = 128


def text_config(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=tokenizer.MAX_LENGTH, hidden_act="quick_gelu", projection_dim=WIDTH,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip


class AttributeTower(nn.Module):
    """The ten attributes of a scene to a unit vector."""

    def __init__(self, width=64, hidden=384):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in world.SIZES)
        self.mix = nn.Sequential(nn.Linear(len(world.SIZES) * width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))

    def forward(self, cells):
        return F.normalize(self.mix(torch.cat([table(cells[:, i]) for i, table in enumerate(self.tables)], 1)), dim=-1)


class Contrast(nn.Module):
    """What the towers share: attribute tower, text projection, temperature."""

    def __init__(self):
        super().__init__()
        self.attributes = AttributeTower()
        self.text_projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.65))


class Towers(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.text = CLIPTextModel._from_config(text_config(vocabulary), attn_implementation="eager")
        self.contrast = Contrast()

    def embed_text(self, ids):
        return F.normalize(self.contrast.text_projection(self.text(ids).pooler_output).float(), dim=-1)


def caption_batch(rng, cells):
    """A caption per cell, and which attributes it states: texts, `[n, 10]` bool."""
    mentioned = [captions.mention(rng) for _ in cells]
    texts = [captions.write(cell, names, rng) for cell, names in zip(cells, mentioned)]
    stated = torch.tensor([[name in names for name in world.NAMES] for names in mentioned])
    return texts, stated


def matches(stated, cells):
    """`[texts, scenes]`: the scene agrees with everything the text of row i (written for scene i) states."""
    return (~stated[:, None] | (cells[:, None] == cells[None])).all(-1)


def contrastive(text, scene, match, scale):
    """Both directions of multi-positive InfoNCE, and how often a text's nearest scene is a match."""
    logits = scale.exp().clamp(max=100) * text @ scene.T
    over = lambda dim: -(torch.where(match, logits.log_softmax(dim), 0).sum(dim) / match.sum(dim)).mean()
    top = match.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    return (over(1) + over(0)) / 2, top


def save(text: CLIPTextModel, folder) -> None:
    """As every Stable Diffusion folder has it: keys under `text_model.`, which transformers 5 reads but no longer writes."""
    text.config.architectures = ["CLIPTextModel"]
    text.config.save_pretrained(folder)
    state = {"text_model." + k.removeprefix("text_model."): v.contiguous() for k, v in text.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def program(args) -> None:
    encode = tokenizer.WordEncoder(args.work / "model" / "tokenizer")
    trainer.seeded(RECIPE.seed)
    towers = Towers(len(encode.ids))

    def loss(draw):
        cells = world.sample(draw.rng, draw.batch, uniform=True)
        texts, stated = caption_batch(draw.rng, cells)
        cells = torch.from_numpy(cells)
        match = matches(stated, cells).to(draw.device)
        with trainer.autocast(draw.device):
            text = towers.embed_text(torch.from_numpy(encode(texts)).to(draw.device))
        value, top = contrastive(text, towers.contrast.attributes(cells.to(draw.device)), match, towers.contrast.logit_scale)
        return value, {"top1": top}

    trainer.train(RECIPE, towers, loss, args)
    if trainer.rank() == 0:
        save(towers.cpu().text, args.work / "model" / "text_encoder")
        (args.work / "data").mkdir(exist_ok=True)
        torch.save(towers.contrast.state_dict(), args.work / "data" / "contrast.pt")


if __name__ == "__main__":
    args = trainer.arguments(__doc__.splitlines()[0])
    tokenizer.write(args.work / "model" / "tokenizer")
    trainer.launch(program, args)
