"""Writes tests/data/tiny-*/gradients.safetensors: gradients of the tiny pipelines by torch autograd, from the inputs in golden.safetensors.

    python dump_gradients.py

All in float32, NCHW and [batch, token, channel]. `unet/cotangent` is what the UNet's prediction at timestep 420.5 is multiplied with
before it is summed; `unet/d_latents`, `d_context` and, where the model takes it, `d_pooled` and `d_time_ids` are the gradients of that sum.
`vae/cotangent` and `vae/d_latents` the same for the decoder, whose latents are at the UNet's scale; `text/cotangent` and
`text/d_embeddings` for the context of the prompt and the token embeddings (before positions) of the first tower.
"""

import os

import torch
from safetensors.torch import load_file, save_file

import dump
import tiny

DATA = os.path.join(os.path.dirname(__file__), "../../tests/data")
TIMESTEP = 420.5


def vjp(outputs, cotangent, inputs):
    gradients = torch.autograd.grad((outputs * cotangent).sum(), list(inputs.values()))
    return {"d_" + name: gradient for name, gradient in zip(inputs, gradients)}


def unet(pipe, golden, seed):
    names = [n for n in ("latents", "context", "pooled", "time_ids") if f"unet/{n}" in golden]
    leaves = {n: golden[f"unet/{n}"].clone().requires_grad_() for n in names}
    added = {"text_embeds": leaves["pooled"], "time_ids": leaves["time_ids"]} if "pooled" in leaves else None
    prediction = pipe.unet(leaves["latents"], TIMESTEP, leaves["context"], added_cond_kwargs=added).sample
    cotangent = dump.normal(seed, *prediction.shape)
    return {"cotangent": cotangent} | vjp(prediction, cotangent, leaves)


def vae(pipe, golden, seed):
    leaves = {"latents": golden["vae/latents"].clone().requires_grad_()}
    image = pipe.vae.decode(leaves["latents"] / pipe.vae.config.scaling_factor).sample
    cotangent = dump.normal(seed, *image.shape)
    return {"cotangent": cotangent} | vjp(image, cotangent, leaves)


def text(pipe, golden, seed):
    """Through the hook of the token table, since `CLIPTextModel` takes ids only."""
    table = pipe.text_encoder.get_input_embeddings()
    caught = {}

    def catch(_, __, rows):
        caught["embeddings"] = rows.detach().requires_grad_()
        return caught["embeddings"]

    hook = table.register_forward_hook(catch)
    ids = golden["ids/prompt"].long()
    if hasattr(pipe, "text_encoder_2"):
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    else:
        states = pipe.text_encoder(ids).last_hidden_state
    hook.remove()
    cotangent = dump.normal(seed, *states.shape)
    return {"cotangent": cotangent} | vjp(states, cotangent, caught)


def main():
    for name, seed in tiny.SEEDS.items():
        folder = os.path.join(DATA, name)
        pipe, golden = dump.load(folder), load_file(os.path.join(folder, "golden.safetensors"))
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
        tensors = {}
        for k, part in enumerate((unet, vae, text)):
            found = part(pipe, golden, seed * 1000 + k)
            tensors |= {f"{part.__name__}/{key}": value.detach().contiguous() for key, value in found.items()}
        assert all(t.isfinite().all() and t.std() > 1e-6 for t in tensors.values())
        save_file(tensors, os.path.join(folder, "gradients.safetensors"))
        print(name, {key: (tuple(value.shape), f"{value.norm():.3g}") for key, value in tensors.items()})


if __name__ == "__main__":
    main()
