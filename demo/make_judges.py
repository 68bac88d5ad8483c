"""Train the demo's two judges on the annotator's labels: stand-ins for PickScore and HPSv2, in the real ones' layouts.

    python demo/make_judges.py                       # about 18 minutes on 2 CPU cores; goes on where it was stopped
    python demo/make_judges.py --judges pickscore    # one of them

assets/demo/pickscore   a transformers CLIPModel with its processor, as yuvalkirstain/PickScore_v1
assets/demo/hpsv2       an open_clip model: its configuration and tokenizer, and HPS_v2.1_compressed.pt with a "state_dict"

Both learn as PickScore did (Kirstain et al. 2023): the score is the scale times the cosine of picture and caption, the
difference of two pictures' scores under one caption gives the probability that the annotator prefers the first, and
cross-entropy to its labels is the loss. Pictures are those of assets/demo/pickapic/train.parquet and new ones of the
renderer, changed at random (colours stronger or weaker, blotches, blur, one named part in another colour), differently
for each judge. Labels are drawn anew whenever a pair is. Measured on the pairs of test.parquet, whose captions no judge
has seen.
"""

import io
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import annotator
import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
import world
from common import rate, train
from PIL import Image, ImageEnhance, ImageFilter
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dipo import cli
from dipo.files import written_whole

JUDGES = ("pickscore", "hpsv2")
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
GROUP = 4


@dataclass
class Settings:
    judges: tuple[str, ...] = JUDGES
    """which judges to train"""
    output_dir: str = "assets/demo"
    """where their folders go"""
    build_dir: str = "demo/build/judges"
    """pictures and checkpoints"""
    pairs: str = "assets/demo/pickapic"
    """folder of train.parquet and test.parquet"""
    tokenizer: str = "assets/demo/sdxl/tokenizer"
    """the demo's CLIP tokenizer"""
    groups: int = 6000
    """captions with GROUP pictures each, for each judge"""
    steps: int = 1200
    """optimizer steps"""
    batch: int = 32
    """groups a step"""
    seed: int = 0
    """every random choice follows from it"""


# ------------------------------------------------------------------------------------------------------------- pictures


def spoil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with colours stronger or weaker, and at times blotches or blur."""
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.75, 1.3))
    if rng.random() < 0.5:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.9, 1.1))
    if rng.random() < 0.3:
        for _ in range(rng.integers(1, 5)):
            colour = world.COLOURS[tuple(world.COLOURS)[rng.integers(len(world.COLOURS))]]
            w, h = rng.integers(4, 24, 2)
            x, y = rng.integers(0, world.SIZE - 4, 2)
            mask = Image.new("L", image.size)
            mask.paste(int(rng.integers(60, 256)), (int(x), int(y), int(x + w), int(y + h)))
            image = Image.composite(Image.new("RGB", image.size, colour), image, mask.filter(ImageFilter.GaussianBlur(2)))
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def recoloured(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The scene with one part in another colour."""
    k, colours = rng.integers(3), list(scene.colours)
    colours[k] = tuple(world.COLOURS)[rng.integers(len(world.COLOURS))]
    return replace(scene, colours=tuple(colours))


def make_group(seed: int, number: int, known: list[bytes], caption: str) -> tuple[np.ndarray, np.ndarray]:
    """GROUP pictures under a caption, uint8 (GROUP, 64, 64, 3), and their rewards. known: JPEGs of the demo model's pictures
    under it; without any, all are the renderer's."""
    rng = np.random.default_rng([seed, 11, number])
    scene, pictures = annotator.scene_of(caption), []
    for k in range(GROUP):
        if known and rng.random() < 0.8:
            picture = Image.open(io.BytesIO(known[rng.integers(len(known))])).convert("RGB")
        else:
            wrong = rng.random() < 0.25
            picture = world.draw(recoloured(scene, rng) if wrong else scene, rng)
        if k or not known:
            picture = spoil(picture, rng)
        pictures.append(picture)
    return np.stack([np.asarray(p) for p in pictures]), np.array([annotator.reward(p, caption) for p in pictures])


