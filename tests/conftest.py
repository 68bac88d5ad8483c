"""Fixtures shared by the tests: everything runs on the CPU with the demo model, without network."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes test side by side; with threads of their own they would hold each other up.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "gpu" not in " ".join(sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

DEMO = ROOT / "assets" / "demo" / "sdxl"


def pytest_collection_finish():
    """What was imported stays: the scripts' searches for garbage pass over it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu where no GPU is visible. Run them with: pytest -m gpu"""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def demo_pipe():
    """The demo model as hasty_sample.py loads it, float32 on the CPU."""
    import helpers

    from dipo.models import quiet_libraries

    quiet_libraries()
    return helpers.load()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The demo pipeline with a UNet of 0.3 million random weights."""
    import json

    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("tiny")
    for part in DEMO.iterdir():
        if part.name != "unet":
            (folder / part.name).symlink_to(part)
    config = json.loads((DEMO / "unet/config.json").read_text())
    config |= {"block_out_channels": [16, 16, 32], "norm_num_groups": 8, "attention_head_dim": [1, 1, 2]}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def random_judges(tmp_path_factory):
    """Folders of a random CLIPModel with processor, of a random open_clip model, of an ImageReward with its tokenizer in
    bert and of an aesthetic predictor on that CLIP, in the layouts of the real ones."""
    import json

    import helpers
    import make_judges
    import open_clip
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("judges")
    settings = make_judges.Settings(tokenizer=str(DEMO / "tokenizer"))
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    torch.manual_seed(0)
    for name in make_judges.JUDGES:
        (folder / name).mkdir()
    model = make_judges.make_pickscore(tokenizer)
    make_judges.save_pickscore(model, settings, folder / "pickscore")
    config = make_judges.make_hpsv2(tokenizer)
    (folder / "demo-hpsv2.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "demo-hpsv2.json")
    make_judges.save_hpsv2(open_clip.create_model("demo-hpsv2"), config, settings, folder / "hpsv2")
    helpers.save_imagereward(folder / "imagereward", folder / "bert")
    helpers.save_aesthetic(folder / "aesthetic", model.config.projection_dim)
    return folder


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """run("script", "--flag", ...) runs a script in this process, inside tmp_path; returns the exit code,
    standard output and standard error."""
    import helpers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)

    def call(name, *arguments):
        helpers.fresh_accelerator()
        capfd.readouterr()
        code = 0
        try:
            helpers.run(name, *arguments)
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        return code, out, err

    return call
