"""MinorityPrompt (Um & Ye, CVPR 2025, arXiv 2410.07838) by torch autograd: the objective has its two stop-gradients written out, the
optimiser is torch's, the networks are diffusers' and transformers'. `dump_minority.py` runs it and lists the settings of a `case`.

At a sampling step t > t_lo T, K times: f = x0(z_t, C_v), the estimate of the clean latents under the prompt with learnable tokens v;
z_s = sqrt(a_s) f + sqrt(1-a_s) n, made noisy again to level s; g = x0(z_s, C), the estimate under the prompt without them;
J = |sg(f) - g| + lambda |f - sg(g)| ascends by Adam in v. Nothing else learns.

Mode `default`: DDIM as diffusers does it, s = T - t. Mode `released`: as the authors' code, whose table of levels is shifted by one
(A[0] = 1, A[t] = a_{t-1}), whose s is T - t + T/N - 1, and whose result is the x0 of the last step.
"""

import os
from collections import namedtuple

import torch
from diffusers import DDIMScheduler
from torch.linalg import vector_norm

import dump
import philox

DATA = os.path.join(os.path.dirname(__file__), "../../tests/data")
SHAPES = os.path.join(os.path.dirname(__file__), "../../src/assets/shapes")
T = 1000
PLACE = -1  # stands for a learnable token among ids

Condition = namedtuple("Condition", "context pooled")


class Tower:
    """A tokenizer and its text encoder; the embeddings of learnable tokens are put in behind the table."""

    def __init__(self, tokenizer, encoder):
        self.tokenizer, self.encoder, self.length, self.given = tokenizer, encoder, tokenizer.model_max_length, None
        self.table = encoder.get_input_embeddings()
        self.table.register_forward_hook(self.put_in)

    def put_in(self, _, __, embeddings):
        if self.given is None:
            return embeddings
        places, rows = self.given
        return embeddings.masked_scatter(places[:, :, None], rows)

    def ids(self, prompt, tokens, position):
        """[BOS] prompt PLACE.. [EOS] padding, the prompt cut so that the learnable tokens stay; and where the end token is."""
        prompt = self.tokenizer(prompt, add_special_tokens=False).input_ids[: self.length - 2 - tokens]
        places = [PLACE] * tokens
        inner = places + prompt if position == "start" else prompt + places
        end = 1 + len(inner)
        padding = [self.tokenizer.pad_token_id] * (self.length - end - 1)
        return [self.tokenizer.bos_token_id, *inner, self.tokenizer.eos_token_id, *padding], end

    def encode(self, prompts, rows=None, position="end", pool_at="eos"):
        """All hidden states, the last one after the final norm, and its row to be pooled."""
        tokens = 0 if rows is None else len(rows) // len(prompts)
        ids, ends = zip(*(self.ids(prompt, tokens, position) for prompt in prompts))
        ids, ends = torch.tensor(ids), torch.tensor(ends)
        places = ids == PLACE
        if tokens and pool_at == "placeholder":
            ends = (places * torch.arange(self.length)).argmax(1)
        self.given = (places, rows) if tokens else None
        out = self.encoder(ids.clamp(min=0), output_hidden_states=True)
        self.given = None
        return out.hidden_states, out.last_hidden_state, out.last_hidden_state[torch.arange(len(ids)), ends]


