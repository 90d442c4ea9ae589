"""Trains the image tower of the CLIP pair on attribute-uniform scenes, with the text tower and the attribute tower locked.

Its targets are the attribute tower's embeddings (regression and InfoNCE); ten linear heads on the pooled state, thrown away afterwards,
make it see every attribute early. Writes model/clip: the image tower, both projections and the temperature; the text tower's weights stay
in model/text_encoder, and the index names them there.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

import trainer
import world
from train_text import WIDTH, Contrast, contrastive
from train_vae import scenes

RECIPE = trainer.Recipe("vision", steps=5000, batch=128, learning_rate=1e-3, seed=15, betas=(0.9, 0.98), weight_decay=0.02, ema=0.998)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=world.IMAGE_SIZE, patch_size=8,
        hidden_act="quick_gelu", projection_dim=WIDTH,
    )  # fmt: skip


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = CLIPVisionModelWithProjection._from_config(vision_config(), attn_implementation="eager")
        self.heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in world.SIZES)

    def forward(self, x):
        pooled = self.vision.vision_model(pixel_values=x).pooler_output
        return F.normalize(self.vision.visual_projection(pooled).float(), dim=-1), [head(pooled).float() for head in self.heads]


def save(vision, contrast, text: CLIPTextModel, folder) -> None:
    """A CLIPModel whose index points at ../text_encoder for the text tower, so that its weights are on disk once."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {k: v.contiguous() for k, v in vision.state_dict().items()}
    own |= {"text_projection.weight": contrast.text_projection.weight.detach(), "logit_scale": contrast.logit_scale.detach()}
    save_file(own, folder / "clip.safetensors", metadata={"format": "pt"})
    weights = {k: "clip.safetensors" for k in own}
    weights |= {"text_model." + k.removeprefix("text_model."): "../text_encoder/model.safetensors" for k in text.state_dict()}
    index = {"metadata": {}, "weight_map": dict(sorted(weights.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), projection_dim=WIDTH)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    # Pixels arrive as the autoencoder gives them, in [-1, 1].
    size = world.IMAGE_SIZE
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n", encoding="utf-8")


def program(args) -> None:
    contrast = Contrast()
    contrast.load_state_dict(torch.load(args.work / "data" / "contrast.pt", weights_only=True))
    contrast.eval().requires_grad_(False).to(args.device)
    trainer.seeded(RECIPE.seed)
    student = Student()

    def loss(draw):
        cells, images = scenes(draw.rng, draw.batch, uniform=True)
        cells = torch.from_numpy(cells).to(draw.device)
        with torch.no_grad():
            target = contrast.attributes(cells)
        with trainer.autocast(draw.device):
            image, logits = student(trainer.pixels(images, draw.device))
        same = (cells[:, None] == cells[None]).all(-1)
        info, top = contrastive(target, image, same, contrast.logit_scale)
        cosine = (image * target).sum(1).mean()
        heads = sum(F.cross_entropy(l, cells[:, i]) for i, l in enumerate(logits))
        return info + 4 * (1 - cosine) + heads, {"top1": top, "cosine": cosine, "heads": heads}

    trainer.train(RECIPE, student, loss, args)
    if trainer.rank() == 0:
        text = CLIPTextModel.from_pretrained(args.work / "model" / "text_encoder")
        save(student.cpu().vision, contrast.cpu(), text, args.work / "model" / "clip")


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0]))
