"""compare_quality.py's scorers against the references on the same weights, and its statistics on known cases."""

import gzip
import json
import math
import os
import shutil

import make_judges
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import world
from conftest import DEMO
from PIL import Image
from torchvision import transforms
from transformers import AutoProcessor, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import compare_quality as cq
import hasty_sample as hs

PROMPTS = [world.caption(s) for s in world.sample_scenes("held_out", 6, 3)]


@pytest.fixture(scope="module")
def images():
    """Six pictures of different sizes and shapes, one of them grey and one with transparency."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (200, 120), (90, 300), (1024, 1024), (65, 63), (512, 512)]
    pictures = [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(s, Image.Resampling.BICUBIC) for s in sizes
    ]
    return [*pictures[:4], pictures[4].convert("L"), pictures[5].convert("RGBA")]


@pytest.fixture(scope="module")
def random_judges(tmp_path_factory):
    """Folders of a random CLIPModel with processor and of a random open_clip model, in the layouts of the real ones."""
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
    return folder


def settings(folder, **more):
    pick = str(folder / "pickscore")
    return cq.Settings(pickscore=pick, pickscore_processor=pick, clip=pick, hpsv2=str(folder / "hpsv2"), **more)


CPU = (torch.device("cpu"), torch.float32)


def clip_features(folder, images, texts, preprocess=None):
    """Normalised image and text features of the CLIPModel by its parts, one at a time, with the given preprocessing or
    that of OpenAI's CLIP, by torchvision."""
    model = CLIPModel.from_pretrained(folder).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    preprocess = preprocess or transforms.Compose(
        [
            transforms.Resize(64, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    rows = []
    with torch.no_grad():
        for image, text in zip(images, texts, strict=True):
            ids = tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
            a = model.visual_projection(model.vision_model(preprocess(image.convert("RGB"))[None]).pooler_output)
            b = model.text_projection(model.text_model(**ids).pooler_output)
            rows.append((a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)))
    return model, *(torch.cat(x) for x in zip(*rows, strict=True))


def test_pickscore_is_the_model_cards(random_judges, images):
    """scores = logit_scale.exp() * (text_embs @ image_embs.T), as on the hub's page of yuvalkirstain/PickScore_v1."""
    processor = AutoProcessor.from_pretrained(random_judges / "pickscore")
    model, image, text = clip_features(
        random_judges / "pickscore", images, PROMPTS, lambda x: processor(images=x, return_tensors="pt").pixel_values[0]
    )
    expected = model.logit_scale.exp() * (text @ image.T).diagonal()
    got = cq.load_pickscore(settings(random_judges), *CPU)(images, PROMPTS)
    torch.testing.assert_close(got, expected.detach(), atol=1e-4, rtol=0)
    assert got.std() > 1e-3


def test_clipscore_is_hessels(random_judges, images):
    """2.5 * max(cos(image, "A photo depicts " + caption), 0), as in their clipscore.py."""
    _, image, text = clip_features(random_judges / "pickscore", images, ["A photo depicts " + p for p in PROMPTS])
    expected = 2.5 * np.clip((image * text).sum(dim=1).numpy(), 0, None)
    got = cq.load_clipscore(settings(random_judges), *CPU)(images, PROMPTS)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_hpsv2_is_hpsv2s_own(random_judges, images, monkeypatch):
    """hpsv2.img_score's computation by the package's own modules, whose vocabulary file its wheel lacks."""
    real = gzip.open

    def found(path, *more, **options):
        if not os.path.exists(path):
            path = os.path.join(os.path.dirname(open_clip.__file__), os.path.basename(path))
        return real(path, *more, **options)

    monkeypatch.setattr(gzip, "open", found)
    theirs = pytest.importorskip("hpsv2.src.open_clip.model")
    from hpsv2.src.open_clip.transform import image_transform

    config = json.loads((random_judges / "demo-hpsv2.json").read_text())
    model = theirs.CLIP(**config, output_dict=True).eval()
    weights = torch.load(random_judges / "hpsv2/HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    preprocess = image_transform(64, is_train=False, mean=None, std=None)
    tokenizer = CLIPTokenizer.from_pretrained(random_judges / "hpsv2/tokenizer")
    expected = []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS, strict=True):
            ids = tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt").input_ids
            out = model(preprocess(image.convert("RGB"))[None], ids)
            expected.append((out["image_features"] @ out["text_features"].T).item())
    got = cq.load_hpsv2(settings(random_judges), *CPU)(images, PROMPTS)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.std(expected) > 1e-3


def test_batches_and_repeated_prompts_change_nothing(random_judges, images):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[1], "x " * 200]
    for load in (cq.load_pickscore, cq.load_hpsv2, cq.load_clipscore):
        score = load(settings(random_judges), *CPU)
        single = torch.cat([score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
        torch.testing.assert_close(score(images, prompts), single, atol=1e-5, rtol=1e-4)


def test_preprocessing_of_the_processor_is_clips(random_judges):
    """The processor file that make_judges writes has CLIP's own settings at another size."""
    mine = CLIPImageProcessor.from_pretrained(random_judges / "pickscore")
    for key in ("image_mean", "image_std", "do_center_crop", "do_normalize", "do_resize"):
        assert getattr(mine, key) == getattr(CLIPImageProcessor(), key), key
    assert int(mine.resample) == 3


# ----------------------------------------------------------------------------------------------------------- statistics


def test_win_rates_on_known_cases():
    r = cq.win_rate([3, 2, 1, 5], [1, 2, 3, 4])
    assert (r["n"], r["wins"], r["losses"], r["ties"]) == (4, 2, 1, 1) and r["win_rate"] == 0.5 and r["loss_rate"] == 0.25
    assert r["p"] == 1.0
    # Wilson's interval in closed form, 59 wins of 100; the two-sided binomial p of 60 and 40 is 0.0569 (R's binom.test).
    z, n, k = 1.959964, 100, 59
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    r = cq.win_rate([1] * 59 + [0] * 41, [0] * 59 + [1] * 41)
    assert (r["low"], r["high"]) == pytest.approx((centre - half, centre + half), abs=1e-5)
    assert cq.win_rate([1] * 60 + [0] * 40, [0] * 60 + [1] * 40)["p"] == pytest.approx(0.05689, abs=1e-4)
    every = cq.win_rate([1] * 20, [0] * 20)
    assert every["win_rate"] == every["high"] == 1 and every["low"] == pytest.approx(20 / (20 + 1.959964**2), abs=1e-5)
    assert every["p"] == pytest.approx(2 * 0.5**20)
    one, ties = cq.win_rate([1], [0]), cq.win_rate([1, 1], [1, 1])
    assert one["n"] == 1 and one["p"] == 1.0 and ties["ties"] == 2 and ties["p"] == 1.0 and ties["win_rate"] == 0


def test_mean_intervals():
    assert cq.mean_interval([2.5]) == (2.5, 2.5, 2.5) and cq.mean_interval([1, 1, 1]) == (1, 1, 1)
    x = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = cq.mean_interval(x)
    half = 1.96 * x.std(ddof=1) / 20
    assert mean == x.mean() and low == pytest.approx(mean - half, abs=0.03) and high == pytest.approx(mean + half, abs=0.03)
    assert cq.mean_interval(x) == (mean, low, high)


# -------------------------------------------------------------------------------------------------------------- folders


def make_folder(path, n, seed=0):
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        record = dict.fromkeys(("dpo_unet", "negative_prompt", "timestep_spacing", "diffusers"), "") | {"base_model": "m"}
        record |= {"prompt": PROMPTS[i % 6], "seed": i, "num_inference_steps": 2, "guidance_scale": 1, "eta": 0}
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        hs.save_png(path / f"{i:05d}.png", picture, record | {"width": 64, "height": 64})


@pytest.fixture
def score(run, random_judges):
    s = settings(random_judges)
    flags = (
        "--pickscore",
        s.pickscore,
        "--pickscore-processor",
        s.pickscore_processor,
        "--hpsv2",
        s.hpsv2,
        "--clip",
        s.clip,
    )
    return lambda *more: run("compare_quality", *flags, "--device", "cpu", "--scoring-batch-size", 4, *more)


def test_scoring_a_folder_is_continued_and_not_repeated(score, tmp_path, monkeypatch):
    make_folder(tmp_path / "a", 10)
    (tmp_path / "a/grid.png").write_bytes(b"not one of them")
    load, calls = cq.load_hpsv2, []

    def interrupted(*arguments):
        inner = load(*arguments)

        def scorer(images, prompts):
            calls.append(len(images))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return inner(images, prompts)

        scorer.model = inner.model
        return scorer

    monkeypatch.setattr(cq, "load_hpsv2", interrupted)
    code, _, err = score("--folders", "a")
    assert code == 130 and "the same command goes on" in err
    assert len(pd.read_csv(tmp_path / "a/scores.csv")) == 8
    code, out, err = score("--folders", "a")
    assert code == 0 and calls == [4, 4, 2, 2], err
    table = pd.read_csv(tmp_path / "a/scores.csv")
    assert table.file.tolist() == [f"{i:05d}.png" for i in range(10)] and table.seed.tolist() == list(range(10))
    assert table[["pickscore", "hpsv2", "clipscore"]].notna().all().all() and "| a        | PickScore | 6" in out
    before = (tmp_path / "a/scores.csv").stat().st_mtime_ns
    assert score("--folders", "a")[0] == 0 and (tmp_path / "a/scores.csv").stat().st_mtime_ns == before and len(calls) == 4
    make_folder(tmp_path / "b", 10, seed=1)
    code, out, err = score("--folders", "a", "b")
    assert code == 0 and "Wins of a over b, same prompts and seeds" in out and "| HPSv2" in out, err
    shutil.copy(tmp_path / "b/00003.png", tmp_path / "a/00010.png")
    assert score("--folders", "a")[0] == 0 and len(pd.read_csv(tmp_path / "a/scores.csv")) == 11


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--folders", "nothing"), "no such folder"),
        (("--folders", "empty"), "no image with its prompt inside"),
        (
            ("--folders", "a", "--pickscore", "nobody/nothing"),
            "--pickscore nobody/nothing: config.json and model.safetensors cannot be loaded",
        ),
        (("--folders", "a", "--hpsv2", "empty"), "get it with 'hf download xswu/HPSv2 HPS_v2.1_compressed.pt'"),
        (("--folders", "a", "--hpsv2", "evil.pt"), "--hpsv2 evil.pt: HPS_v2.1_compressed.pt cannot be loaded"),
        (("--folders", "a", "--hpsv2-version", "v3"), "use one of v2.0, v2.1"),
    ],
)
def test_bad_input_ends_with_one_line(score, tmp_path, flags, said):
    make_folder(tmp_path / "a", 1)
    (tmp_path / "empty").mkdir()

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'harm'}",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    code, _, err = score(*flags)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err
    assert not (tmp_path / "harm").exists()
