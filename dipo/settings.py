"""Settings that scripts share, but model paths. Nothing slow is imported: --help and wrong flags are answered at once."""

from dataclasses import dataclass
from typing import Literal

# What --demo sets, as far as a script has it and the command line left the default.
DEMO_PATHS = {
    "base_model": "assets/demo/sdxl",
    "dpo_unet": "assets/demo/dpo-unet",
    "vae": "",
    "pickscore": "assets/demo/pickscore",
    "pickscore_processor": "assets/demo/pickscore",
    "hpsv2": "assets/demo/hpsv2",
    **dict.fromkeys(("clip", "imagereward", "imagereward_tokenizer", "aesthetic", "aesthetic_clip"), ""),
    "judges": ("pickscore", "hpsv2"),
    "pickapic": "assets/demo/pickapic",
}

Judges = tuple[Literal["pickscore", "hpsv2", "imagereward", "aesthetic", "clipscore", "clipscore_paper"], ...]


@dataclass(kw_only=True)
class ModelPaths:
    """Where models and data are: a script's own Settings says it. They come first in --help."""

    base_model: str
    """SDXL pipeline, or one of SD 1.5 or 2.1: a folder, a .safetensors file or a hub name"""
    dpo_unet: str
    """DPO-trained UNet: a folder or a hub name, with or without a subfolder unet, or a file; empty: the base model's own"""
    dpo_lora: tuple[str, ...]
    """DPO-trained LoRA instead, on the base model's own UNet unless --dpo-unet is given too: a folder, a .safetensors file,
    a hub name, or owner/name/file.safetensors; :0.8 behind it is its strength; several are merged one after the other"""
    vae: str
    """VAE that stays finite in fp16: a folder, a file or a hub name; empty (and for SD 1.5 and 2.1): the base model's own"""
    parti: str
    """data set behind --prompts parti: a folder or a hub name"""
    pickapic: str
    """data set behind --prompts pickapic: a folder or a hub name"""


@dataclass(kw_only=True)
class JudgePaths(ModelPaths):
    """The same for the judges."""

    pickscore: str
    """PickScore's CLIP model: a folder or a hub name"""
    pickscore_processor: str
    """its processor: a folder or a hub name"""
    hpsv2: str
    """HPSv2's checkpoint: a .pt file, a folder or a hub name that holds it"""
    clip: str
    """CLIPScore's CLIP model and processor: a folder or a hub name"""
    imagereward: str
    """ImageReward's checkpoint: a .pt file with med_config.json beside it, a folder or a hub name that holds both"""
    imagereward_tokenizer: str
    """its tokenizer, BERT's: a folder or a hub name"""
    aesthetic: str
    """LAION's aesthetic predictor: a .pth file, a folder or a hub name that holds it as aesthetic-model.pth"""
    aesthetic_clip: str
    """its CLIP model: a folder or a hub name"""


@dataclass(kw_only=True)
class SamplingSettings(ModelPaths):
    """What every script that samples can be told."""

    demo: bool = False
    """use the small models, prompts and judges of assets/demo, and sizes for two CPU cores, where the default was left"""
    prompts: str
    """a .txt, .csv, .tsv, .json, .jsonl or .parquet, a folder of such files by category, parti, pickapic or hpdv2"""
    limit: int | None = None
    """use the first N prompts only; in a study of each category"""
    images_per_prompt: int = 1
    """images of each prompt, each with its own seed"""
    output_dir: str
    """where everything goes"""
    overwrite: bool = False
    """replace images in the output folder that were made with other settings"""
    font: str = ""
    """a .ttf or .otf file for the prompts in grids; empty: DejaVu Sans, which has no Chinese, Japanese or emoji"""

    guidance_scale: float = 5.0
    """classifier-free guidance; 1 or less switches it off, for half the operations"""
    timestep_spacing: Literal["auto", "leading", "trailing", "linspace"] = "auto"
    """auto: the base model's own, leading for SDXL"""
    seed: int = 0
    """image number i is drawn from seed + i"""
    height: int | None = None
    """pixels; default: the model's own, 1024 for SDXL, 512 for SD 1.5"""
    width: int | None = None
    """pixels; default: the model's own, 1024 for SDXL"""

    batch_size: int = 4
    """images sampled together; halved when the GPU's memory runs out"""
    lora_strict: bool = True
    """refuse a LoRA of which not everything fits the model, instead of merging what does"""
    compile: bool = False
    """torch.compile of the UNet for full batches"""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on a GPU, fp32 on the CPU"""
    device: str = "auto"
    """cuda, cuda:1, mps, cpu, or auto: the first of these that is there"""


@dataclass(kw_only=True)
class StudySettings(SamplingSettings, JudgePaths):
    """What a study can be told besides."""

    paper: bool = False
    """the paper's terms (PAPER_TERMS at the top of the script) where the default was left"""
    one_seed: bool = False
    """draw the image of every prompt from --seed, as the paper does"""
    score_only: bool = False
    """sample nothing: score the images that are there and make the tables of them"""
    categories: tuple[str, ...] = ()
    """use these categories only"""
    grid_prompts: int = 16
    """prompts shown in a grid"""
    judges: Judges = ("pickscore", "hpsv2")
    """what scores the images; clipscore_paper is CLIPScore as (cosine + 1) / 2"""
    hpsv2_version: Literal["v2.1", "v2.0"] = "v2.1"
    """which of HPSv2's checkpoints"""
    scoring_batch_size: int = 16
    """images scored together"""


@dataclass(kw_only=True)
class VoteSettings(StudySettings):
    """What a study that asks people can be told besides."""

    vote: tuple[str, str] | None = None
    """the two rows (folders) of pictures that vote.html asks people about"""
    votes: tuple[str, ...] = ()
    """CSVs that voters sent back: adds what people say to the tables"""
