"""ImageReward's model (Xu et al. 2023) by the BLIP classes of transformers: the package image-reward needs older ones."""

import json
import math
from pathlib import Path

import torch
from torch.nn import Dropout, Linear
from transformers.models import blip

# What the checkpoint calls its parts, and what they are called here and in transformers.
NAMES = {
    "blip.visual_encoder.cls_token": "image.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "image.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "image.embeddings.patch_embedding.",
    "blip.visual_encoder.norm.": "image.post_layernorm.",
    "blip.visual_encoder.blocks.": "image.encoder.layers.",
    ".norm": ".layer_norm",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
}
# It holds these besides, which its score does not use.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def load_imagereward(path: Path, dtype: torch.dtype) -> torch.nn.ModuleDict:
    """BLIP's encoders (image, text) in this dtype and the head in float32; med_config.json lies beside the checkpoint."""
    config = json.loads(path.with_name("med_config.json").read_text(encoding="utf-8"))
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = {k: v for k, v in weights.items() if not k.startswith(UNUSED)}
    for theirs, ours in NAMES.items():
        weights = {k.replace(theirs, ours): v for k, v in weights.items()}
    image = blip.BlipVisionModel(vision_config(weights))
    # The width of the image encoder is replaced in their code too.
    config = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "encoder_width")}
    config |= {"encoder_hidden_size": image.config.hidden_size, "is_decoder": True}
    text = blip.BlipTextModel(blip.BlipTextConfig(**config), add_pooling_layer=False)
    model = torch.nn.ModuleDict({"image": image, "text": text, "head": linear_head(text.config.hidden_size)}).to(dtype)
    model["head"].float()
    model.load_state_dict(weights)
    return model.eval()


def vision_config(weights: dict[str, torch.Tensor]) -> blip.BlipVisionConfig:
    """The sizes of the image encoder; heads are 64 wide in all of BLIP's."""
    _, positions, width = weights["image.embeddings.position_embedding"].shape
    patch = weights["image.embeddings.patch_embedding.weight"].shape[-1]
    return blip.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=sum(k.startswith("image.") and k.endswith(".qkv.weight") for k in weights),
        num_attention_heads=width // 64,
        image_size=patch * math.isqrt(positions - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def linear_head(width: int) -> torch.nn.Sequential:
    """LAION's aesthetic predictor, which ImageReward took over as its head: no activation between the layers; dropout, which
    is for training, keeps its places in the checkpoints' names."""
    narrow = Linear(128, 64), Dropout(0.1), Linear(64, 16), Linear(16, 1)
    return torch.nn.Sequential(Linear(width, 1024), Dropout(0.2), Linear(1024, 128), Dropout(0.2), *narrow)