class Model:
    """A pipeline's networks as functions of what the algorithm varies."""

    def __init__(self, name, dtype=torch.float32):
        self.pipe = pipe = dump.load(SHAPES if name == "shapes" else os.path.join(DATA, name))
        self.dtype, self.xl = dtype, hasattr(pipe, "text_encoder_2")
        for part in filter(lambda p: isinstance(p, torch.nn.Module), pipe.components.values()):
            part.to(dtype).requires_grad_(False)
        self.towers = [Tower(pipe.tokenizer, pipe.text_encoder)]
        if self.xl:
            self.towers.append(Tower(pipe.tokenizer_2, pipe.text_encoder_2))

    def encode(self, prompts, rows=None, **how):
        outs = [tower.encode(prompts, rows and rows[k], **how) for k, tower in enumerate(self.towers)]
        if not self.xl:
            return Condition(outs[0][1], None)
        context = torch.cat([states[-2] for states, _, _ in outs], dim=-1)
        return Condition(context, self.pipe.text_encoder_2.text_projection(outs[1][2]))

    def encode_negatives(self, negatives, like):
        if negatives is not None:
            return self.encode(negatives)
        if self.xl and self.pipe.config.force_zeros_for_empty_prompt:
            return Condition(*(torch.zeros_like(part) for part in like))
        return self.encode([""] * len(like.context))

    def unet(self, z, t, condition):
        added = None
        if self.xl:
            height, width = (side * self.pipe.vae_scale_factor for side in z.shape[2:])
            size = torch.tensor([[height, width, 0, 0, height, width]] * len(z), dtype=self.dtype)
            added = {"text_embeds": condition.pooled, "time_ids": size}
        return self.pipe.unet(z, t, condition.context, added_cond_kwargs=added).sample

    def predict(self, z, t, condition, null, guidance):
        prediction = self.unet(z, t, condition)
        if guidance == 1:
            return prediction
        unconditional = self.unet(z, t, null)
        return unconditional + guidance * (prediction - unconditional)

    def noise_and_clean(self, z, a, prediction):
        """eps and x0 of a prediction at level a."""
        if self.pipe.scheduler.config.get("prediction_type") == "v_prediction":
            return a.sqrt() * prediction + (1 - a).sqrt() * z, a.sqrt() * z - (1 - a).sqrt() * prediction
        return prediction, (z - (1 - a).sqrt() * prediction) / a.sqrt()


class Schedule:
    """Mode `default`: diffusers' DDIM, and the second timestep T - t."""

    def __init__(self, model, case):
        self.model, self.case = model, case
        self.ddim = DDIMScheduler.from_config(model.pipe.scheduler.config, timestep_spacing=case["spacing"])
        self.ddim.set_timesteps(case["steps"])
        self.timesteps, self.table = self.ddim.timesteps.tolist(), self.ddim.alphas_cumprod

    def level(self, t):
        return self.table[t]

    def second(self, t):
        """The timestep of the second estimate and its level."""
        if self.case["second_level"] != "annealed":
            s = int(T * self.case["second_level"])
            return s, self.table[s]
        s = self.annealed(t)
        return s, self.level(s)

    def annealed(self, t):
        return min(max(T - t, 1), T - 1)

    def step(self, z, t, prediction):
        return self.ddim.step(prediction, t, z, eta=0.0).prev_sample


class Released(Schedule):
    """Mode `released`; a fixed second timestep takes its level from the table that is not shifted, as there."""

    def __init__(self, model, case):
        super().__init__(model, case)
        self.skip, self.shifted = T // case["steps"], torch.cat([torch.ones(1), self.table])

    def level(self, t):
        return self.shifted[t]

    def annealed(self, t):
        return min(max(T - t + self.skip - 1, 1), T)

    def step(self, z, t, prediction):
        eps, x0 = self.model.noise_and_clean(z, self.level(t), prediction)
        if t == self.timesteps[-1]:
            return x0
        level = self.level(t - self.skip)
        return level.sqrt() * x0 + (1 - level).sqrt() * eps


class Variable:
    """What learns: `token` rows of the tables, all of the prompt's `text` context, or all of the `null` one's."""

    def __init__(self, model, case, base, null, rows):
        self.model, self.case, self.base, self.null, self.kind = model, case, base, null, case["variable"]
        start = {"token": rows, "text": [base.context], "null": [null.context]}[self.kind]
        self.parts = [part.clone().requires_grad_() for part in start]

    def conditions(self):
        case = self.case
        if self.kind == "token":
            return self.model.encode(case["prompts"], self.parts, position=case["position"], pool_at=case["pool_at"]), self.null
        if self.kind == "text":
            return Condition(self.parts[0], self.base.pooled), self.null
        return self.base, Condition(self.parts[0], self.null.pooled)


