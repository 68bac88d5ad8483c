"""LoRAs as kohya, diffusers and peft write them, merged into a pipeline's weights: sampling costs what it does without.

The arithmetic is one line for all of them, W + strength * alpha / rank * B A (Hu et al. 2021, equation 3), in float32. What
trainers differ in is how they name a layer, its factors A and B, and alpha.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import snapshot_download
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from dipo.cli import UserError, warn
from dipo.files import ADAPTER_CONFIG, LORA_FILES, lora_and_strength, lora_file
from dipo.models import load_config, local_path, reason
from dipo.single_file import FAMILIES, kind_of, tensor_shapes

# Which model of the pipeline a key's beginning means; what begins with none of them is the UNet's.
MODELS = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder"}
MODELS |= {f"{model}.": model for model in ("unet", "text_encoder", "text_encoder_2")} | {"diffusion_model.": "unet"}
# A layer, and what the tensor is to it: kohya's lora_down, diffusers' lora.down and to_q_lora.down, peft's lora_A and so on.
FACTOR = r"lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight"
KEY = re.compile(rf"(.+?)[._](?:{FACTOR}|lora_(magnitude_vector)(?:\.\w+)*|(alpha|dora_scale))")
ROLES = {"A": "down", "B": "up", "magnitude_vector": "magnitude", "dora_scale": "magnitude"}
# From any spelling of a layer's name to diffusers' own with _ for dots, the original SDXL's (kohya's) last.
SPELLINGS = {r"\.": "_", "_processor_": "_", "^text_model_": "", r"(self_attn_)to_(q|k|v|out)$": r"\1\2_proj"}
SPELLINGS |= {"_to_out$": "_to_out_0", "^input_blocks_0_0$": "conv_in", "^out_2$": "conv_out"}
SPELLINGS |= {"^time_embed_0$": "time_embedding_linear_1", "^time_embed_2$": "time_embedding_linear_2"}
SPELLINGS |= {"^label_emb_0_0$": "add_embedding_linear_1", "^label_emb_0_2$": "add_embedding_linear_2"}
SPELLINGS |= {"_in_layers_2$": "_conv1", "_out_layers_3$": "_conv2", "_emb_layers_1$": "_time_emb_proj"}
SPELLINGS |= {"_skip_connection$": "_conv_shortcut", "^middle_block_0_": "mid_block_resnets_0_"}
SPELLINGS |= {"^middle_block_1_": "mid_block_attentions_0_", "^middle_block_2_": "mid_block_resnets_1_"}
LYCORIS = "lokr_|hada_|oft_|lora_mid"  # LoKr, LoHa, OFT, LoCon with a Tucker core


class Lora(NamedTuple):
    """A LoRA as it was read: what by_layer makes of it, and the scale of each layer that is whole."""

    name: str
    strength: float
    layers: dict[tuple[str, str], dict[str, torch.Tensor]]
    strange: list[str]
    scales: dict[tuple[str, str], float]


def read_loras(s) -> list[Lora]:
    """The LoRAs of --dpo-lora, read before the models are, so that a bad one shows at once. UserError for that."""
    if not s.dpo_lora:
        return []
    unet = load_config(UNet2DConditionModel, "dpo-unet", s.dpo_unet, s.base_model, "unet")
    return [read_lora(entry, unet["cross_attention_dim"]) for entry in s.dpo_lora]


def read_lora(entry: str, text_width: int) -> Lora:
    """One LoRA for a UNet with text embeddings of this width. UserError if it is unreadable, of another family, or none."""
    name, strength = lora_and_strength(entry)
    try:
        path = local_path(name) or Path(snapshot_download(name, allow_patterns=[*LORA_FILES, ADAPTER_CONFIG]))
        path = lora_file(path, name) if path.is_dir() else path
        shapes = tensor_shapes(path)
        with safe_open(path, "pt") as f:
            tensors, header = {key: f.get_tensor(key) for key in shapes}, f.metadata() or {}
        layers, strange = by_layer(tensors)
        if kind := other_kind(shapes, layers):
            raise UserError(f"--dpo-lora {name}: {kind}")
        check_family(name, layers, text_width)
        configs = peft_configs(path, header, tensors)
        scales = {key: scale_of(*key, parts, configs) for key, parts in layers.items() if "down" in parts}
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--dpo-lora {name}: cannot be read ({reason(e)})") from e
    return Lora(name, strength, layers, strange, scales)


def peft_configs(path: Path, header: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    """peft's configuration of a file's layers for each model, where there is one: in its file beside, or in the header."""
    beside = path.with_name(ADAPTER_CONFIG)
    # peft's own file is nothing without it; one that was renamed has it still, and names no model either.
    if path.name == LORA_FILES[1] or (beside.exists() and not any(key.startswith(tuple(MODELS)) for key in tensors)):
        return dict.fromkeys(MODELS.values(), json.loads(beside.read_text(encoding="utf-8")))
    if any(key.startswith("base_model.model.") for key in tensors):
        warn(f"{path}: its scale is in peft's {ADAPTER_CONFIG}, which is not beside it; taken as 1")
    configs = {}
    for key, value in json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}")).items():
        model, _, option = key.partition(".")
        configs.setdefault(model, {})[option] = value
    return configs


def merge_loras(pipe: DiffusionPipeline, loras: list[Lora], strict: bool = True) -> None:
    """Add LoRAs, one after the other, to the weights of a pipeline's UNet and text encoders; no adapter is left in it.
    UserError for one that does not fit in all of its layers; without strict, those that fit are merged after a warning."""
    for lora in loras:
        for key, weight in fitting_layers(pipe, lora, strict).items():
            merge_layer(weight, lora.layers[key], lora.scales[key], lora.strength)


def by_layer(tensors: dict[str, torch.Tensor]) -> tuple[dict[tuple[str, str], dict[str, torch.Tensor]], list[str]]:
    """What a file has for each layer, by model and the layer's name there: down (R, in, ...), up (out, R, ...), alpha, and
    DoRA's magnitude (out, 1, ...) or (1, in, ...); and the keys that are none of these."""
    layers, strange = {}, []
    for key, tensor in tensors.items():
        prefix = next((p for p in MODELS if key.startswith(p)), "")
        found = KEY.fullmatch(key.removeprefix(prefix).removeprefix("base_model.model."))
        if not found:
            strange.append(key)
            continue
        layer, role = filter(None, found.groups())
        part = tensor.reshape(-1, 1) if role == "magnitude_vector" else tensor
        layers.setdefault((MODELS.get(prefix, "unet"), layer), {})[ROLES.get(role, role)] = part
    return layers, strange