def make_pool(s: Settings, seed: int, path: Path) -> dict[str, np.ndarray]:
    """The training pictures of one judge: half of the groups around the demo model's pictures, half the renderer's."""
    if not path.exists():
        table = pd.read_parquet(Path(s.pairs) / "train.parquet")
        known = {}
        for row in table.itertuples():
            known.setdefault(row.caption, set()).update((row.jpg_0, row.jpg_1))
        known = {c: sorted(v) for c, v in known.items()}
        rng = np.random.default_rng([seed, 12])
        scenes = world.scenes("train")
        captions = [list(known)[k] for k in rng.integers(len(known), size=s.groups // 2)]
        others = rng.integers((len(scenes), world.WORDINGS), size=(s.groups - len(captions), 2))
        captions += [world.caption(scenes[k], w) for k, w in others]
        jobs = ([seed] * len(captions), range(len(captions)), [known.get(c, []) for c in captions], captions)
        with ProcessPoolExecutor() as pool:
            made = list(tqdm(pool.map(make_group, *jobs, chunksize=20), total=len(captions), desc=f"{path.stem}: pictures"))
        pictures, rewards = (np.stack(x) for x in zip(*made, strict=True))
        with written_whole(path) as part, open(part, "wb") as f:
            np.savez(f, pictures=pictures, rewards=rewards, captions=captions)
    return dict(np.load(path))


# --------------------------------------------------------------------------------------------------------------- models


def make_pickscore(tokenizer: CLIPTokenizer) -> CLIPModel:
    common = {"num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64}
    vision = common | {"hidden_size": 128, "intermediate_size": 512, "image_size": world.SIZE, "patch_size": 8}
    text = common | {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    text |= {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=3.0))


def make_hpsv2(tokenizer: CLIPTokenizer):
    vision = {"image_size": world.SIZE, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": len(tokenizer), "width": 96, "heads": 4, "layers": 2}
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}


def embeddings(model, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised embeddings of pictures (N, 64) and captions (M, 64), and the scale, of either kind of model."""
    if isinstance(model, CLIPModel):
        out = model(input_ids=ids, pixel_values=pixels)
        return out.image_embeds, out.text_embeds, model.logit_scale.exp()
    return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True), model.logit_scale.exp()


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, 64, 64, 3) to CLIP's normalised pixels (N, 3, 64, 64)."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def train_judge(s: Settings, seed: int, model, tokenizer: CLIPTokenizer, pool: dict, path: Path) -> None:
    """Every 250 steps a checkpoint at path, from which a stopped run goes on."""
    first, second = np.triu_indices(GROUP, 1)

    def step(i):
        rng = np.random.default_rng([seed, 13, i])
        rows = rng.integers(len(pool["captions"]), size=s.batch)
        rewards, captions = pool["rewards"][rows], pool["captions"][rows].tolist()
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            images, texts, scale = embeddings(model, to_pixels(pool["pictures"][rows].reshape(-1, 64, 64, 3)), ids)
        scores = scale * torch.einsum("bgd,bd->bg", images.float().unflatten(0, (s.batch, GROUP)), texts.float())
        labels = np.array([[annotator.label(r[i], r[j], rng) for i, j in zip(first, second, strict=True)] for r in rewards])
        return F.binary_cross_entropy_with_logits(scores[:, first] - scores[:, second], torch.from_numpy(labels).float())

    model.train()
    train(path, {"model": model}, step, s.steps, 1e-3, every=250, warm_up=100, beta_2=0.98, weight_decay=0.05)
    model.eval()


@torch.no_grad()
def agreement(s: Settings, model, tokenizer: CLIPTokenizer) -> list[bool]:
    """For each pair of test.parquet that is no tie, whether the judge and the annotator's reward prefer the same picture."""
    table = pd.read_parquet(Path(s.pairs) / "test.parquet")
    table = table[table.label_0 != 0.5]
    ids = tokenizer(table.caption.tolist(), padding="max_length", max_length=77, return_tensors="pt").input_ids
    scores = []
    for column in ("jpg_0", "jpg_1"):
        pictures = np.stack([np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in table[column]])
        images, texts, _ = embeddings(model, to_pixels(pictures), ids)
        scores.append((images * texts).sum(dim=-1).numpy())
    return ((scores[0] > scores[1]) == (table.reward_0 > table.reward_1).to_numpy()).tolist()


# ---------------------------------------------------------------------------------------------------------------- files


def save_pickscore(model: CLIPModel, s: Settings, folder: Path) -> None:
    """The files of yuvalkirstain/PickScore_v1 and of its processor, in one folder."""
    model.half().save_pretrained(folder)
    size = {"height": world.SIZE, "width": world.SIZE}
    options = {"size": {"shortest_edge": world.SIZE}, "crop_size": size, "image_mean": list(MEAN), "image_std": list(STD)}
    CLIPImageProcessor(**options, resample=3).save_pretrained(folder)
    for file in Path(s.tokenizer).iterdir():
        shutil.copy(file, folder)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})


def save_hpsv2(model, config: dict, s: Settings, folder: Path) -> None:
    """open_clip's configuration, the tokenizer, and a checkpoint with the name and layout of xswu/HPSv2's."""
    (folder / "demo-hpsv2.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copytree(s.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    torch.save({"state_dict": model.half().state_dict()}, folder / "HPS_v2.1_compressed.pt")


def main(s: Settings) -> None:
    build = Path(s.build_dir)
    build.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(s.tokenizer)
    for name in s.judges:
        seed = s.seed + JUDGES.index(name)
        torch.manual_seed(seed)
        folder = Path(s.output_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "pickscore":
            model = make_pickscore(tokenizer)
        else:
            config = make_hpsv2(tokenizer)
            (build / "demo-hpsv2.json").write_text(json.dumps(config))
            open_clip.add_model_config(build / "demo-hpsv2.json")
            model = open_clip.create_model("demo-hpsv2")
        pool = make_pool(s, seed, build / f"{name}-{s.seed}-{s.groups}.npz")
        train_judge(s, seed, model, tokenizer, pool, build / f"{name}.pt")
        right = agreement(s, model, tokenizer)
        if name == "pickscore":
            save_pickscore(model, s, folder)
        else:
            save_hpsv2(model, config, s, folder)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
        print(f"{folder}: agrees with the annotator's reward on {rate(right)} held-out pairs; {size:.1f} MB")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
