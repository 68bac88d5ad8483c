"""LoRAs as kohya, diffusers and peft write them, merged into a pipeline's weights: sampling costs what it does without.

The arithmetic is one line for all of them, W + strength * alpha / rank * B A (Hu et al. 2021, equation 3), in float32. What
trainers differ in is how they name a layer, its factors A and B, and alpha.
"""

import json
import re
import sys
from glob import escape
from math import sqrt
from pathlib import Path, PurePosixPath

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import snapshot_download
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from tqdm import tqdm

from dipo.cli import UserError
from dipo.files import ADAPTER_CONFIG, LORA_FILES, find_path, lora_and_strength, lora_file
from dipo.models import reason

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
LYCORIS = {"lokr_": "LoKr", "hada_": "LoHa", "lora_mid": "LoCon with a Tucker core", "oft_": "OFT"}
# Who reads text embeddings of so many numbers.
FAMILIES = {768: " (SD 1.5)", 1024: " (SD 2)", 2048: " (SDXL)"}


def merge_loras(pipe: DiffusionPipeline, entries: tuple[str, ...], strict: bool = True) -> None:
    """Add LoRAs, one after the other, to the weights of a pipeline's UNet and text encoders; no adapter is left in it.

    entries: as --dpo-lora takes them. Raises UserError for what cannot be read, is no LoRA, is for another family of models,
    or does not fit in all of its layers; without strict, the layers that fit are merged after a warning.
    """
    for entry in entries:
        name, strength = lora_and_strength(entry)
        tensors, configs = read_lora(name)
        layers, strange = by_layer(tensors)
        if kind := other_kind(tensors, layers):
            raise UserError(f"--dpo-lora {name}: {kind}")
        for (model, layer), weight in fitting_layers(pipe, name, layers, strange, strict).items():
            parts = layers[model, layer]
            merge_layer(weight, parts, scale_of(layer, parts, configs.get(model, {})), strength)


def read_lora(name: str) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """The tensors of a LoRA, and its peft configuration for each model where there is one: in peft's file beside it, or in
    the header that diffusers writes."""
    try:
        path = find_path(name) or on_hub(name)
        path = lora_file(path, name) if path.is_dir() else path
        with safe_open(path, "pt") as f:
            tensors, header = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
        if path.name == LORA_FILES[1]:
            return tensors, dict.fromkeys(MODELS.values(), json.loads(path.with_name(ADAPTER_CONFIG).read_text()))
        configs = {}
        for key, value in json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}")).items():
            configs.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
        return tensors, configs
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--dpo-lora {name}: cannot be read ({reason(e)})") from e


def on_hub(name: str) -> Path:
    """The local copy of owner/name/file.safetensors, or the folder of that of owner/name, from the hub or its cache."""
    owner, repository, *inside = name.split("/")
    file = PurePosixPath(*inside)
    wanted = [escape(str(file)), escape(str(file.with_name(ADAPTER_CONFIG)))] if inside else [*LORA_FILES, ADAPTER_CONFIG]
    return Path(snapshot_download(f"{owner}/{repository}", allow_patterns=wanted), file)


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


def other_kind(tensors: dict[str, torch.Tensor], layers: dict) -> str:
    """What a file is that is no LoRA; empty for a LoRA."""
    for key in tensors:
        if kind := next((kind for part, kind in LYCORIS.items() if part in key), ""):
            return f"a LyCORIS file of kind {kind} ({key}), which is not read; LoRA, LoCon and DoRA are"
    if any({"down", "up"} <= parts.keys() for parts in layers.values()):
        return ""
    if 1 <= len(tensors) <= 3 and all(tensor.ndim <= 2 for tensor in tensors.values()):
        return f"a textual inversion or another embedding ({', '.join(tensors)}), no LoRA"
    if any(key.endswith(("conv_in.weight", "input_blocks.0.0.weight", "token_embedding.weight")) for key in tensors):
        return "the full weights of a model, no LoRA; give it as --base-model or --dpo-unet"
    return f"no LoRA; its first key is {next(iter(tensors), 'missing')}"


def fitting_layers(pipe: DiffusionPipeline, name: str, layers: dict, strange: list[str], strict: bool) -> dict:
    """The weight of each layer that fits, by model and name; UserError or a warning with those that don't."""
    models = {model: getattr(pipe, model, None) for model in MODELS.values()}
    weights = {m: {} if module is None else weights_by_name(module) for m, module in models.items()}
    here, fitting, unfit = pipe.unet.config.cross_attention_dim, {}, list(strange)
    for (model, layer), parts in layers.items():
        flat = diffusers_name(layer, pipe.unet.config.layers_per_block)
        down, weight = parts.get("down"), weights[model].get(flat)
        if model == "unet" and flat.endswith(("attn2_to_k", "attn2_to_v")) and down is not None and down.shape[1] != here:
            there, families = down.shape[1], [FAMILIES.get(n, "") for n in (down.shape[1], here)]
            made = f"made for text embeddings of {there} numbers{families[0]}, but this model's have {here}{families[1]}"
            raise UserError(f"--dpo-lora {name}: {made}; take both from the same model family")
        if problem := "no such layer" if weight is None else misfit(weight, parts):
            unfit.append(f"{model}.{layer}: {problem}")
        else:
            fitting[model, layer] = weight
    some = any(model == "unet" for model, _ in fitting)
    if unfit or not some:
        what = "" if some else "nothing of it fits the UNet; "
        what += f"{len(unfit)} of {len(layers) + len(strange)} layers fit nothing here ({'; '.join(unfit[:3])}"
        what += "; ...)" if len(unfit) > 3 else ")"
        if strict or not fitting:
            raise UserError(f"--dpo-lora {name}: {what}" + "; --no-lora-strict merges the others" * bool(fitting))
        tqdm.write(f"warning: --dpo-lora {name}: {what}; the others are merged", file=sys.stderr)
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
    here, there = f"{len(weight)}x{weight[0].numel()}", f"{outputs}x{torch.Size(inputs).numel()}"
    if here != there or torch.Size(ranks).numel() != rank:
        return f"for a weight of {there}, here it is {here}"
    if "magnitude" in parts and parts["magnitude"].shape[:2] not in ((len(weight), 1), (1, weight.shape[1])):
        return f"DoRA's magnitude has the shape {list(parts['magnitude'].shape)}"
    return ""


def scale_of(layer: str, parts: dict[str, torch.Tensor], config: dict) -> float:
    """alpha / rank, or rsLoRA's alpha / sqrt(rank), of one layer; without alpha 1."""
    rank, patterns = len(parts["down"]), config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha", rank))
    alpha = parts["alpha"].item() if "alpha" in parts else alpha
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


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
