"""Time HPSv2 scoring: compare_quality.py's scorer in batches beside hpsv2.img_score.score called once per image and prompt.

    python benchmarks/bench_scoring.py                    # ViT-H-14 with random weights: time does not depend on them
    python benchmarks/bench_scoring.py --images 4         # a quick look

Both get the same checkpoint, written for the run, the same pictures (in memory) and prompts, and take turns within one run,
rounds of each after one warm-up; the package, which reads its checkpoint for every image, gets 16 pictures at most. hpsv2
1.2.0 lacks its vocabulary file; open_clip_torch's, which is the same, stands in for it. The scores are compared too. The
floor is the operations of the two towers over the rate of a large matrix product, measured in the same run. One row goes to
benchmarks/scoring.csv, with the machine and the versions.
"""

import datetime
import gzip
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import unittest.mock
from dataclasses import dataclass, replace
from pathlib import Path

import bench_sampling
import numpy as np
import open_clip
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compare_quality


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


def run(s: Settings) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    cuda = device.type == "cuda"
    s = replace(s, images=s.images or (512 if cuda else 16), batch_size=s.batch_size or (64 if cuda else 8))
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((s.size,) * 2) for _ in range(s.images)
    ]
    prompts = [f"picture number {i} of a lighthouse above the sea" for i in range(s.images)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "HPS_v2.1_compressed.pt"
        torch.manual_seed(0)
        weights = open_clip.create_model("ViT-H-14").half().state_dict()
        torch.save({"state_dict": weights}, checkpoint)
        del weights
        theirs = load_package(checkpoint)
        ours = compare_quality.load_hpsv2(compare_quality.Settings(hpsv2=str(checkpoint)), device, dtype)

        def package() -> list[float]:
            return [float(theirs(image, prompt)) for image, prompt in zip(pictures[:16], prompts, strict=False)]

        def batched() -> list[float]:
            starts = range(0, s.images, s.batch_size)
            parts = [ours(pictures[i : i + s.batch_size], prompts[i : i + s.batch_size]) for i in starts]
            return torch.cat(parts).tolist()

        seconds, scores = {package: [], batched: []}, {}
        theirs(pictures[0], prompts[0])
        ours(pictures[: s.batch_size], prompts[: s.batch_size])
        # Attention's fast path is one operation whose inside is not counted.
        torch.backends.mha.set_fastpath_enabled(False)
        flops = bench_sampling.flops_of(lambda: ours(pictures[: s.batch_size], prompts[: s.batch_size]))
        flops /= len(pictures[: s.batch_size])
        torch.backends.mha.set_fastpath_enabled(True)
        floor = flops / bench_sampling.matrix_rate(device, dtype)
        for _ in range(s.rounds):
            for way in (package, batched):
                start = time.perf_counter()
                scores[way] = way()
                seconds[way].append((time.perf_counter() - start) / len(scores[way]))
                print(f"{way.__name__}: {seconds[way][-1]:.4f} s an image", flush=True)
    row = {"date": datetime.date.today().isoformat()} | bench_sampling.machine(device)
    row |= {"images": s.images, "rounds": s.rounds, "batch_size": s.batch_size, "dtype": str(dtype).removeprefix("torch.")}
    row |= {f"{way.__name__}_seconds_per_image": round(float(np.median(v)), 4) for way, v in seconds.items()}
    row["images_per_second"] = round(1 / float(np.median(seconds[batched])), 3)
    row["ratio"] = round(row["package_seconds_per_image"] / float(np.median(seconds[batched])), 2)
    row |= {
        "floor_seconds_per_image": round(floor, 5),
        "share_of_floor": round(floor / float(np.median(seconds[batched])), 3),
    }
    row["largest_score_difference"] = float(np.abs(np.subtract(scores[package], scores[batched][:16])).max())
    row |= {p: importlib.metadata.version(p) for p in ("torch", "open_clip_torch", "hpsv2")}
    row["python"] = platform.python_version()
    print("\n".join(f"{k}: {v}" for k, v in row.items()))
    bench_sampling.append([row], s.csv)


def main() -> None:
    bench_sampling.command(Settings, __doc__, run)


if __name__ == "__main__":
    main()
