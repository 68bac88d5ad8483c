"""Models of human preference and of agreement with the prompt. A judge gives scores of N images and their N prompts."""

import contextlib
import logging
import warnings
from pathlib import Path

import huggingface_hub
import open_clip
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPTokenizer

from dipo.cli import UserError
from dipo.files import find_path
from dipo.models import reason

# The files that hpsv2.utils.hps_version_map names.
HPSV2_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@contextlib.contextmanager
def loading(flag: str, name: str, *files: str):
    """UserError instead of whatever goes wrong while a judge's weights (of these files) are loaded."""
    try:
        yield
    except Exception as e:
        what = f"--{flag} {name}: {' and '.join(files) or 'the model'} cannot be loaded ({reason(e)})"
        raise UserError(
            f"{what}; fetch it with download_models.py or hf download, or set {flag.replace('-', '_')} at the top of the "
            "script to a copy; what is made already is kept"
        ) from e


def rows_of(prompts: list[str]) -> tuple[list[str], torch.Tensor]:
    """The prompts without repetition, and which of them each one is."""
    unique = list(dict.fromkeys(prompts))
    return unique, torch.tensor([unique.index(p) for p in prompts])


class Judge:
    """What judges have in common: load(dtype) reads the weights, to the CPU at first; to(device) moves them.

    name is the column in scores.csv, label what tables and plots call it, with so many digits. source says which model it
    is, weights names the folders or files that hold it.
    """

    name = label = source = ""
    digits = 4
    weights: tuple[str, ...] = ()
    logit = ""
    model: torch.nn.Module | None = None

    def to(self, device: torch.device) -> None:
        self.model.to(device)


class ClipJudge(Judge):
    """A judge that is a CLIPModel of transformers with its processor; of_cosine makes its scores."""

    prefix = ""

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores (N,), float32, on the CPU."""
        model, (unique, rows) = self.model, rows_of(prompts)
        pixels = self.processor(images=[x.convert("RGB") for x in images], return_tensors="pt").pixel_values
        texts = [self.prefix + p for p in unique]
        ids = self.processor(text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        out = model(**ids.to(model.device), pixel_values=pixels.to(model.device, model.dtype))
        text = out.text_embeds.float()[rows.to(model.device)]
        return self.of_cosine((out.image_embeds.float() * text).sum(dim=-1)).cpu()


class PickScore(ClipJudge):
    """PickScore (Kirstain et al. 2023): the model's own scale, 100 once trained, times the cosine of image and text."""

    name, label, digits = "pickscore", "PickScore", 3
    logit = "pickscore"

    def __init__(self, model: str, processor: str):
        self.paths, self.source, self.weights = (model, processor), f"{model} {processor}", (model,)

    def load(self, dtype: torch.dtype) -> None:
        model, processor = self.paths
        with loading("pickscore", model, "config.json", "model.safetensors"):
            path = str(find_path(model) or model)
            self.model = CLIPModel.from_pretrained(path, torch_dtype=dtype, use_safetensors=True).eval()
        with loading("pickscore-processor", processor):
            self.processor = AutoProcessor.from_pretrained(str(find_path(processor) or processor))

    def of_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return self.model.logit_scale.exp().float() * cosine


class CLIPScore(ClipJudge):
    """CLIPScore (Hessel et al. 2021): 2.5 times the cosine of image and "A photo depicts" prompt, 0 where negative."""

    name, label = "clipscore", "CLIPScore"
    # Section 3: what captions start with.
    prefix = "A photo depicts "

    def __init__(self, model: str):
        self.source, self.weights = model, (model,)

    def load(self, dtype: torch.dtype) -> None:
        with loading("clip", self.source):
            path = str(find_path(self.source) or self.source)
            # OpenAI's repository has no safetensors on its main branch; torch.load reads its weights only, no code.
            self.model = CLIPModel.from_pretrained(path, torch_dtype=dtype).eval()
            self.processor = AutoProcessor.from_pretrained(path)

    def of_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return 2.5 * cosine.clamp(min=0)


class HPSv2(Judge):
    """HPSv2 (Wu et al. 2023): the cosine of image and prompt. The model is open_clip's ViT-H-14 with the checkpoint's
    weights, or the one whose configuration lies beside it, as the demo's does."""

    name, label = "hpsv2", "HPSv2"

    def __init__(self, model: str, version: str = "v2.1"):
        self.path, self.file = model, HPSV2_FILES[version]
        self.source, self.weights = f"{model} {version}", (model,)

    def load(self, dtype: torch.dtype) -> None:
        with loading("hpsv2", self.path, self.file):
            path = find_path(self.path)
            if path is None:
                path = Path(huggingface_hub.hf_hub_download(self.path, self.file))
            elif path.is_dir():
                path = path / self.file
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
            name, folder = "ViT-H-14", None
            if config := next(path.parent.glob("*-hpsv2.json"), None):
                open_clip.add_model_config(config)
                name, folder = config.stem, path.parent / "tokenizer"
            precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # It would warn that the model has no weights yet.
                logging.disable(logging.WARNING)
                self.model = open_clip.create_model(name, precision=precision).eval()
                logging.disable(logging.NOTSET)
            self.model.load_state_dict(weights)
            self.tokenize = open_clip.get_tokenizer(name) if folder is None else folder_tokenizer(folder)
        size = self.model.visual.image_size
        self.size, self.dtype = size[0] if isinstance(size, tuple) else size, dtype

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores (N,), float32, on the CPU."""
        model, device, (unique, rows) = self.model, self.model.logit_scale.device, rows_of(prompts)
        pixels = torch.stack([hpsv2_pixels(x, self.size, device) for x in images]).to(self.dtype)
        ids = self.tokenize(unique)
        # The text tower is causal and read at the end-of-text token: what comes after the batch's last one changes nothing.
        length = int(ids.argmax(dim=-1).max()) + 1
        short = {"positional_embedding": model.positional_embedding[:length]}
        short |= {"attn_mask": model.attn_mask[:length, :length]}
        text = torch.func.functional_call(model, short, kwargs={"text": ids[:, :length].to(device)})
        text = text["text_features"] if isinstance(text, dict) else text[1]
        image = model.encode_image(pixels, normalize=True)
        return (image.float() * text.float()[rows.to(device)]).sum(dim=-1).cpu()


def judge_of(s) -> Judge:
    """The judge that --relabel names, by the paths in a script's settings."""
    judges = PickScore(s.pickscore, s.pickscore_processor), HPSv2(s.hpsv2, s.hpsv2_version), CLIPScore(s.clip)
    return next(judge for judge in judges if judge.name == s.relabel)


def folder_tokenizer(folder: Path):
    """A CLIP tokenizer of transformers in the manner of open_clip's: texts to ids (N, 77)."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    return lambda texts: tokenizer(texts, **options).input_ids


def hpsv2_pixels(image: Image.Image, size: int, device: torch.device) -> torch.Tensor:
    """hpsv2's own preprocessing, which resizes the tensor, not the picture, here on the device: float32 (3, size, size)."""
    x = TF.to_dtype(TF.pil_to_tensor(image.convert("RGB")).to(device), torch.float32, scale=True)
    x = TF.center_crop(TF.resize(x, [size], TF.InterpolationMode.BICUBIC, antialias=True), [size, size])
    return TF.normalize(x, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
