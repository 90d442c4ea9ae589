"""Writes a diffusers folder as one checkpoint file in the layout it would have been published in: CompVis (SD 1), Stability (SD 2) or SGM (SDXL).

The mapping is made twice from independent knowledge: here, from the diffusers names outwards, and in the Rust loader, from the published
names inwards; `check` below holds it against a third, diffusers' own converters. `plan` is also what tests/data/<name>/single_file.json
stores: tests make the file from the folder with five dumb operations, so the weights need not be committed twice.

    python single_file.py FOLDER OUT.safetensors
"""

import argparse
import glob
import json
import os

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


class Plan:
    """Rows `[key, op, dtype, shape, sources]`, a source being `[component, tensor]`; `names` are the folder's tensors."""

    def __init__(self, folder_names, dtype):
        self.names, self.dtype, self.rows = folder_names, dtype, []

    def add(self, key, op, component, *tensors):
        """`copy`, `reshape` (same elements, shape of the row), `transpose` (2-D) or `concat` (along axis 0)."""
        shape = list(self.names[component][tensors[0]])
        if op == "transpose":
            shape.reverse()
        if op == "concat":
            shape[0] *= len(tensors)
        self.rows.append([key, op, self.dtype[component], shape, [[component, t] for t in tensors]])

    def zeros(self, key, dtype, shape):
        """What published files also hold and no loader needs."""
        self.rows.append([key, "zeros", dtype, shape, []])

    def both(self, key, component, tensor):
        """Weight and, where there is one, bias."""
        for kind in ("weight", "bias"):
            if f"{tensor}.{kind}" in self.names[component]:
                self.add(f"{key}.{kind}", "copy", component, f"{tensor}.{kind}")

    def under(self, key, component, prefix):
        """Everything below a prefix, names unchanged."""
        for tensor in sorted(self.names[component]):
            if tensor.startswith(prefix + "."):
                self.add(key + tensor[len(prefix) :], "copy", component, tensor)

    def has(self, component, prefix):
        return any(t.startswith(prefix + ".") for t in self.names[component])


