"""Writes the auxiliary networks to tests/data in small, with what torch computes with them: CLIP pairs, GPT-2, heads.

Everything is computed by transformers in float64 from the stored weights, gradients by torch's autograd, and stored rounded to f32:
what differs is the engine's error alone. Images are NCHW. `golden.json` says how each tensor came about; a gradient is that of
⟨`of`, `cotangent`⟩ (or of the loss `of`) with respect to `to`. tests/data/README.md lists the names. Deterministic: the same versions
write the same bytes.

    python dump_models.py [--out tests/data]
"""

import argparse
import json
import os
import shutil

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

import models

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# As shapes has it: the index takes the text tower from the folder beside, mean and std are the model's own.
CLIP_L = dict(
    text_config=dict(
        vocab_size=99, hidden_size=40, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
        hidden_act="quick_gelu", projection_dim=32, bos_token_id=97, eos_token_id=98, pad_token_id=98,
    ),
    vision_config=dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=8,
        hidden_act="quick_gelu", projection_dim=32,
    ),
    projection_dim=32,
)  # fmt: skip

# As OpenCLIP-H: exact GELU, heads that are no power of two wide, patches of 14 pixels.
CLIP_H = dict(
    text_config=dict(
        vocab_size=70, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=9,
        hidden_act="gelu", projection_dim=24, bos_token_id=68, eos_token_id=69, pad_token_id=1,
    ),
    vision_config=dict(
        hidden_size=40, intermediate_size=100, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        hidden_act="gelu", projection_dim=24,
    ),
    projection_dim=24,
)  # fmt: skip

GPT2 = dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=60, eos_token_id=60)


class Golden:
    """The tensors of one folder and the index that explains them."""

    def __init__(self):
        self.tensors, self.cases = {}, []

    def put(self, name, tensor, **how):
        tensor = tensor.detach().contiguous()
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int32)
        assert tensor.isfinite().all() and (tensor.numel() < 8 or tensor.float().std() > 1e-6), name
        dtype = "F32" if tensor.is_floating_point() else "I32"
        self.tensors[name] = tensor.clone()
        self.cases.append({"name": name, "shape": list(tensor.shape), "dtype": dtype, **how})

    def write(self, folder):
        save_file(self.tensors, os.path.join(folder, "golden.safetensors"))
        versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
        rows = ",\n".join("  " + json.dumps(case) for case in self.cases)
        with open(os.path.join(folder, "golden.json"), "w") as file:
            file.write(f'{{"versions": {json.dumps(versions)}, "cases": [\n{rows}\n]}}\n')


def normal(seed, *shape):
    """Numbers that f32 holds, in f64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def weigh(module, name, seed, dtype):
    """Draws every tensor, gives the module exactly what will be stored, and returns that."""
    stored = {}
    for key, value in module.state_dict().items():
        if key.endswith("position_ids") or key == "lm_head.weight":
            continue
        stored[key] = models.draw(f"{name}/{key}", tuple(value.shape), seed, coarse=True).to(models.DTYPES[dtype])
    if "logit_scale" in stored:
        stored["logit_scale"].fill_(2.625)
    missing, unexpected = module.load_state_dict(stored, strict=False)
    assert not unexpected and all(key.endswith(("position_ids", "lm_head.weight")) for key in missing)
    module.double().eval().requires_grad_(False)
    return stored


def preprocess(image, preset, side, mean=MEAN, std=STD):
    """An image in [-1, 1] as the tower gets it: CLIP's own way, SeedSelect's, DPO-Diff's."""
    x = (image / 2 + 0.5).clamp(0, 1)
    if preset == "clip":
        height, width = x.shape[2:]
        short = min(height, width)
        size = [int(side * height / short), int(side * width / short)]
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
        top, left = int((size[0] - side) / 2.0), int((size[1] - side) / 2.0)
        x = x[:, :, top : top + side, left : left + side]
    else:
        x = F.interpolate(x, size=[side, side], mode={"seedselect": "bicubic", "dpo-diff": "bilinear"}[preset], align_corners=False)
    mean, std = (torch.tensor(numbers, dtype=image.dtype)[:, None, None] for numbers in (mean, std))
    return (x - mean) / std


def captured(module):
    """A list that gets the module's outputs, which keep their gradients."""
    outputs = []

    def hook(_, __, output):
        output.requires_grad_(True).retain_grad()
        outputs.append(output)
        return output

    module.register_forward_hook(hook)
    return outputs


