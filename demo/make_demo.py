"""Make the demo model in assets/demo/sdxl: Stable Diffusion XL in miniature, trained from nothing on demo/world.py.

    python demo/make_demo.py                      # every stage, about 80 minutes on 2 CPU cores
    python demo/make_demo.py --stages vae unet    # some of them
    python demo/make_demo.py --unet-steps 20000   # longer; a stage that was stopped goes on from its last checkpoint

Stages, in order:
    pictures  draw the training pictures (build/pictures.npy) and their captions
    text      train both CLIP text encoders to know which colour belongs to which part of the caption
    vae       train the AutoencoderKL (64x64x3 to 16x16x4)
    details   train it further with a loss that counts edges more
    latents   encode all pictures and captions once
    unet      train the UNet2DConditionModel on noise prediction, with SDXL's betas and 10 % dropped captions; its state
              after 1,000 steps stays in build/unet_early.pt, a source of worse pictures for demo/make_pairs.py
    export    write assets/demo/sdxl (fp16 safetensors) for StableDiffusionXLPipeline.from_pretrained
    measure   run demo/measure.py, which writes the figures in assets/demo/README.md

Everything random is seeded. Intermediate files lie in --build-dir (ignored by git) and can be deleted afterwards.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from common import to_tensor, train
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dipo import cli
from dipo.files import written_whole

STAGES = ("pictures", "text", "vae", "details", "latents", "unet", "export", "measure")
HIDDEN_SIZES = (96, 160)
PROJECTION_DIM = 160
TIME_EMBED_DIM = 32
CATEGORIES = tuple(world.SLOTS)
SLOT_NAMES = tuple(dict.fromkeys(slot for slots in world.SLOTS.values() for slot in slots))
FILLERS = (
    "a",
    "the",
    "very",
    "beautiful",
    "photo",
    "picture",
    "of",
    "in",
    "style",
    "detailed",
    "old",
    "big",
    "and",
    "with",
    "night",
)
EARLY_STEP = 1000
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass
class Settings:
    stages: tuple[str, ...] = STAGES
    """which stages to run, in the order given above"""
    output_dir: str = "assets/demo/sdxl"
    """where the finished pipeline goes"""
    build_dir: str = "demo/build"
    """checkpoints and intermediate files"""
    pictures: int = 30000
    """training pictures"""
    text_steps: int = 2000
    """optimizer steps of the text encoders, 64 captions each"""
    vae_steps: int = 2500
    """optimizer steps of the VAE, 16 pictures each"""
    details_steps: int = 1300
    """further optimizer steps of the VAE, 16 pictures each"""
    unet_steps: int = 6000
    """optimizer steps of the UNet, 32 pictures each"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    seed: int = 0
    """every random choice follows from it"""


def rng_of(seed: int, stage: int, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, stage, step])


def torch_rng_of(seed: int, stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng_of(seed, stage, step).integers(2**62)))


# ------------------------------------------------------------------------------------------------------------- pictures


