"""Models of human preference and of agreement with the prompt. A judge gives scores of N images and their N prompts."""

import contextlib
import logging
from pathlib import Path

import huggingface_hub
import open_clip
import torch
import torchvision.transforms.v2.functional as TF
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from dipo.cli import UserError
from dipo.files import find_path
from dipo.imagereward import linear_head, load_imagereward
from dipo.models import quiet_libraries, reason, without_repetition


def checkpoint(name: str, file: str, *beside: str) -> Path:
    """A checkpoint: name itself if that is a file, this file in a folder, or of a repository, with those beside it."""
    path = find_path(name)
    if path is None:
        return Path([huggingface_hub.hf_hub_download(name, x) for x in (*beside, file)][-1])
    return path / file if path.is_dir() else path


class Judge:
    """What judges have in common. One is made of the values of its settings; load(dtype) reads its weights, to the CPU.

    name is the column in scores.csv, label what tables and plots call it, with so many digits. source says which model it
    is, weights names the folders or files that hold it, the first of the values, as many as there are holders.

    Where the judge is a model of preference (Bradley-Terry), the difference of two scores, times logit_scale, is the logit
    of the probability that the first is preferred; logit is the column of scores.csv that holds score times logit_scale.
    """

    name = label = logit = ""
    logit_scale: float | None = None
    settings: tuple[str, ...] = ()
    digits, holders = 4, 1
    model: torch.nn.Module | None = None

    def __init__(self, *values: str):
        self.values = dict(zip(self.settings, values, strict=True))
        self.source, self.weights = " ".join(values), values[: self.holders]

    def ready(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Have the weights read, once, and on the device."""
        if self.model is None:
            quiet_libraries()
            self.load(dtype)
        self.model.to(device)

    @contextlib.contextmanager
    def loading(self, setting: str, *files: str):
        """Its value as a path or hub name, and UserError for whatever goes wrong while these files are loaded from there."""
        name = self.values[setting]
        try:
            yield str(find_path(name) or name)
        except Exception as e:
            flag, what = setting.replace("_", "-"), f"{' and '.join(files) or 'the model'} cannot be loaded ({reason(e)})"
            advice = f"fetch it with download_models.py or hf download, or set {setting} at the top of the script to a copy"
            raise UserError(f"--{flag} {name}: {what}; {advice}; what is made already is kept") from e


class ClipJudge(Judge):
    """A judge that is a CLIPModel of transformers with its processor; of_cosine makes its scores."""

    prefix = ""

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores (N,), float32, on the CPU."""
        model, (unique, rows) = self.model, without_repetition(prompts)
        pixels = self.processor(images=[x.convert("RGB") for x in images], return_tensors="pt").pixel_values
        texts = [self.prefix + p for p in unique]
        ids = self.processor(text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        out = model(**ids.to(model.device), pixel_values=pixels.to(model.device, model.dtype))
        text = out.text_embeds.float()[rows]
        return self.of_cosine((out.image_embeds.float() * text).sum(dim=-1)).cpu()


class PickScore(ClipJudge):
    """PickScore (Kirstain et al. 2023): the model's own scale, 100 once trained, times the cosine of image and text."""

    name, label, digits = "pickscore", "PickScore", 3
    logit, logit_scale, settings = "pickscore", 1.0, ("pickscore", "pickscore_processor")

    def load(self, dtype: torch.dtype) -> None:
        with self.loading("pickscore", "config.json", "model.safetensors") as path:
            self.model = CLIPModel.from_pretrained(path, torch_dtype=dtype, use_safetensors=True).eval()
        with self.loading("pickscore_processor") as path:
            self.processor = AutoProcessor.from_pretrained(path)

    def of_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return self.model.logit_scale.exp().float() * cosine


class CLIPScore(ClipJudge):
    """CLIPScore (Hessel et al. 2021): 2.5 times the cosine of image and "A photo depicts" prompt, 0 where negative."""

    name, label, settings = "clipscore", "CLIPScore, 2.5 cos", ("clip",)
    prefix = "A photo depicts "  # section 3

    def load(self, dtype: torch.dtype) -> None:
        with self.loading("clip") as path:
            # OpenAI's repository has no safetensors on its main branch; torch.load reads its weights only, no code.
            self.model = CLIPModel.from_pretrained(path, torch_dtype=dtype).eval()
            self.processor = AutoProcessor.from_pretrained(path)

    def of_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return 2.5 * cosine.clamp(min=0)


class PaperCLIPScore(CLIPScore):
    """CLIPScore on the DIPO paper's scale: (cosine of image and prompt + 1) / 2."""

    name, label, prefix = "clipscore_paper", "CLIPScore, (cos + 1) / 2", ""

    def of_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return (cosine + 1) / 2


class HPSv2(Judge):
    """HPSv2 (Wu et al. 2023): the cosine of image and prompt. The model is open_clip's ViT-H-14 with the checkpoint's
    weights, or the one whose configuration lies beside it, as the demo's does."""

    name, label, logit, settings = "hpsv2", "HPSv2", "hpsv2_logit", ("hpsv2", "hpsv2_version")

    def load(self, dtype: torch.dtype) -> None:
        # As hpsv2.utils.hps_version_map has it.
        file = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}[self.values["hpsv2_version"]]
        with self.loading("hpsv2", file) as path:
            path = checkpoint(path, file)
            # Mapped, not read: each of several processes would hold all of it beside the model.
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
            name, tokenize = "ViT-H-14", None
            if config := next(path.parent.glob("*-hpsv2.json"), None):
                open_clip.add_model_config(config)
                name, tokenize = config.stem, HFTokenizer(str(path.parent / "tokenizer"), context_length=77)
            precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
            logging.disable(logging.WARNING)  # that the model has no weights yet
            self.model = open_clip.create_model(name, precision=precision).eval()
            logging.disable(logging.NOTSET)
            self.model.load_state_dict(weights)
            self.tokenize = tokenize or open_clip.get_tokenizer(name)
        self.size, self.dtype = self.model.visual.image_size[0], dtype
        self.logit_scale = self.model.logit_scale.exp().item()

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores (N,), float32, on the CPU."""
        model, device, (unique, rows) = self.model, self.model.logit_scale.device, without_repetition(prompts)
        pixels = torch.stack([hpsv2_pixels(x, self.size, device) for x in images]).to(self.dtype)
        ids = self.tokenize(unique)
        # The text tower is causal and read at the end-of-text token: what comes after the batch's last one changes nothing.
        length = int(ids.argmax(dim=-1).max()) + 1
        short = {"positional_embedding": model.positional_embedding[:length]}
        short |= {"attn_mask": model.attn_mask[:length, :length]}
        _, text, *_ = torch.func.functional_call(model, short, kwargs={"text": ids[:, :length].to(device)})
        image = model.encode_image(pixels, normalize=True)
        return (image.float() * text.float()[rows]).sum(dim=-1).cpu()


class ImageReward(Judge):
    """ImageReward (Xu et al. 2023), standardised: a head on the first token of BLIP's text encoder, which sees the image."""

    name, label, logit = "imagereward", "ImageReward", "imagereward_logit"
    settings = ("imagereward", "imagereward_tokenizer")
    # Over their images. Trained on the reward before that.
    mean, logit_scale = 0.16717362830052426, 1.0333394966054072

    def load(self, dtype: torch.dtype) -> None:
        with self.loading("imagereward", "ImageReward.pt", "med_config.json") as path:
            self.model = load_imagereward(checkpoint(path, "ImageReward.pt", "med_config.json"), dtype)
        with self.loading("imagereward_tokenizer") as path:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            # BLIP's, behind BERT's own.
            self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores (N,), float32, on the CPU."""
        vision, text = self.model["image"], self.model["text"]
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        ids = {k: ids[k].to(text.device) for k in ("input_ids", "attention_mask")}
        pixels = clip_pixels(images, vision.config.image_size).to(vision.device, vision.dtype)
        states = text(**ids, encoder_hidden_states=vision(pixels).last_hidden_state).last_hidden_state
        return (self.model["head"](states[:, 0].float())[:, 0].cpu() - self.mean) / self.logit_scale


class Aesthetic(Judge):
    """LAION's improved aesthetic predictor (Schuhmann et al. 2022): linear layers on the normalised image embedding of
    OpenAI's CLIP ViT-L/14, trained on ratings of 1 to 10. It does not see the prompt."""

    name, label, digits, settings, holders = "aesthetic", "aesthetic score", 3, ("aesthetic", "aesthetic_clip"), 2

    def load(self, dtype: torch.dtype) -> None:
        with self.loading("aesthetic", "aesthetic-model.pth") as path:
            weights = torch.load(checkpoint(path, "aesthetic-model.pth"), map_location="cpu", weights_only=True)
            width = weights["layers.0.weight"].shape[1]
            head = torch.nn.ModuleDict({"layers": linear_head(width)})
            head.load_state_dict(weights)
        with self.loading("aesthetic_clip") as path:
            vision = CLIPVisionModelWithProjection.from_pretrained(path, torch_dtype=dtype)
            if vision.config.projection_dim != width:
                raise ValueError(f"it embeds in {vision.config.projection_dim} dimensions, the predictor takes {width}")
        self.model = torch.nn.ModuleDict({"image": vision, "head": head["layers"].float()}).eval()

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores (N,), float32, on the CPU."""
        vision = self.model["image"]
        pixels = clip_pixels(images, vision.config.image_size).to(vision.device, vision.dtype)
        embeds = torch.nn.functional.normalize(vision(pixels).image_embeds.float(), dim=-1)
        return self.model["head"](embeds)[:, 0].cpu()


JUDGES = {judge.name: judge for judge in (PickScore, HPSv2, ImageReward, Aesthetic, CLIPScore, PaperCLIPScore)}


def judge_of(s, name: str) -> Judge:
    """The judge of that name, by the paths in a script's settings; UserError where one is empty, as some of the demo are."""
    judge = JUDGES[name]
    if lacking := [f"--{x.replace('_', '-')}" for x in judge.settings if not getattr(s, x)]:
        raise UserError(f"{judge.label} ({name}) needs {' and '.join(lacking)}: a folder or a hub name; --demo has none")
    return judge(*(getattr(s, x) for x in judge.settings))


def judges_of(s) -> list[Judge]:
    """The judges that --judges names, in that order. Raises UserError for none, or for one twice."""
    if not s.judges or len({*s.judges}) < len(s.judges):
        raise UserError(f"--judges {' '.join(s.judges)}: give one or more, and none twice")
    return [judge_of(s, name) for name in s.judges]


def clip_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    """OpenAI CLIP's own preprocessing, by PIL and in its order: float32 (N, 3, size, size)."""
    small = [TF.center_crop(TF.resize(x, [size], TF.InterpolationMode.BICUBIC), [size, size]) for x in images]
    x = torch.stack([TF.to_dtype(TF.pil_to_tensor(x.convert("RGB")), torch.float32, scale=True) for x in small])
    return TF.normalize(x, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))


def hpsv2_pixels(image: Image.Image, size: int, device: torch.device) -> torch.Tensor:
    """hpsv2's own preprocessing, which resizes the tensor, not the picture, here on the device: float32 (3, size, size)."""
    x = TF.to_dtype(TF.pil_to_tensor(image.convert("RGB")).to(device), torch.float32, scale=True)
    x = TF.center_crop(TF.resize(x, [size], TF.InterpolationMode.BICUBIC, antialias=True), [size, size])
    return TF.normalize(x, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
