"""The judges against their references on the same weights."""

import gzip
import json
import os
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
import world
from helpers import MED, WORDS
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms
from transformers import AutoProcessor, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import compare_quality as cq
from dipo.cli import UserError
from dipo.files import fingerprint
from dipo.judges import Aesthetic, CLIPScore, HPSv2, ImageReward, PaperCLIPScore, PickScore, judges_of

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


def judge(kind, folder):
    """One of the random judges, loaded in float32 on the CPU."""
    parts = {PickScore: ("pickscore", "pickscore"), HPSv2: ("hpsv2",), ImageReward: ("imagereward", "bert")}
    parts |= {Aesthetic: ("aesthetic", "pickscore")}
    judge = kind(*(str(folder / part) for part in parts.get(kind, ("pickscore",))), *["v2.1"] * (kind is HPSv2))
    judge.load(torch.float32)
    return judge


def openai_preprocess(size):
    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            lambda x: x.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )


def clip_features(folder, images, texts, preprocess=None):
    """Normalised image and text features of the CLIPModel by its parts, one at a time, with the given preprocessing or
    that of OpenAI's CLIP, by torchvision."""
    model = CLIPModel.from_pretrained(folder).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    preprocess = preprocess or openai_preprocess(64)
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
    got = judge(PickScore, random_judges)(images, PROMPTS)
    torch.testing.assert_close(got, expected.detach(), atol=1e-4, rtol=0)
    assert got.std() > 1e-3