def clip_golden(clip, images, seed, statistics, heads):
    """Features, unit vectors and logits of images and texts; gradients to pixels and to the text tower's embeddings."""
    golden, vision, text = Golden(), clip.config.vision_config, clip.config.text_config
    side, width = vision.image_size, clip.config.projection_dim

    def tower(pixels):
        return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)

    for number, (name, shape) in enumerate(images.items()):
        # a sixth of the pixels is beyond [-1, 1]
        pixels = (normal(seed + number, *shape) * 0.7).float().double()
        cotangent = normal(seed + 10 + number, shape[0], width)
        golden.put(f"{name}/pixels", pixels, seed=seed + number)
        golden.put(f"{name}/cotangent", cotangent, seed=seed + 10 + number)
        for preset in ("clip", "seedselect", "dpo-diff"):
            leaf = pixels.clone().requires_grad_(True)
            x = preprocess(leaf, preset, side, **statistics)
            features = tower(x)
            how = dict(preset=preset, pixels=f"{name}/pixels")
            if number == 0:
                golden.put(f"{name}/input-{preset}", x[:1], **how, note="the first image as the tower gets it")
            golden.put(f"{name}/features-{preset}", features, **how)
            gradient = dict(to="pixels", cotangent=f"{name}/cotangent", **how)
            (d_pixels,) = torch.autograd.grad(features, leaf, cotangent, retain_graph=True)
            golden.put(f"{name}/grad/features-{preset}", d_pixels, of="features", **gradient)
            if preset != "clip":
                continue
            unit = F.normalize(features, dim=-1)
            golden.put(f"{name}/unit-{preset}", unit, **how)
            (d_pixels,) = torch.autograd.grad(unit, leaf, cotangent, retain_graph=True)
            golden.put(f"{name}/grad/unit-{preset}", d_pixels, of="unit", **gradient)
            for head, module in heads.items():
                score = module(unit)
                golden.put(f"{name}/{head}-{preset}", score, head=head, **how)
                (d_pixels,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
                golden.put(f"{name}/grad/{head}-{preset}", d_pixels, of=head, to="pixels", **how)

    # texts end at different places, and are padded with what comes after the end
    length, end = text.max_position_embeddings, text.eos_token_id
    ids = torch.randint(0, text.bos_token_id, (2, length), generator=torch.Generator().manual_seed(seed + 20))
    ids[:, 0], ends = text.bos_token_id, torch.tensor([length - 1, 4])
    for row, at in enumerate(ends):
        ids[row, at:] = end
    embedded = captured(clip.text_model.embeddings)
    features = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    cotangent = normal(seed + 21, 2, width)
    (d_embeddings,) = torch.autograd.grad(features, embedded[0], cotangent)
    golden.put("text/ids", ids)
    golden.put("text/ends", ends)
    golden.put("text/embeddings", embedded[0])
    golden.put("text/features", features)
    golden.put("text/cotangent", cotangent, seed=seed + 21)
    golden.put("text/grad/features", d_embeddings, of="features", to="embeddings", cotangent="text/cotangent")
    first = next(iter(images))
    pixels = preprocess(golden.tensors[f"{first}/pixels"].double(), "clip", side, **statistics)
    golden.put("logits", clip(input_ids=ids, pixel_values=pixels).logits_per_image, pixels=f"{first}/pixels", preset="clip", note="[image, text]")
    return golden


def write_clip(folder, config, seed, dtype):
    shutil.rmtree(folder, ignore_errors=True)
    with models.quiet():
        # "eager" would take the softmax in f32
        clip = CLIPModel._from_config(CLIPConfig(**config), attn_implementation="sdpa")
    stored = weigh(clip, "clip", seed, dtype)
    clip.config.architectures = ["CLIPModel"]
    return clip, stored


def head(sizes, between):
    """Linear layers with a module after each but the last."""
    layers = []
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        layers.append(nn.Linear(a, b))
        if i + 2 < len(sizes):
            layers.append(between)
    return layers


class Head(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def write_clip_l(folder):
    """A folder like that of shapes: `clip` with its own index, the text tower beside it, a ReLU head; and a head as LAION's in a file."""
    clip, stored = write_clip(folder, CLIP_L, 11, "f16")
    for part in ("clip", "text_encoder", "aesthetic"):
        os.makedirs(os.path.join(folder, part))
    text = {k: v for k, v in stored.items() if k.startswith("text_model.")}
    own = {k: v for k, v in stored.items() if k not in text}
    save_file(text, os.path.join(folder, "text_encoder", "model.safetensors"), metadata={"format": "pt"})
    save_file(own, os.path.join(folder, "clip", "clip.safetensors"), metadata={"format": "pt"})
    weights = {k: "clip.safetensors" if k in own else "../text_encoder/model.safetensors" for k in sorted(stored)}
    models.write_json(os.path.join(folder, "clip", "model.safetensors.index.json"), {"metadata": {}, "weight_map": weights})
    clip.config.save_pretrained(os.path.join(folder, "clip"))
    statistics = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    side = clip.config.vision_config.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(statistics["mean"]), "image_std": list(statistics["std"]), "do_convert_rgb": True,
    }  # fmt: skip
    models.write_json(os.path.join(folder, "clip", "preprocessor_config.json"), preprocessor)

    sizes = [clip.config.projection_dim, 16, 8, 1]
    relu, laion = Head(head(sizes, nn.ReLU())), nn.Module()
    save_file(weigh(relu, "aesthetic", 12, "f16"), os.path.join(folder, "aesthetic", "model.safetensors"), metadata={"format": "pt"})
    config = {"_class_name": "AestheticHead", "input": "unit CLIP image embedding", "sizes": sizes, "activation": "relu"}
    models.write_json(os.path.join(folder, "aesthetic", "config.json"), config)
    # dropout after each layer but the last two, as the LAION predictor numbers its layers
    layers = head([sizes[0], 24, 16, 8], nn.Dropout(0.2)) + [nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1)]
    laion = Head(layers)
    save_file(weigh(laion, "laion", 13, "f32"), os.path.join(folder, "laion.safetensors"), metadata={"format": "pt"})
    images = {"large": (2, 3, 36, 44), "small": (1, 3, 20, 16)}
    clip_golden(clip, images, 1100, statistics, {"aesthetic": relu, "laion": laion}).write(folder)