def other_kind(names, layers: dict) -> str:
    """What a file is that is no LoRA; empty for a LoRA."""
    if found := next((name for name in names if re.search(LYCORIS, name)), ""):
        return f"a LyCORIS file ({found}), which is not read; LoRA, LoCon and DoRA are"
    is_lora = any({"down", "up"} & parts.keys() for parts in layers.values())
    return "" if is_lora else f"no LoRA; it is {kind_of(names)}"


def check_family(name: str, layers: dict, text_width: int) -> None:
    """UserError for a LoRA of a UNet that reads text embeddings of another number than text_width."""
    for (model, layer), parts in layers.items():
        cross = model == "unet" and diffusers_name(layer).endswith(("attn2_to_k", "attn2_to_v")) and "down" in parts
        if cross and (there := parts["down"].shape[1]) != text_width:
            here = f"{text_width}{FAMILIES.get(text_width, '')}"
            made = f"made for text embeddings of {there} numbers{FAMILIES.get(there, '')}, but this model's have {here}"
            raise UserError(f"--dpo-lora {name}: {made}; take both from the same model family")


def fitting_layers(pipe: DiffusionPipeline, lora: Lora, strict: bool) -> dict:
    """The weight of each layer that fits, by model and name; UserError or a warning with those that don't."""
    models = {model: getattr(pipe, model, None) for model in MODELS.values()}
    weights = {m: weights_by_name(module) for m, module in models.items() if module is not None}
    fitting, unfit, problems = {}, list(lora.strange), []
    for (model, layer), parts in lora.layers.items():
        weight = weights.get(model, {}).get(diffusers_name(layer, pipe.unet.config.layers_per_block))
        if problem := "no such layer" if weight is None else misfit(weight, parts):
            unfit.append(f"{model}.{layer}: {problem}")
        else:
            fitting[model, layer] = weight
    if not any(model == "unet" for model, _ in fitting):
        problems.append("nothing of it fits the UNet")
    if unfit:
        named = "; ".join([*unfit[:3], *["..."] * (len(unfit) > 3)])
        problems.append(f"{len(unfit)} of {len(lora.layers) + len(lora.strange)} layers fit nothing here ({named})")
    what = f"--dpo-lora {lora.name}: {'; '.join(problems)}"
    if problems and (strict or not fitting):
        raise UserError(f"{what}; --no-lora-strict merges the others" if fitting else what)
    if problems:
        warn(f"{what}; the others are merged")
    return fitting