def test_clipscore_is_hessels(random_judges, images):
    """2.5 * max(cos(image, "A photo depicts " + caption), 0), as in their clipscore.py."""
    _, image, text = clip_features(random_judges / "pickscore", images, ["A photo depicts " + p for p in PROMPTS])
    expected = 2.5 * np.clip((image * text).sum(dim=1).numpy(), 0, None)
    got = judge(CLIPScore, random_judges)(images, PROMPTS)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_papers_clipscore_is_of_the_plain_prompt(random_judges, images):
    _, image, text = clip_features(random_judges / "pickscore", images, PROMPTS)
    got = judge(PaperCLIPScore, random_judges)(images, PROMPTS)
    torch.testing.assert_close(got, ((image * text).sum(dim=1) + 1) / 2, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- ImageReward and the aesthetic predictor


class Plain:
    """ImageReward's network written from its definition, tensor by tensor, in float64: BLIP's ViT, a BERT whose layers
    attend to the image after themselves, linear layers."""

    def __init__(self, weights):
        self.w = {k: v.double() for k, v in weights.items()}

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, name, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, q, k, v, heads, keep=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if keep is not None:
            logits = logits.masked_fill(~keep, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def image(self, pixels, heads=2):
        top = "blip.visual_encoder."
        patches = pixels.double().unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
        x = patches @ self.w[f"{top}patch_embed.proj.weight"].flatten(1).T + self.w[f"{top}patch_embed.proj.bias"]
        x = torch.cat([self.w[f"{top}cls_token"][0], x]) + self.w[f"{top}pos_embed"][0]
        for i in range(2):
            block = f"{top}blocks.{i}."
            qkv = self.linear(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(*qkv, heads), f"{block}attn.proj")
            inner = F.gelu(self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1"))
            x = x + self.linear(inner, f"{block}mlp.fc2")
        return self.norm(x, f"{top}norm", 1e-6)

    def block(self, x, source, name, keep=None):
        """Attention of BERT to source, its residual and norm."""
        q = self.linear(x, f"{name}.self.query")
        k, v = (self.linear(source, f"{name}.self.{part}") for part in ("key", "value"))
        attended = self.linear(self.attend(q, k, v, MED["num_attention_heads"], keep), f"{name}.output.dense")
        return self.norm(x + attended, f"{name}.output.LayerNorm", 1e-12)

    def reward(self, pixels, ids):
        """Before it is standardised. ids: padded to 35, as theirs are."""
        image, ids = self.image(pixels), torch.tensor(ids + [0] * (35 - len(ids)))
        text = "blip.text_encoder.embeddings."
        x = self.w[f"{text}word_embeddings.weight"][ids] + self.w[f"{text}position_embeddings.weight"][:35]
        x = self.norm(x, f"{text}LayerNorm", 1e-12)
        for i in range(2):
            layer = f"blip.text_encoder.encoder.layer.{i}."
            x = self.block(x, x, f"{layer}attention", keep=ids != 0)
            x = self.block(x, image, f"{layer}crossattention")
            out = self.linear(F.gelu(self.linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
            x = self.norm(x + out, f"{layer}output.LayerNorm", 1e-12)
        return self.head(x[0], "mlp.layers")

    def head(self, x, name):
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"{name}.{i}")
        return x.item()


# BERT's word pieces of prompts: small letters, an s that ends a word alone, what BLIP added behind the vocabulary.
PIECES = {
    "A red cat": "a red cat",
    "photo of the dogs": "photo of the dog ##s",
    "hills, " * 40: "hills , " * 40,
    "[DEC] a cat [ENC]": "[DEC] a cat [ENC]",
    "a purple sky": "a [UNK] sky",
    "": "",
}


def test_imagereward_is_its_authors(random_judges, images):
    """As score() of ImageReward/ImageReward.py (zai-org/ImageReward) has it; the network by Plain."""
    plain = Plain(torch.load(random_judges / "imagereward/ImageReward.pt", weights_only=True))
    words = [*WORDS, "[DEC]", "[ENC]"]
    ids = [[2, *(words.index(x) for x in pieces.split()[:33]), 3] for pieces in PIECES.values()]
    raw = [plain.reward(openai_preprocess(32)(x), i) for x, i in zip(images, ids, strict=True)]
    score = judge(ImageReward, random_judges)
    got = score(images, list(PIECES))
    np.testing.assert_allclose(got, (np.array(raw) - 0.16717362830052426) / 1.0333394966054072, atol=1e-4)
    assert got.dtype == torch.float32 and np.std(raw) > 0.05
    # It was trained with the sigmoid of differences of what is not standardised.
    np.testing.assert_allclose((got * score.logit_scale).diff(), np.diff(raw), atol=1e-4)


def test_the_aesthetic_score_is_laions(random_judges, images):
    """improved-aesthetic-predictor's simple_inference.py: layers without activation on the normalised embedding."""
    plain = Plain(torch.load(random_judges / "aesthetic/aesthetic-model.pth", weights_only=True))
    _, embeds, _ = clip_features(random_judges / "pickscore", images, PROMPTS, openai_preprocess(64))
    expected = [plain.head(x.double(), "layers") for x in embeds]
    score = judge(Aesthetic, random_judges)
    np.testing.assert_allclose(score(images, PROMPTS), expected, atol=1e-4)
    assert torch.equal(score(images, PROMPTS), score(images, [""] * 6)) and np.std(expected) > 0.01


@pytest.mark.parametrize(
    ("kind", "file", "last"),
    [
        (ImageReward, "imagereward/ImageReward.pt", "layers.7.bias"),
        (Aesthetic, "aesthetic/aesthetic-model.pth", "layers.7.bias"),
        (HPSv2, "hpsv2/HPS_v2.1_compressed.pt", "ln_final.bias"),
    ],
)
def test_checkpoints_that_do_not_fit_or_hold_code(random_judges, tmp_path, kind, file, last):
    for part in ("imagereward", "aesthetic", "hpsv2"):
        (tmp_path / part).mkdir()
    beside = [path for path in (random_judges / "hpsv2").iterdir() if path.suffix != ".pt"]
    for path in (*("imagereward/med_config.json", "bert", "pickscore"), *(p.relative_to(random_judges) for p in beside)):
        (tmp_path / path).symlink_to(random_judges / path)
    whole = torch.load(random_judges / file, weights_only=True)
    whole = whole.get("state_dict", whole)

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'harm'}",))

    cases = {"Missing key": {k: v for k, v in whole.items() if not k.endswith(last)}, "Unexpected key": whole | {"x": whole}}
    cases |= {"size mismatch": {k: v[:0] if k.endswith(last) else v for k, v in whole.items()}, "Weights only": Evil()}
    for said, content in cases.items():
        torch.save({"state_dict": content} if kind is HPSv2 else content, tmp_path / file)
        with pytest.raises(
            UserError, match=f"--{kind.name} .*{re.escape(file.split('/')[1])}.* cannot be loaded .*{said}"
        ) as e:
            judge(kind, tmp_path)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "harm").exists()
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=r"cannot be loaded .*No such file"):
        judge(kind, tmp_path)


def test_a_checkpoint_of_hpsv2_that_is_lost_is_said_once(tmp_path, caplog):
    """And not by open_clip, which would take its name for that of other weights."""
    with pytest.raises(UserError, match=r"--hpsv2 .*HPS_v2.1_compressed.pt cannot be loaded .*No such file"):
        HPSv2(str(tmp_path), "v2.1").load(torch.float32)
    assert not caplog.records


def test_an_aesthetic_predictor_of_another_clip_is_said(random_judges, tmp_path):
    weights = torch.load(random_judges / "aesthetic/aesthetic-model.pth", weights_only=True)
    width = weights["layers.0.weight"].shape[1]
    torch.save(weights | {"layers.0.weight": torch.zeros(1024, 7)}, tmp_path / "other.pth")
    said = f"--aesthetic-clip .*it embeds in {width} dimensions, the predictor takes 7"
    with pytest.raises(UserError, match=said):
        Aesthetic(str(tmp_path / "other.pth"), str(random_judges / "pickscore")).load(torch.float32)


def test_other_weights_of_a_judge_are_noticed(random_judges, tmp_path):
    """By their last bytes; scores.csv holds this fingerprint."""
    for part in ("imagereward", "aesthetic"):
        shutil.copytree(random_judges / part, tmp_path / part)
        before = fingerprint(str(tmp_path / part))
        with open(next((tmp_path / part).glob("*.pt*")), "ab") as f:
            f.write(b"x")
        assert fingerprint(str(tmp_path / part)) != before


def test_which_judges_a_script_takes():
    """In the order of --judges, by the paths of its settings."""
    names = ("aesthetic", "clipscore_paper", "imagereward", "hpsv2", "clipscore", "pickscore")
    s = cq.Settings(
        judges=names, hpsv2="h", hpsv2_version="v2.0", clip="c", aesthetic="a", aesthetic_clip="b", pickscore="p"
    )
    got = judges_of(s)
    assert tuple(x.name for x in got) == names and len({x.label for x in got}) == 6
    sources = ["a b", "c", f"{s.imagereward} {s.imagereward_tokenizer}", "h v2.0", "c", f"p {s.pickscore_processor}"]
    assert [x.source for x in got] == sources
    assert {x.name: x.logit for x in got if x.logit} == {
        **{"pickscore": "pickscore", "hpsv2": "hpsv2_logit"},
        "imagereward": "imagereward_logit",
    }
    for wrong in ((), ("hpsv2", "hpsv2")):
        with pytest.raises(UserError, match=r"--judges.*: give one or more, and none twice"):
            judges_of(cq.Settings(judges=wrong))


def test_hpsv2_is_trained_with_its_models_own_scale(random_judges):
    """It is known once the weights are there."""
    weights = torch.load(random_judges / "hpsv2/HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    assert judge(HPSv2, random_judges).logit_scale == pytest.approx(weights["logit_scale"].float().exp().item())
    assert judge(PickScore, random_judges).logit_scale == 1 and CLIPScore("").logit_scale is None


# -------------------------------------------------------------------------------------------------------------------


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
    got = judge(HPSv2, random_judges)(images, PROMPTS)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.std(expected) > 1e-3


def test_batches_and_repeated_prompts_change_nothing(random_judges, images):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[1], "x " * 200]
    for kind in (PickScore, HPSv2, CLIPScore, PaperCLIPScore, ImageReward, Aesthetic):
        score = judge(kind, random_judges)
        single = torch.cat([score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
        torch.testing.assert_close(score(images, prompts), single, atol=1e-5, rtol=1e-4)


def test_preprocessing_of_the_processor_is_clips(random_judges):
    """The processor file that make_judges writes has CLIP's own settings at another size."""
    mine = CLIPImageProcessor.from_pretrained(random_judges / "pickscore")
    for key in ("image_mean", "image_std", "do_center_crop", "do_normalize", "do_resize"):
        assert getattr(mine, key) == getattr(CLIPImageProcessor(), key), key
    assert int(mine.resample) == 3