def write_clip_h(folder):
    """A CLIPModel as transformers saves it, in one bf16 file."""
    clip, stored = write_clip(folder, CLIP_H, 14, "bf16")
    clip.config.save_pretrained(folder)
    save_file(stored, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    clip_golden(clip, {"tall": (1, 3, 41, 28)}, 1400, {}, {}).write(folder)


def write_gpt2(folder):
    """A GPT2LMHeadModel, its logits, token log-probabilities, and the gradient of its mean cross-entropy to everything."""
    shutil.rmtree(folder, ignore_errors=True)
    with models.quiet():
        gpt2 = GPT2LMHeadModel._from_config(GPT2Config(**GPT2), attn_implementation="eager")
    stored = weigh(gpt2, "gpt2", 15, "f32")
    gpt2.config.architectures = ["GPT2LMHeadModel"]
    gpt2.config.save_pretrained(folder)
    save_file(stored, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})

    golden = Golden()
    generator = torch.Generator().manual_seed(1500)
    ids = torch.randint(0, GPT2["vocab_size"], (3, 11), generator=generator)
    targets = ids.roll(-1, 1)
    # the last position has no target, a prompt is none, one row ends early: 16 are left, whose mean rounds nothing
    targets[:, -1], targets[0, :4], targets[1, :7], targets[2, 7:] = -100, -100, -100, -100
    gpt2.requires_grad_(True)
    embedded = captured(gpt2.transformer.drop)
    hidden = captured(gpt2.transformer.ln_f)
    logits = gpt2(input_ids=ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    assert (targets >= 0).sum() == 16
    golden.put("ids", ids)
    golden.put("targets", targets, note="-100 is none")
    golden.put("hidden", hidden[0])
    golden.put("logits", logits)
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    golden.put("log_probabilities", chosen * (targets >= 0), note="0 where there is no target")
    golden.put("loss", loss, note="mean over the targets")
    golden.put("grad/embeddings", embedded[0].grad, of="loss", to="embeddings")
    for name, parameter in gpt2.named_parameters():
        golden.put(f"grad/{name}", parameter.grad, of="loss", to=name)
    golden.write(folder)


def main():
    parser = argparse.ArgumentParser(description="write the auxiliary networks, and their golden files, to tests/data")
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "../../tests/data"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write_clip_l(os.path.join(args.out, "tiny-clip-l"))
    write_clip_h(os.path.join(args.out, "tiny-clip-h"))
    write_gpt2(os.path.join(args.out, "tiny-gpt2"))


if __name__ == "__main__":
    main()
