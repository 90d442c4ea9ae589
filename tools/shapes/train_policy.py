"""Trains the prompt rewriter: a GPT-2 that continues `PLAIN rephrase : ` with a detailed caption of the same scene.

Pairs come from the long-tailed world. The plain caption states little; the detailed one states the same in the same words and adds what
it left open, chosen among 32 draws from the world in proportion to exp(2 aesthetic): people's own detailed prompts are
picked for how the picture looks. Loss on the detailed half only. Writes model/prompt_policy.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import captions
import tokenizer
import trainer
import world

RECIPE = trainer.Recipe("policy", steps=4000, batch=64, learning_rate=2e-3, seed=16, betas=(0.9, 0.98), ema=0.995)
TEMPLATE = "{} rephrase :"
POSITIONS = 64
PLAIN_MENTION, DETAIL_MENTION = 0.35, 0.85
CANDIDATES = 32
BONUS = 2.0


def policy_config(vocabulary: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary, n_positions=POSITIONS, n_embd=96, n_layer=3, n_head=4, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip


def detailed_cells(rng, cells, stated):
    """`cells` with everything not stated drawn anew: one of CANDIDATES draws, in proportion to exp(BONUS aesthetic).

    Shape and colour stay as they are, and no other attribute has an unstated parent then, so each draw is exact.
    """
    n = len(cells)
    many = np.repeat(cells, CANDIDATES, 0)
    for i, attribute in enumerate(world.ATTRIBUTES):
        if attribute.name not in ("shape", "colour"):
            free = np.repeat(~stated[:, i], CANDIDATES)
            many[free, i] = world.draw(rng, world.rows(attribute, many[free]))
    weight = np.exp(BONUS * world.aesthetic(many)).reshape(n, CANDIDATES)
    return many.reshape(n, CANDIDATES, -1)[np.arange(n), world.draw(rng, weight)]


def pairs(rng, n):
    """Plain and detailed captions of `n` scenes."""
    cells = world.sample(rng, n)
    spoken = [name for name in captions.MENTION if name != "shape"]
    chosen = [{"shape"} | {name for name in spoken if rng.random() < PLAIN_MENTION} for _ in range(n)]
    stated = np.array([[name in names for name in world.NAMES] for names in chosen])
    plain, detailed = [], []
    for cell, detail, names in zip(cells, detailed_cells(rng, cells, stated), chosen):
        phrases = captions.phrases(cell, names, rng)
        more = {name for name in spoken if name not in names and rng.random() < DETAIL_MENTION}
        plain.append(captions.compose(phrases))
        detailed.append(captions.compose(captions.phrases(detail, more) | phrases))
    return plain, detailed


def program(args) -> None:
    encode = tokenizer.WordEncoder(args.work / "model" / "tokenizer", POSITIONS)
    trainer.seeded(RECIPE.seed)
    policy = GPT2LMHeadModel(policy_config(len(encode.ids)))

    def loss(draw):
        plain, detailed = pairs(draw.rng, draw.batch)
        prompts = [TEMPLATE.format(p) for p in plain]
        ids = torch.from_numpy(encode([f"{p} {d}" for p, d in zip(prompts, detailed)]))
        # The first end token is a target, the padding after it is not; neither is the prompt.
        targets = ids[:, 1:].clone()
        at = torch.arange(targets.shape[1])
        start = torch.tensor([len(p.split()) for p in prompts])[:, None]
        end = (ids != encode.end).sum(1, keepdim=True) - 1
        targets[(at < start) | (at > end)] = -100
        length = int(end.max()) + 1
        with trainer.autocast(draw.device):
            logits = policy(ids[:, :length].to(draw.device)).logits
        targets = targets[:, :length].to(draw.device)
        return F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100), {}

    trainer.train(RECIPE, policy, loss, args)
    if trainer.rank() == 0:
        policy.cpu().config.task_specific_params = {"rephrase": {"template": TEMPLATE}}
        policy.save_pretrained(args.work / "model" / "prompt_policy")


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0]))
