"""The judges against their references on the same weights."""

import gzip
import json
import os

import numpy as np
import open_clip
import pytest
import torch
import world
from PIL import Image
from torchvision import transforms
from transformers import AutoProcessor, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dipo.judges import CLIPScore, HPSv2, PickScore

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


def judges_of(folder):
    """All three, loaded in float32 on the CPU."""
    pick = str(folder / "pickscore")
    judges = PickScore(pick, pick), HPSv2(str(folder / "hpsv2")), CLIPScore(pick)
    for judge in judges:
        judge.load(torch.float32)
    return judges


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
    got = judges_of(random_judges)[0](images, PROMPTS)
    torch.testing.assert_close(got, expected.detach(), atol=1e-4, rtol=0)
    assert got.std() > 1e-3


def test_clipscore_is_hessels(random_judges, images):
    """2.5 * max(cos(image, "A photo depicts " + caption), 0), as in their clipscore.py."""
    _, image, text = clip_features(random_judges / "pickscore", images, ["A photo depicts " + p for p in PROMPTS])
    expected = 2.5 * np.clip((image * text).sum(dim=1).numpy(), 0, None)
    got = judges_of(random_judges)[2](images, PROMPTS)
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
    got = judges_of(random_judges)[1](images, PROMPTS)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.std(expected) > 1e-3


def test_batches_and_repeated_prompts_change_nothing(random_judges, images):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[1], "x " * 200]
    for score in judges_of(random_judges):
        single = torch.cat([score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
        torch.testing.assert_close(score(images, prompts), single, atol=1e-5, rtol=1e-4)


def test_preprocessing_of_the_processor_is_clips(random_judges):
    """The processor file that make_judges writes has CLIP's own settings at another size."""
    mine = CLIPImageProcessor.from_pretrained(random_judges / "pickscore")
    for key in ("image_mean", "image_std", "do_center_crop", "do_normalize", "do_resize"):
        assert getattr(mine, key) == getattr(CLIPImageProcessor(), key), key
    assert int(mine.resample) == 3