def weights_by_name(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of linear layers and convolutions, (out, in, ...)."""
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    return {diffusers_name(name): m.weight for name, m in model.named_modules() if isinstance(m, layers)}


def diffusers_name(name: str, layers_per_block: int = 2) -> str:
    """A layer's name in diffusers with _ for dots, from any trainer's spelling. The original SDXL counts its down and up
    blocks through, with layers_per_block + 1 entries each."""
    for pattern, spelling in SPELLINGS.items():
        name = re.sub(pattern, spelling, name)
    if found := re.fullmatch(r"(in|out)put_blocks_(\d+)_(\d)_(.+)", name):
        side, entry, place, rest = found.groups()
        block, i = divmod(int(entry) - (side == "in"), layers_per_block + 1)
        side, kind = "down" if side == "in" else "up", "attentions" if place == "1" else "resnets"
        name = f"{side}_blocks_{block}_" + (f"{side}samplers_0_conv" if rest in ("op", "conv") else f"{kind}_{i}_{rest}")
    return name


def misfit(weight: torch.Tensor, parts: dict[str, torch.Tensor]) -> str:
    """Why the parts of a layer do not fit its weight; empty where they do."""
    if not {"down", "up"} <= parts.keys() or min(parts["down"].ndim, parts["up"].ndim) < 2:
        return f"incomplete, has {' and '.join(parts)}"
    (rank, *inputs), (outputs, *ranks) = parts["down"].shape, parts["up"].shape
    here, there = f"{len(weight)}x{weight[0].numel()}", f"{outputs}x{math.prod(inputs)}"
    if here != there or math.prod(ranks) != rank:
        return f"for a weight of {there}, here it is {here}"
    if "magnitude" in parts and parts["magnitude"].shape[:2] not in ((len(weight), 1), (1, weight.shape[1])):
        return f"DoRA's magnitude has the shape {list(parts['magnitude'].shape)}"
    return ""


def scale_of(model: str, layer: str, parts: dict[str, torch.Tensor], configs: dict[str, dict]) -> float:
    """alpha / rank, or rsLoRA's alpha / sqrt(rank), of one layer; without alpha 1. ValueError for one that is no number."""
    rank, config = len(parts["down"]), configs.get(model, {})
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha", rank))
    alpha = parts["alpha"].item() if "alpha" in parts else alpha
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha of {layer} is {alpha!r}, no finite number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@torch.no_grad()
def merge_layer(weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float, strength: float) -> None:
    """Change a weight in place by strength times a LoRA's whole change of it, for DoRA (Liu et al. 2024, equation 5)
    m (W + scale B A) / |W + scale B A| - W, with a norm for each number of m."""
    w = weight.float()
    down, up = (parts[role].to(w).flatten(1) for role in ("down", "up"))
    change = scale * (up @ down).reshape(w.shape)
    if "magnitude" in parts:
        m, v = parts["magnitude"].to(w), w + change
        m = m.reshape(*m.shape[:2], *[1] * (w.ndim - 2))
        others = [d for d in range(w.ndim) if m.shape[d] == 1]
        change = m * v / torch.linalg.vector_norm(v, dim=others, keepdim=True) - w
    weight.copy_(w + strength * change)
