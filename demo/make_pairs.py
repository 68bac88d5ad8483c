"""Make the demo's preference data in assets/demo/pickapic: pairs of pictures with a label, in Pick-a-Pic's own columns.

    python demo/make_pairs.py                       # about 12 minutes on 2 CPU cores; goes on where it was stopped
    python demo/make_pairs.py --train-pairs 60 --test-pairs 20 --output-dir /tmp/pairs      # a quick look

Under each caption there are several pictures, as in Pick-a-Pic, from different sources: the demo model at guidance 2, 5
and 8 with different seeds (20 DDIM steps), an earlier checkpoint of it (demo/build/unet_early.pt, which make_demo.py
leaves), and the renderer itself. The annotator (demo/annotator.py) labels pairs of them. Columns: jpg_0 and jpg_1 (JPEG
bytes), caption, label_0 (1 when jpg_0 wins, 0 when jpg_1 does, 0.5 for a tie); and, which Pick-a-Pic lacks, reward_0,
reward_1, source_0 and source_1. train.parquet is over training captions, test.parquet over held-out ones.
"""

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import annotator
import numpy as np
import pandas as pd
import torch
import world
from common import load_pipeline, sample
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from dipo import cli
from dipo.files import written_whole

# Sources of pictures: the UNet's name and the guidance scale; none for the renderer. A caption's pictures take them in turn.
SOURCES = {
    "base, guidance 5": ("base", 5.0),
    "base, guidance 2": ("base", 2.0),
    "base, guidance 8": ("base", 8.0),
    "earlier checkpoint": ("early", 5.0),
    "renderer": None,
}


@dataclass
class Settings:
    model: str = "assets/demo/sdxl"
    """the demo pipeline"""
    early: str = "demo/build/unet_early.pt"
    """EMA state of an earlier checkpoint of its UNet"""
    output_dir: str = "assets/demo/pickapic"
    """where train.parquet and test.parquet go"""
    build_dir: str = "demo/build/pairs"
    """the pictures made so far"""
    train_pairs: int = 3000
    """pairs over training captions"""
    test_pairs: int = 400
    """pairs over held-out captions"""
    pairs_per_caption: int = 4
    """pairs under one caption"""
    num_inference_steps: int = 20
    """DDIM steps"""
    seed: int = 0
    """every random choice follows from it"""


def plan(s: Settings, split: str, pairs: int) -> pd.DataFrame:
    """Which pictures to make: a row for each caption and source, with the columns caption, scene (its number), source and
    seed; each caption has one picture from every source and a second one from the first."""
    captions = -(-pairs // s.pairs_per_caption)
    rng = np.random.default_rng([s.seed, len(split)])
    rows = []
    for i, scene in enumerate(world.sample_scenes(split, captions, s.seed + 1)):
        caption = world.caption(scene, rng.integers(world.WORDINGS))
        for source in [*SOURCES, next(iter(SOURCES))]:
            rows.append({"number": i, "caption": caption, "source": source, "seed": int(rng.integers(2**31))})
    return pd.DataFrame(rows)


def choose_pairs(s: Settings, table: pd.DataFrame, pairs: int) -> pd.DataFrame:
    """Pairs of the planned pictures: of each caption four at random, and of their six pairs pairs_per_caption at random.
    A row of two picture numbers (first, second) for each."""
    rng = np.random.default_rng([s.seed, 3, len(table)])
    chosen = []
    for _, group in table.groupby("number"):
        both = list(itertools.combinations(rng.permutation(group.index)[:4], 2))
        chosen += [both[k] for k in rng.permutation(len(both))[: s.pairs_per_caption]]
    return pd.DataFrame(chosen[:pairs], columns=["first", "second"])


def jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=88, subsampling=0, optimize=True)
    return out.getvalue()


@torch.no_grad()
def make_pictures(s: Settings, table: pd.DataFrame, folder: Path) -> dict[int, bytes]:
    """JPEG bytes of the pictures in the table by number, each batch of 20 kept in a file of the folder as soon as made."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe, made = None, {}
    for source, choice in SOURCES.items():
        wanted = table[table.source == source]
        for start in tqdm(range(0, len(wanted), 20), desc=f"{folder.name}: {source}"):
            part = wanted.iloc[start : start + 20]
            path = folder / f"{list(SOURCES).index(source)}-{start:05d}.parquet"
            if not path.exists():
                if choice is None:
                    rows = part[["caption", "seed"]].itertuples(index=False)
                    pictures = [world.draw(annotator.scene_of(c), np.random.default_rng(k)) for c, k in rows]
                else:
                    pipe = pipe or load(s)
                    pipe.unet = pipe.unets[choice[0]]
                    pictures = sample(pipe, part.caption.tolist(), list(part.seed), s.num_inference_steps, choice[1])
                done = pd.DataFrame({"number": part.index, "jpg": [jpeg(p) for p in pictures]})
                with written_whole(path) as unfinished:
                    done.to_parquet(unfinished)
            made |= dict(pd.read_parquet(path).itertuples(index=False))
    return made


def load(s: Settings) -> StableDiffusionXLPipeline:
    """The demo pipeline, with its own UNet and the earlier one in pipe.unets."""
    pipe = load_pipeline(s.model)
    early = UNet2DConditionModel.from_config(pipe.unet.config)
    ema = EMAModel(early.parameters())
    ema.load_state_dict(torch.load(s.early, weights_only=True))
    ema.copy_to(early.parameters())
    pipe.unets = {"base": pipe.unet, "early": early.eval()}
    return pipe


def main(s: Settings) -> None:
    out = Path(s.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for split, count, file in (("train", s.train_pairs, "train.parquet"), ("held_out", s.test_pairs, "test.parquet")):
        table = plan(s, split, count)
        pairs = choose_pairs(s, table, count)
        used = table.loc[sorted({*pairs["first"], *pairs["second"]})]
        jpgs = make_pictures(s, used, Path(s.build_dir) / f"{split}-{s.seed}-{count}")
        rewards = {k: annotator.reward(Image.open(io.BytesIO(v)), table.caption[k]) for k, v in jpgs.items()}
        rng = np.random.default_rng([s.seed, 5, count])
        rows = []
        for a, b in pairs.itertuples(index=False):
            row = {"jpg_0": jpgs[a], "jpg_1": jpgs[b], "caption": table.caption[a]}
            row |= {"label_0": annotator.label(rewards[a], rewards[b], rng), "reward_0": rewards[a], "reward_1": rewards[b]}
            rows.append(row | {"source_0": table.source[a], "source_1": table.source[b]})
        data = pd.DataFrame(rows).sample(frac=1, random_state=s.seed).reset_index(drop=True)
        # One dictionary for all of a column: a picture that is in several pairs is stored once.
        with written_whole(out / file) as part:
            data.to_parquet(part, index=False, dictionary_pagesize_limit=2**30)
        decided = data[data.label_0 != 0.5]
        agree = ((decided.reward_0 > decided.reward_1) == (decided.label_0 == 1)).mean()
        print(
            f"{out / file}: {len(data)} pairs under {data.caption.nunique()} captions, {len(data) - len(decided)} ties, "
            f"{100 * agree:.1f} % of the other labels agree with the reward, {(out / file).stat().st_size / 1e6:.1f} MB"
        )
        by_source = pd.concat([data[[f"source_{k}", f"reward_{k}"]].set_axis(["source", "reward"], axis=1) for k in (0, 1)])
        print(by_source.groupby("source").reward.describe()[["count", "mean", "std"]].round(2).to_string())


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