def unet_rows(plan, levels, layers):
    """UNet: blocks of a level are numbered through; a downsampler takes a number, an upsampler shares its block's."""
    root = "model.diffusion_model"

    def resnet(key, tensor):
        for ours, theirs in RESNET.items():
            plan.both(f"{root}.{key}.{theirs}", "unet", f"{tensor}.{ours}")

    def sampler(key, tensor):
        plan.both(f"{root}.{key}", "unet", f"{tensor}.0.conv")

    for first, second, ours in ((0, 2, "time_embedding"), ("0.0", "0.2", "add_embedding")):
        theirs = "time_embed" if ours == "time_embedding" else "label_emb"
        plan.both(f"{root}.{theirs}.{first}", "unet", f"{ours}.linear_1")
        plan.both(f"{root}.{theirs}.{second}", "unet", f"{ours}.linear_2")
    plan.both(f"{root}.input_blocks.0.0", "unet", "conv_in")
    number = 1
    for level in range(levels):
        for layer in range(layers):
            resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}")
            plan.under(f"{root}.input_blocks.{number}.1", "unet", f"down_blocks.{level}.attentions.{layer}")
            number += 1
        if plan.has("unet", f"down_blocks.{level}.downsamplers"):
            sampler(f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers")
            number += 1
    resnet("middle_block.0", "mid_block.resnets.0")
    plan.under(f"{root}.middle_block.1", "unet", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    number = 0
    for level in range(levels):
        attention = plan.has("unet", f"up_blocks.{level}.attentions")
        for layer in range(layers + 1):
            resnet(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}")
            plan.under(f"{root}.output_blocks.{number}.1", "unet", f"up_blocks.{level}.attentions.{layer}")
            if layer == layers and plan.has("unet", f"up_blocks.{level}.upsamplers"):
                sampler(f"output_blocks.{number}.{2 if attention else 1}.conv", f"up_blocks.{level}.upsamplers")
            number += 1
    plan.both(f"{root}.out.0", "unet", "conv_norm_out")
    plan.both(f"{root}.out.2", "unet", "conv_out")


def vae_rows(plan, levels, layers):
    """VAE: decoder levels count from full resolution, and the attention's matrices are 1x1 convolutions."""
    root = "first_stage_model"

    def resnet(key, tensor):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            plan.both(f"{root}.{key}.{name}", "vae", f"{tensor}.{name}")
        plan.both(f"{root}.{key}.nin_shortcut", "vae", f"{tensor}.conv_shortcut")

    def middle(side):
        tensor, key = f"{side}.mid_block", f"{side}.mid"
        resnet(f"{key}.block_1", f"{tensor}.resnets.0")
        resnet(f"{key}.block_2", f"{tensor}.resnets.1")
        plan.both(f"{root}.{key}.attn_1.norm", "vae", f"{tensor}.attentions.0.group_norm")
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            source = f"{tensor}.attentions.0.{ours}"
            plan.add(f"{root}.{key}.attn_1.{theirs}.weight", "reshape", "vae", f"{source}.weight")
            plan.rows[-1][3] += [1, 1]
            plan.add(f"{root}.{key}.attn_1.{theirs}.bias", "copy", "vae", f"{source}.bias")

    for side in ("encoder", "decoder"):
        plan.both(f"{root}.{side}.conv_in", "vae", f"{side}.conv_in")
        plan.both(f"{root}.{side}.conv_out", "vae", f"{side}.conv_out")
        plan.both(f"{root}.{side}.norm_out", "vae", f"{side}.conv_norm_out")
        middle(side)
    for level in range(levels):
        for layer in range(layers):
            resnet(f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}")
        plan.both(f"{root}.encoder.down.{level}.downsample.conv", "vae", f"encoder.down_blocks.{level}.downsamplers.0.conv")
        from_top = levels - 1 - level
        for layer in range(layers + 1):
            resnet(f"decoder.up.{from_top}.block.{layer}", f"decoder.up_blocks.{level}.resnets.{layer}")
        plan.both(f"{root}.decoder.up.{from_top}.upsample.conv", "vae", f"decoder.up_blocks.{level}.upsamplers.0.conv")
    plan.both(f"{root}.quant_conv", "vae", "quant_conv")
    plan.both(f"{root}.post_quant_conv", "vae", "post_quant_conv")


def text_prefix(plan, component):
    """transformers 5 saves a bare text tower without `text_model.`, everything published has it."""
    return "text_model." if plan.has(component, "text_model") else ""


def clip_rows(plan, root):
    """OpenAI CLIP: the transformers names under a prefix, plus the position ids older versions stored."""
    prefix = text_prefix(plan, "text_encoder")
    for tensor in sorted(plan.names["text_encoder"]):
        plan.add(f"{root}.text_model.{tensor[len(prefix) :]}", "copy", "text_encoder", tensor)
    positions = plan.names["text_encoder"][f"{prefix}embeddings.position_embedding.weight"][0]
    plan.zeros(f"{root}.text_model.embeddings.position_ids", "I64", [1, positions])


def open_clip_rows(plan, root, component, layers, extra_layer):
    """OpenCLIP: fused qkv, projection stored transposed; SD 2 ships one last layer that it never runs."""
    prefix = text_prefix(plan, component)
    dtype = plan.dtype[component]
    positions, width = plan.names[component][f"{prefix}embeddings.position_embedding.weight"]
    plan.add(f"{root}.positional_embedding", "copy", component, f"{prefix}embeddings.position_embedding.weight")
    plan.add(f"{root}.token_embedding.weight", "copy", component, f"{prefix}embeddings.token_embedding.weight")
    plan.both(f"{root}.ln_final", component, f"{prefix}final_layer_norm")
    for layer in range(layers):
        key, source = f"{root}.transformer.resblocks.{layer}", f"{prefix}encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            plan.add(f"{key}.attn.in_proj_{kind}", "concat", component, *(f"{source}.self_attn.{x}_proj.{kind}" for x in "qkv"))
        for ours, theirs in OPEN_CLIP_LAYER.items():
            plan.both(f"{key}.{theirs}", component, f"{source}.{ours}")
    if extra_layer:
        last = f"{root}.transformer.resblocks.{layers - 1}."
        for key, _, _, shape, _ in [row for row in plan.rows if row[0].startswith(last)]:
            plan.zeros(key.replace(last, f"{root}.transformer.resblocks.{layers}."), dtype, shape)
        plan.zeros(f"{root}.attn_mask", "F32", [positions, positions])
    if "text_projection.weight" in plan.names[component]:
        plan.add(f"{root}.text_projection", "transpose", component, "text_projection.weight")
    else:
        plan.zeros(f"{root}.text_projection", dtype, [width, width])
    plan.zeros(f"{root}.logit_scale", dtype, [])


def make_plan(names, dtypes, configs):
    """All rows of the single file of a pipeline, in a fixed order."""
    plan = Plan(names, dtypes)
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    unet_rows(plan, len(unet["block_out_channels"]), unet["layers_per_block"])
    vae_rows(plan, len(vae["block_out_channels"]), vae["layers_per_block"])
    if "text_encoder_2" in configs:
        clip_rows(plan, "conditioner.embedders.0.transformer")
        open_clip_rows(plan, "conditioner.embedders.1.model", "text_encoder_2", configs["text_encoder_2"]["num_hidden_layers"], extra_layer=False)
        plan.zeros("denoiser.sigmas", "F32", [1000])
        return plan.rows
    if text["hidden_act"] == "gelu":
        open_clip_rows(plan, "cond_stage_model.model", "text_encoder", text["num_hidden_layers"], extra_layer=True)
    else:
        clip_rows(plan, "cond_stage_model.transformer")
    for key in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"):
        plan.zeros(key, "F32", [1000])
    return plan.rows


NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int32: "I32", torch.int64: "I64"}
TORCH = {name: dtype for dtype, name in NAMES.items()}


def read_folder(folder):
    """Tensors and configs of the networks of a diffusers folder."""
    tensors, configs = {}, {}
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        path = os.path.join(folder, component)
        if os.path.isdir(path):
            with open(os.path.join(path, "config.json")) as file:
                configs[component] = json.load(file)
            tensors[component] = {}
            for shard in sorted(glob.glob(os.path.join(path, "*.safetensors"))):
                tensors[component] |= load_file(shard)
    return tensors, configs


def plan(folder):
    tensors, configs = read_folder(folder)
    shapes = {c: {name: tuple(t.shape) for name, t in part.items()} for c, part in tensors.items()}
    dtypes = {c: NAMES[next(iter(part.values())).dtype] for c, part in tensors.items()}
    return make_plan(shapes, dtypes, configs), tensors, configs


def build(rows, tensors):
    """Applies a plan."""
    out = {}
    for key, op, dtype, shape, sources in rows:
        parts = [tensors[c][t] for c, t in sources]
        if op == "zeros":
            value = torch.zeros(shape, dtype=TORCH[dtype])
        elif op == "concat":
            value = torch.cat(parts)
        elif op == "transpose":
            value = parts[0].T.contiguous()
        else:
            value = parts[0].reshape(shape).clone()
        assert list(value.shape) == shape and NAMES[value.dtype] == dtype, key
        assert key not in out, key
        out[key] = value
    return out


def check(rows, tensors, configs):
    """diffusers' own converters must give back every tensor bit for bit, and nothing else."""
    from diffusers.loaders import single_file_utils as theirs

    single = build(rows, tensors)
    pairs = [
        ("unet", theirs.convert_ldm_unet_checkpoint(dict(single), configs["unet"])),
        ("vae", theirs.convert_ldm_vae_checkpoint(dict(single), configs["vae"])),
    ]
    if "text_encoder_2" in configs:
        pairs.append(("text_encoder", theirs.convert_ldm_clip_checkpoint(dict(single))))
        pairs.append(("text_encoder_2", theirs.convert_open_clip_checkpoint(None, dict(single), prefix="conditioner.embedders.1.model.")))
    elif configs["text_encoder"]["hidden_act"] == "gelu":
        pairs.append(("text_encoder", theirs.convert_open_clip_checkpoint(None, dict(single), prefix="cond_stage_model.model.")))
    else:
        pairs.append(("text_encoder", theirs.convert_ldm_clip_checkpoint(dict(single))))
    for component, converted in pairs:
        bare = component == "text_encoder"
        want = {name.removeprefix("text_model.") if bare else name: t for name, t in tensors[component].items()}
        got = {name.removeprefix("text_model.") if bare else name: t for name, t in converted.items()}
        layers = configs[component].get("num_hidden_layers")
        ignored = lambda name: name.endswith("position_ids") or (bare and (name == "text_projection.weight" or f"layers.{layers}." in name))
        got = {name: t for name, t in got.items() if not ignored(name)}
        assert set(got) == set(want), (component, sorted(set(got) ^ set(want))[:8])
        for name, t in want.items():
            assert t.dtype == got[name].dtype and torch.equal(t, got[name]), (component, name)


def main():
    parser = argparse.ArgumentParser(description="diffusers folder → single-file checkpoint")
    parser.add_argument("folder")
    parser.add_argument("out")
    args = parser.parse_args()
    rows, tensors, _ = plan(args.folder)
    save_file(build(rows, tensors), args.out)
    print(f"{args.out}: {len(rows)} tensors")


if __name__ == "__main__":
    main()