def normals(case, seed, draw):
    return torch.stack([torch.from_numpy(philox.normal(seed + b, draw, (4, *case["size"]))) for b in range(len(case["prompts"]))])


class Noises:
    """Draw 2^63 + n of each sample's own generator for the n-th inner iteration of the whole run."""

    def __init__(self, case, dtype):
        self.case, self.dtype, self.count = case, dtype, 0

    def next(self):
        self.count += 1
        return normals(self.case, self.case["opt_seed"], 2**63 + self.count - 1).to(self.dtype)


def minority(case, f, g):
    def distance(x, y):
        d = vector_norm((x - y).flatten(1), dim=1)
        return d**2 if case["squared"] else d

    if case["sg_second"]:
        return distance(f, g.detach())
    return distance(f.detach(), g) + case["lambda"] * distance(f, g.detach())


def repulsion(f):
    """Per sample, the distances to all others; nothing is detached."""
    assert len(f) > 1
    return torch.stack([sum(vector_norm(f[i] - f[j]) for j in range(len(f)) if j != i) for i in range(len(f))])


def optimise(model, case, schedule, variable, noises, z, i, t, log):
    """K iterations at step i; `log` gets each J and the first gradient."""
    adam = torch.optim.Adam(variable.parts, lr=case["lr"] * (1 - i * case["lr_decay"]), betas=(0.9, 0.999), eps=1e-8)
    guidance = case["guidance"] if case["guided"] else 1
    s, a_s = schedule.second(t)

    def estimate(z, t, a, condition, null):
        return model.noise_and_clean(z, a, model.predict(z, t, condition, null, guidance))

    for iteration in range(case["k"]):
        condition, null = variable.conditions()
        _, f = estimate(z, t, schedule.level(t), condition, null)
        if case["objective"] == "repulsion":
            j = repulsion(f)
        else:
            n = noises.next()
            z_s = a_s.sqrt() * f + (1 - a_s).sqrt() * n
            second = condition if case["second"] == "token" else variable.base
            e, g = estimate(z_s, s, a_s, second, null)
            j = minority(case, f, g)
            assert vector_norm(f - g - ((1 - a_s) / a_s).sqrt() * (e - n)) < 1e-4 * max(vector_norm(f - g), vector_norm(f)), "the closed form"
        adam.zero_grad()
        (-j.sum()).backward()
        log["j"].append(j.detach())
        if iteration == 0:
            log["gradients"].append([-part.grad for part in variable.parts])
        adam.step()


def sample(model, case, noise, rows):
    """Final latents as the UNet sees them, and the log."""
    schedule = (Released if case["mode"] == "released" else Schedule)(model, case)
    base = model.encode(case["prompts"])
    unlearnt = model.encode_negatives(case["negatives"], base)
    variable, noises = Variable(model, case, base, unlearnt, rows), Noises(case, model.dtype)
    log = {"j": [], "gradients": [], "optimised_steps": [], "timesteps": schedule.timesteps, "second_timesteps": []}
    z, condition, null = noise, base, unlearnt
    for i, t in enumerate(schedule.timesteps):
        if t > case["t_lo"] * T and i % case["inter_rate"] == 0:
            optimise(model, case, schedule, variable, noises, z, i, t, log)
            log["optimised_steps"].append(i)
            log["second_timesteps"].append(schedule.second(t)[0])
            with torch.no_grad():
                condition, null = variable.conditions()
        elif case["base_prompt_after"]:
            condition, null = base, unlearnt
        with torch.no_grad():
            z = schedule.step(z, t, model.predict(z, t, condition, null, case["guidance"]))
    return z, log | {"final": [part.detach() for part in variable.parts]}
