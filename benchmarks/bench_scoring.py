"""Time HPSv2 scoring: the studies' judge in batches beside hpsv2.img_score.score called once per image and prompt.

    python benchmarks/bench_scoring.py                    # ViT-H-14 with random weights: time does not depend on them
    python benchmarks/bench_scoring.py --images 4         # a quick look

Both get the same checkpoint, written for the run, the same pictures (in memory) and prompts, and take turns within one run,
rounds of each after one warm-up; the package, which reads its checkpoint for every image, gets 16 pictures at most. hpsv2
1.2.0 lacks its vocabulary file; open_clip_torch's, which is the same, stands in for it. The scores are compared too. The
floor is the operations of the two towers over the rate of a large matrix product, measured in the same run. One row goes to
benchmarks/scoring.csv, with the machine and the versions.
"""

import gzip
import os
import tempfile
import unittest.mock
from dataclasses import dataclass, replace
from pathlib import Path

import common
import numpy as np
import open_clip
import torch
from PIL import Image

from dipo.devices import clock
from dipo.judges import HPSv2


@dataclass
class Settings:
    images: int | None = None
    """images in each round; default: 512 on a GPU, 16 without"""
    rounds: int = 2
    """rounds of each way"""
    batch_size: int | None = None
    """images that our scorer takes together; default: 64 on a GPU, 8 without"""
    size: int = 1024
    """pixels of a side"""
    csv: str = "benchmarks/scoring.csv"
    """where the row goes; empty: nowhere"""


def load_package(checkpoint: Path):
    """hpsv2.img_score.score with its model built but not downloaded: a function of an image and a prompt."""
    real = gzip.open

    def found(path, *more, **options):
        return real(path if os.path.exists(path) else Path(open_clip.__file__).parent / Path(path).name, *more, **options)

    with unittest.mock.patch("gzip.open", found):
        from hpsv2 import img_score
    model, _, preprocess = img_score.create_model_and_transforms("ViT-H-14", precision="amp", output_dict=True)
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    return lambda image, prompt: img_score.score(image, prompt, cp=str(checkpoint))[0]


def main(s: Settings) -> None:
    device = common.begin(s)
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    s = replace(s, images=s.images or (512 if cuda else 16), batch_size=s.batch_size or (64 if cuda else 8))
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((s.size,) * 2) for _ in range(s.images)
    ]
    prompts = common.prompts_of(s.images)
    starts = range(0, s.images, s.batch_size)
    batches = [(pictures[i : i + s.batch_size], prompts[i : i + s.batch_size]) for i in starts]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "HPS_v2.1_compressed.pt"
        torch.manual_seed(0)
        torch.save({"state_dict": open_clip.create_model("ViT-H-14").half().state_dict()}, checkpoint)
        theirs, ours = load_package(checkpoint), HPSv2(str(checkpoint), "v2.1")
        ours.ready(dtype, device)

        def package() -> list[float]:
            return [float(theirs(image, prompt)) for image, prompt in zip(pictures[:16], prompts, strict=False)]

        def batched() -> list[float]:
            return torch.cat([ours(*batch) for batch in batches]).tolist()

        seconds, scores = {package: [], batched: []}, {}
        theirs(pictures[0], prompts[0])
        ours(*batches[0])
        flops = common.flops_of(lambda: ours(*batches[0])) / len(batches[0][0])
        floor = flops / common.matrix_rate(device, dtype)
        for _ in range(s.rounds):
            for way in (package, batched):
                start = clock(device)
                scores[way] = way()
                seconds[way].append((clock(device) - start) / len(scores[way]))
                print(f"{way.__name__}: {seconds[way][-1]:.4f} s an image", flush=True)
    each = {way: float(np.median(values)) for way, values in seconds.items()}
    row = common.machine(device) | {"images": s.images, "rounds": s.rounds, "batch_size": s.batch_size}
    row["dtype"] = str(dtype).removeprefix("torch.")
    row |= {f"{way.__name__}_seconds_per_image": round(x, 4) for way, x in each.items()} | {
        "images_per_second": round(1 / each[batched], 3),
        "ratio": round(each[package] / each[batched], 2),
        "floor_seconds_per_image": round(floor, 5),
        "share_of_floor": round(floor / each[batched], 3),
        "largest_score_difference": float(np.abs(np.subtract(scores[package], scores[batched][:16])).max()),
    }
    row |= common.versions("torch", "open_clip_torch", "hpsv2")
    print("\n".join(f"{k}: {v}" for k, v in row.items()))
    common.append([row], s.csv)


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