def draw_range(seed: int, start: int, stop: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Pictures start..stop-1 (uint8, N x 64 x 64 x 3) and for each its scene's index in world.scenes("train") and the
    wording of its caption. The three categories come equally often."""
    pool = world.scenes("train")
    by_category = {c: [i for i, s in enumerate(pool) if s.category == c] for c in CATEGORIES}
    pictures, labels = np.empty((stop - start, world.SIZE, world.SIZE, 3), np.uint8), []
    for k in range(start, stop):
        rng = rng_of(seed, 0, k)
        choices = by_category[CATEGORIES[k % 3]]
        scene = choices[rng.integers(len(choices))]
        pictures[k - start] = np.asarray(world.draw(pool[scene], rng))
        labels.append((scene, int(rng.integers(world.WORDINGS))))
    return pictures, labels


def make_pictures(s: Settings, build: Path) -> None:
    if (build / "pictures.npy").exists():
        return
    starts = range(0, s.pictures, 500)
    with ProcessPoolExecutor() as pool:
        stops = [min(a + 500, s.pictures) for a in starts]
        parts = list(tqdm(pool.map(draw_range, [s.seed] * len(stops), starts, stops), total=len(stops), desc="pictures"))
    np.save(build / "labels.npy", np.array([label for _, labels in parts for label in labels]))
    with written_whole(build / "pictures.npy") as part, open(part, "wb") as f:
        np.save(f, np.concatenate([p for p, _ in parts]))


def all_captions() -> list[list[str]]:
    """All wordings of every training scene."""
    return [[world.caption(s, w) for w in range(world.WORDINGS)] for s in world.scenes("train")]


# ----------------------------------------------------------------------------------------------------------------- text


def make_tokenizers(build: Path) -> None:
    """A byte-level BPE vocabulary in CLIP's layout, large enough that every word of the world is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    corpus = [c for wordings in all_captions() for c in wordings] + list(FILLERS) * 50
    trainer = trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    # CLIP's order: the printable bytes from "!" on first, so that "!" has id 0, the padding of SDXL's second tokenizer.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    # The files of CLIP's own tokenizers, which every version of transformers reads.
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        folder = build / name
        folder.mkdir(exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
        config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_text(build: Path, trained: bool = True):
    """Both tokenizers and both text encoders (float32)."""
    tokenizers = [CLIPTokenizer.from_pretrained(build / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = []
    for i, tokenizer in enumerate(tokenizers):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZES[i],
            intermediate_size=4 * HIDDEN_SIZES[i],
            num_hidden_layers=3,
            num_attention_heads=HIDDEN_SIZES[i] // 32,
            projection_dim=PROJECTION_DIM,
            max_position_embeddings=77,
            hidden_act=("quick_gelu", "gelu")[i],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoders.append((CLIPTextModel, CLIPTextModelWithProjection)[i](config))
    if trained:
        saved = torch.load(build / "text.pt", weights_only=True)
        for i, encoder in enumerate(encoders):
            encoder.load_state_dict(saved[f"encoder{i}"])
            encoder.eval().requires_grad_(False)
    return tokenizers, encoders


def encode_text(tokenizers, encoders, texts: list[str], length: int = 77):
    """SDXL's two embeddings of a caption: the last but one hidden states of both encoders side by side (B, L, 256), and
    the second's projection (B, 160); with them the first encoder's own pooled output (B, 96) and the states at the end
    token (B, 256), which only the training of the encoders uses."""
    states, pooled, ends = [], [], []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled.append(out[0] if hasattr(out, "text_embeds") else out.pooler_output)
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        ends.append(states[-1][torch.arange(len(texts)), end])
    return torch.cat(states, dim=-1), pooled[1], pooled[0], torch.cat(ends, dim=-1)


def with_fillers(text: str, rng: np.random.Generator) -> str:
    """The caption, in three cases of ten with one to three words that mean nothing here put in before or after."""
    if rng.random() < 0.7:
        return text
    for _ in range(rng.integers(1, 4)):
        word = FILLERS[rng.integers(len(FILLERS))]
        if rng.random() < 0.4:
            word = "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9)))
        text = f"{word} {text}" if rng.random() < 0.5 else f"{text} {word}"
    return text


def train_text(s: Settings, build: Path) -> None:
    """Train the encoders so that a linear layer reads category, shape and the colour of every part from what the UNet
    gets of a caption. No picture takes part, unlike in CLIP's own training."""
    if not (build / "tokenizer_2" / "tokenizer_config.json").exists():
        make_tokenizers(build)
    torch.manual_seed(s.seed)
    tokenizers, encoders = load_text(build, trained=False)
    names = list(world.COLOURS)
    outputs = len(SLOT_NAMES) * len(names) + len(world.SHAPES) + len(CATEGORIES)
    heads = torch.nn.ModuleList(torch.nn.Linear(n, outputs) for n in (PROJECTION_DIM, HIDDEN_SIZES[0], sum(HIDDEN_SIZES)))
    state = {"encoder0": encoders[0], "encoder1": encoders[1], "heads": heads}
    pool = world.scenes("train")
    by_category = [[x for x in pool if x.category == c] for c in CATEGORIES]

    def targets(scenes):
        rows = []
        for x in scenes:
            slots = world.SLOTS[x.category]
            row = [names.index(x.colour(slot)) if slot in slots else -100 for slot in SLOT_NAMES]
            row += [world.SHAPES.index(x.shape) if x.shape else -100, CATEGORIES.index(x.category)]
            rows.append(row)
        return torch.tensor(rows)

    sizes = [len(names)] * len(SLOT_NAMES) + [len(world.SHAPES), len(CATEGORIES)]

    def loss_of(scenes, rng):
        texts = [with_fillers(world.caption(x, rng.integers(world.WORDINGS)), rng) for x in scenes]
        _, projected, first, ends = encode_text(tokenizers, encoders, texts, length=40)
        wanted, losses, right = targets(scenes), [], []
        for head, features in zip(heads, (projected, first, ends), strict=True):
            for logits, target in zip(head(features).split(sizes, dim=1), wanted.T, strict=True):
                losses.append(F.cross_entropy(logits, target, ignore_index=-100))
                right.append((logits.argmax(1) == target)[target >= 0])
        return torch.stack(losses).mean(), torch.cat(right).float().mean().item()

    def step(i):
        rng = rng_of(s.seed, 1, i)
        chosen = [by_category[k % 3][rng.integers(len(by_category[k % 3]))] for k in range(64)]
        return loss_of(chosen, rng)[0]

    train(build / "text.pt", state, step, s.text_steps, 1e-3, s.checkpoint_every)
    with torch.no_grad():
        right = loss_of(world.sample_scenes("held_out", 243, 0), rng_of(s.seed, 1, 10**9))[1]
    print(f"text: {100 * right:.1f} % of the parts of 243 held-out captions are read right")


# ------------------------------------------------------------------------------------------------------------------ VAE


def make_vae(build: Path, trained: str | None = "vae") -> AutoencoderKL:
    """The VAE as it is after a stage ("vae" or "details"), or untrained."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=world.SIZE,
        force_upcast=False,
    )
    if trained:
        vae.load_state_dict(torch.load(build / f"{trained}.pt", weights_only=True)["vae"])
        vae.eval().requires_grad_(False)
    return vae


def through_vae(s: Settings, vae: AutoencoderKL, pictures: np.ndarray, stage: int, i: int):
    """16 training pictures x, half of the batches mirrored, their reconstruction from sampled latents, both
    (16, 3, 64, 64) float32, and the posterior."""
    rng = rng_of(s.seed, stage, i)
    x = to_tensor(pictures[np.sort(rng.choice(len(pictures), 16, replace=False))])
    if rng.random() < 0.5:
        x = x.flip(-1)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch_rng_of(s.seed, stage + 1, i))
        out = vae.decode(posterior.mean + posterior.std * noise).sample
    return x, out.float(), posterior


def train_vae(s: Settings, build: Path) -> None:
    pictures = np.load(build / "pictures.npy", mmap_mode="r")
    torch.manual_seed(s.seed)
    vae = make_vae(build, trained=None)

    def step(i):
        x, out, posterior = through_vae(s, vae, pictures, 2, i)
        return F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x) + 1e-6 * posterior.kl().mean()

    train(build / "vae.pt", {"vae": vae}, step, s.vae_steps, 2e-3, s.checkpoint_every)


def train_details(s: Settings, build: Path) -> None:
    """The same VAE further, with errors near edges counted more: the first stage still loses the eyes of portraits."""
    pictures = np.load(build / "pictures.npy", mmap_mode="r")
    vae = make_vae(build).train().requires_grad_(True)

    def step(i):
        x, out, posterior = through_vae(s, vae, pictures, 5, i)
        error = out - x
        edges = (x - F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)).abs().mean(dim=1, keepdim=True)
        weighted = (1 + 8 * edges) * (error.square() + 0.1 * error.abs())
        return weighted.mean() + 1e-7 * posterior.kl().mean()

    train(build / "details.pt", {"vae": vae}, step, s.details_steps, 1e-3, s.checkpoint_every)


# -------------------------------------------------------------------------------------------------------- latents, UNet


@torch.no_grad()
def make_latents(s: Settings, build: Path) -> None:
    """latents.pt: the posterior means of all pictures, scaled to unit variance, and the scale; and SDXL's embeddings of
    every wording of every training scene."""
    path = build / "latents.pt"
    sources = ("pictures.npy", "text.pt", "details.pt")
    if path.exists() and path.stat().st_mtime > max((build / name).stat().st_mtime for name in sources):
        return
    vae = make_vae(build, "details")
    pictures = np.load(build / "pictures.npy", mmap_mode="r")
    latents = []
    for i in tqdm(range(0, len(pictures), 50), desc="latents"):
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(to_tensor(pictures[i : i + 50])).latent_dist.mean.float())
    latents = torch.cat(latents)
    scale = 1 / latents.std().item()
    tokenizers, encoders = load_text(build)
    captions, states, pooled = all_captions(), None, None
    # Captions of no picture stay zero.
    for scene in tqdm(np.unique(np.load(build / "labels.npy")[:, 0]), desc="captions"):
        a, b, *_ = encode_text(tokenizers, encoders, captions[scene])
        if states is None:
            states, pooled = (torch.zeros(len(captions), *x.shape, dtype=torch.float16) for x in (a, b))
        states[scene], pooled[scene] = a.half(), b.half()
    saved = {
        "latents": (latents * scale).half(),
        "scale": scale,
        "states": states,
        "pooled": pooled,
    }
    with written_whole(path) as part:
        torch.save(saved, part)


def make_unet() -> UNet2DConditionModel:
    """SDXL's layout (no attention at the highest resolution, text_time embedding), 6.0 million parameters."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=sum(HIDDEN_SIZES),
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED_DIM,
        projection_class_embeddings_input_dim=PROJECTION_DIM + 6 * TIME_EMBED_DIM,
    )


def train_unet(s: Settings, build: Path) -> None:
    data = torch.load(build / "latents.pt", weights_only=True)
    labels = torch.from_numpy(np.load(build / "labels.npy"))
    torch.manual_seed(s.seed)
    unet = make_unet()
    ema = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    scheduler = DDPMScheduler(**BETAS)
    time_ids = torch.tensor([[world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE]], dtype=torch.float32)

    def step(i):
        if i == EARLY_STEP:
            torch.save(ema.state_dict(), build / "unet_early.pt")
        g = torch_rng_of(s.seed, 4, i)
        rows = torch.randint(len(labels), (32,), generator=g)
        x = data["latents"][rows].float()
        scene, wording = labels[rows].T
        # Dropped captions are zeros, as in the unconditional half of SDXL's pipeline (force_zeros_for_empty_prompt).
        keep = (torch.rand(32, generator=g) >= 0.1).float()
        states = data["states"][scene, wording].float() * keep[:, None, None]
        pooled = data["pooled"][scene, wording].float() * keep[:, None]
        t = torch.randint(1000, (32,), generator=g)
        noise = torch.randn(x.shape, generator=g)
        conditions = {"text_embeds": pooled, "time_ids": time_ids.expand(32, -1)}
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(scheduler.add_noise(x, noise, t), t, states, added_cond_kwargs=conditions).sample
        # Min-SNR weighting (Hang et al. 2023), gamma 5: the late, nearly noiseless steps do not drown the early ones.
        weight = (5 / compute_snr(scheduler, t)).clamp(max=1)
        return (weight * (out.float() - noise).square().mean(dim=(1, 2, 3))).mean()

    train(build / "unet.pt", {"unet": unet}, step, s.unet_steps, 1e-3, s.checkpoint_every, ema=ema)


# --------------------------------------------------------------------------------------------------------------- export


def export(s: Settings, build: Path) -> None:
    tokenizers, encoders = load_text(build)
    vae, unet = make_vae(build, "details"), make_unet()
    ema = EMAModel(unet.parameters())
    ema.load_state_dict(torch.load(build / "unet.pt", weights_only=True)["ema"])
    ema.copy_to(unet.parameters())
    vae.register_to_config(scaling_factor=torch.load(build / "latents.pt", weights_only=True)["scale"])
    pipe = StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=encoders[0].half(),
        text_encoder_2=encoders[1].half(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.half(),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(s.output_dir)
    # The first text encoder's weights under the names that SDXL's own file has and every version of transformers reads.
    path = Path(s.output_dir) / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(Path(s.output_dir) / name)
        shutil.copytree(build / name, Path(s.output_dir) / name)
    # As in SDXL base's own file: keys of other schedulers, without which DDIMScheduler.from_config would clip latents.
    path = Path(s.output_dir) / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(p.stat().st_size for p in Path(s.output_dir).rglob("*") if p.is_file())
    print(f"{s.output_dir}: {size / 1e6:.1f} MB, UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")


def measure(s: Settings, build: Path) -> None:
    model = [] if s.output_dir == Settings().output_dir else ["--model", s.output_dir]
    subprocess.run([sys.executable, str(Path(__file__).with_name("measure.py")), *model], check=True)


def main(s: Settings) -> None:
    unknown = [x for x in s.stages if x not in STAGES]
    if unknown:
        raise cli.UserError(f"no stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    build = Path(s.build_dir)
    build.mkdir(parents=True, exist_ok=True)
    made_with = {"seed": s.seed, "pictures": s.pictures}
    note = build / "made_with.json"
    if note.exists() and json.loads(note.read_text()) != made_with:
        raise cli.UserError(f"{build} was begun with {note.read_text()}; give another --build-dir, or delete it")
    note.write_text(json.dumps(made_with))
    functions = (make_pictures, train_text, train_vae, train_details, make_latents, train_unet, export, measure)
    for name, function in zip(STAGES, functions, strict=True):
        if name in s.stages:
            function(s, build)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
