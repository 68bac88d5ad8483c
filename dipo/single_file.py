"""Models in one .safetensors file, in the original layout or (a part) in diffusers': what it holds, and how it is loaded."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import safetensors
import torch
from diffusers import DDIMScheduler
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type
from transformers import CLIPTokenizer

from dipo.files import ROOT

# A single file's kind by diffusers, its configuration in assets/configs, and what its tokenizers fill up with.
SINGLE_FILES = {
    "xl_base": ("sdxl", {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}),
    "v1": ("sd15", {"tokenizer": "<|endoftext|>"}),
    "v2": ("sd21", {"tokenizer": "!"}),
}
# The parts that a file may hold: their names, their flags, and a tensor that each has.
PARTS = {
    "unet": ("UNet", "dpo-unet", r"^(model\.diffusion_model\.)?(input_blocks\.0\.0|conv_in)\.weight$"),
    "vae": ("VAE", "vae", r"^((first_stage_model|vae)\.)?decoder\.conv_in\.weight$"),
}
WHOLE = "a whole checkpoint; give it as --base-model"
# What else a file may be by a tensor's name. The first that fits counts.
KINDS = {
    r"^(controlnet_|control_model\.|input_hint_block)": "a ControlNet, which has no place here",
    r"lora(_linear_layer)?[._](A|B|down|up)\b|hada_|lokr_": "a LoRA; give it as --dpo-lora",
    r"^(conditioner|cond_stage_model)\.": WHOLE,
    **{tensor: f"a {name}; give it as --{flag}" for name, flag, tensor in PARTS.values()},
    r"token_embedding\.weight$": "a text encoder, which comes with the base model",
    r"^(emb_params|clip_[lg]|<.*>)$": "a textual inversion, which has no place here",
}
# Who reads text embeddings of so many numbers.
FAMILIES = {768: " (SD 1.5)", 1024: " (SD 2)", 2048: " (SDXL)"}


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a .safetensors file's tensors by their names, from its header. ValueError for a file that is damaged."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as e:
        with open(path, "rb") as f:
            start = f.read(30)
        if start.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path.name} is a pointer of git LFS; fetch the file itself, with git lfs pull") from e
        what = "is cut short or no .safetensors file" if start else "is empty"
        raise ValueError(f"{path.name} {what}; fetch it again") from e


def has(names, tensor: str) -> bool:
    return re.search(tensor, "\n".join(names), re.MULTILINE) is not None


def kind_of(names) -> str:
    """What a file with tensors of these names is, and where it goes."""
    unknown = f"of no kind that is known here; its first key is {next(iter(names), 'missing')}"
    return next((kind for tensor, kind in KINDS.items() if has(names, tensor)), unknown)


def but_what(names) -> str:
    """The rest of a line that says what a file is not; empty where it is a checkpoint that only lacks that."""
    kind = kind_of(names)
    return "" if kind == WHOLE else f"; it is {kind}"


def load(cls, path: Path, subfolder: str, dtype: torch.dtype | None, base: Path | str, **more):
    """A pipeline (subfolder "") or one model of it, or without a dtype its configuration. base: the base model whose
    configuration a file has that holds a part alone. Raises ValueError for a file that does not hold what is wanted."""
    shapes = tensor_shapes(path)
    if base and subfolder in PARTS and not has(shapes, PARTS[subfolder][2]):
        name, flag, _ = PARTS[subfolder]
        raise ValueError(f"holds no {name}" + (but_what(shapes) or f"; give one with --{flag}"))
    folder, pads = config_folder(base or path)
    inside = {"subfolder": subfolder} if subfolder else {}
    beside = path.with_name("config.json")
    if base and beside.exists() and json.loads(beside.read_text(encoding="utf-8")).get("_class_name") == cls.__name__:
        folder, inside = path.parent, {}
    if dtype is None:
        widths = [shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")]
        marks = {"cross_attention_dim": widths[0]} if subfolder == "unet" and widths else {}
        marks |= scheduler_marks(shapes) if subfolder == "scheduler" else {}
        return cls.load_config(str(folder), **inside) | marks
    if not subfolder:
        vocabulary = ROOT / "assets/configs/tokenizer"
        more |= {part: CLIPTokenizer.from_pretrained(vocabulary, pad_token=pad) for part, pad in pads.items()}
        scheduler = DDIMScheduler.load_config(str(folder), subfolder="scheduler") | scheduler_marks(shapes)
        more["scheduler"] = DDIMScheduler.from_config(scheduler)
    return cls.from_single_file(str(path), config=str(folder), torch_dtype=dtype, **inside, **more)


def config_folder(base: Path | str) -> tuple[Path | str, dict[str, str]]:
    """Where a base model's configuration is: a folder or hub name itself; of a file beside it, or in assets/configs with the
    tokenizers that are to be added and what they fill up with. ValueError for a file of another kind."""
    if isinstance(base, str) or base.is_dir():
        return base, {}
    if (base.parent / "model_index.json").exists():
        return base.parent, {}
    shapes = tensor_shapes(base)
    kind = infer_diffusers_model_type({key: SimpleNamespace(shape=shape) for key, shape in shapes.items()})
    # What diffusers does not know it takes for v1.
    if kind not in SINGLE_FILES or CHECKPOINT_KEY_NAMES[kind] not in shapes:
        raise ValueError(f"no checkpoint of SDXL, SD 1.5 or SD 2 in the original layout{but_what(shapes)}")
    name, pads = SINGLE_FILES[kind]
    return ROOT / "assets/configs" / name, pads


def scheduler_marks(names) -> dict:
    """What the empty tensors v_pred and ztsnr say of a single file (AUTOMATIC1111 and ComfyUI know them too): it predicts v,
    and was trained with a last timestep of noise alone, from which sampling then has to start."""
    marks = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    return marks | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in names else {})
