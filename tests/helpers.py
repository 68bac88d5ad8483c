"""What several test files need: child processes, the loops of the scripts, pictures, small random judges."""

import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from dipo import cli
from dipo.batches import Batch
from dipo.files import ROOT
from dipo.rows import read_rows
from dipo.settings import DEMO_PATHS

STUDIES = ("compare_quality", "Ablation_experiment", "Semantic_Categories", "Human_Preference_compare")
SAMPLERS = ("hasty_sample", *STUDIES)
SCRIPTS = (*SAMPLERS, "train_dipo", "download_models")
# Processes of their own, forked from a server that has imported the scripts, so that each costs no imports.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([*SCRIPTS])
PROMPTS = ["a landscape with red hills under a white sky and a yellow sun", "abstract art of a blue star"]


def script(name):
    return importlib.import_module(name)


def fresh_accelerator():
    """What accelerate keeps of one run for the next in the same process goes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def listen_to_ctrl_c():
    """A shell starts the jobs of a script in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def popen(*command, **options):
    """A child process to which Ctrl-C can be sent."""
    return subprocess.Popen([str(x) for x in command], preexec_fn=listen_to_ctrl_c, text=True, **options)


def start(*command, cwd=None, timeout=300, **environment):
    """A finished child process, its output as text."""
    env = os.environ | environment
    command = [str(x) for x in command]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, preexec_fn=listen_to_ctrl_c
    )


def run(name, *arguments):
    """A script from the command line to its end."""
    module = script(name)
    sys.argv = [f"{name}.py", *map(str, arguments)]
    again = ["--resume goes on"] if name == "train_dipo" else []
    cli.run(module.main, module.Settings, module.__doc__, *again)


def inside(name, arguments, folder, log, environment, before):
    """The life of a process of PROCESSES: in a folder, with its output in files of it. before: (a function, what it is
    given besides the script's module), called first."""
    gc.freeze()
    os.chdir(folder)
    os.environ |= environment
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}{end}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if before:
        before[0](script(name), *before[1:])
    run(name, *arguments)


def fork(*of_inside):
    """A process of PROCESSES, started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the server finds the scripts
        multiprocessing.forkserver.ensure_running()
    process = PROCESSES.Process(target=inside, args=of_inside)
    process.start()
    return process


def start_two(name, *flags, cwd, before=()):
    """A script on two processes of this machine's CPU, as a launcher has it; what they wrote, and an exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environments = [world | {"RANK": k, "LOCAL_RANK": k} for k in "01"]
    processes = [fork(name, flags, cwd, f"process-{x['RANK']}-", x, before) for x in environments]
    try:
        multiprocessing.connection.wait([p.sentinel for p in processes], 300)
        for p in processes:
            # Where one has failed, a launcher ends the other.
            p.join(0 if any(q.exitcode for q in processes) else 300)
    finally:
        for p in processes:
            p.kill()
            p.join()
    out, err = ("".join((cwd / f"process-{k}-{end}.log").read_text() for k in "01") for end in ("out", "err"))
    return SimpleNamespace(returncode=max(abs(p.exitcode) for p in processes), stdout=out, stderr=err)


def launch_two(name, *flags, cwd):
    """The same by torch's own launcher."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return start(*launch, ROOT / f"{name}.py", *flags, cwd=cwd, OMP_NUM_THREADS="1")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def demo_settings(name="hasty_sample", **more):
    """A script's settings with the demo's models."""
    module = script(name)
    paths = {k: v for k, v in DEMO_PATHS.items() if hasattr(module.Settings, k)}
    return module.Settings(**paths, **more)


def study_rows(*files, **more):
    """The rows of such files, for compare_quality.py with the demo's models."""
    return read_rows(demo_settings("compare_quality", rows=files, timestep_spacing="leading", **more), [])


def load(name="hasty_sample", **more):
    """The demo model as a script loads it, float32 on the CPU."""
    return script(name).load_pipeline(demo_settings(name, **more), torch.device("cpu"), torch.float32)


def latents(pipe, prompts, tau, eta=0.0, w=5.0, seeds=(0, 1), size=(64, 64), name="hasty_sample", **more):
    """What a script's loop makes of prompts and seeds."""
    batch = Batch(pipe, list(prompts), list(seeds), *size)
    return script(name).sample(pipe, batch, tau, eta, w, **more)


# ------------------------------------------------------------------------------------------------------- the loop alone


class Noise(Batch):
    """A batch of one image whose noise is what it was given, in float64."""

    def __init__(self, *values, shape=(1, 4, 8, 8)):
        self.prompts, self.height, self.width, self.device = [""], 64, 64, torch.device("cpu")
        self.values = [torch.full(shape, float(v), dtype=torch.float64) for v in values]

    def noise(self):
        return self.values.pop(0)


def bare_pipe(unet, alphas_cumprod):
    """A pipeline that has no more than the loop asks for: a function of x and t as its UNet, and alpha_bar."""
    config = SimpleNamespace(prediction_type="epsilon")
    scheduler = SimpleNamespace(alphas_cumprod=alphas_cumprod, final_alpha_cumprod=alphas_cumprod[0], config=config)
    text = (torch.zeros(1, 77, 8, dtype=torch.float64), None, torch.zeros(1, 8, dtype=torch.float64), None)

    def call(x, t, **_):
        return (unet(x, t),)

    call.device = torch.device("cpu")
    return SimpleNamespace(unet=call, scheduler=scheduler, encode_prompt=lambda *_, **__: text)


def coefficients(a_t, a_next, eta, name="hasty_sample"):
    """The (a, b, sigma) of a loop's one step x_next = a x + b e + sigma z from alpha_bar a_t to a_next, in float64."""
    alphas = torch.tensor([a_next, a_t], dtype=torch.float64)

    def step(x, e, z):
        pipe = bare_pipe(lambda *_: torch.full((1, 4, 8, 8), float(e), dtype=torch.float64), alphas)
        return script(name).sample(pipe, Noise(x, z), [1], eta, 1.0)[0, 0, 0, 0].item()

    return step(1, 0, 0), step(0, 1, 0), step(0, 0, 1)


# ----------------------------------------------------------------------------------------------------- random judges

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *("a", "photo", "of", "the", "red", "cat", "dog", "hills", ",", "sky", "##s"),
]
MED = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "layer_norm_eps": 1e-12}
MED |= {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "encoder_width": 768,
}
MED |= {"max_position_embeddings": 64, "pad_token_id": 0, "vocab_size": len(WORDS) + 2, "add_cross_attention": True}
MED |= {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02}


def imagereward_shapes(width=128, depth=2, image_size=32):
    """The tensors of an ImageReward.pt, with a small ViT of patches of 16 and the sizes of MED."""
    hidden, inner = MED["hidden_size"], MED["intermediate_size"]
    linear = {"blip.vision_proj": (256, width), "blip.text_proj": (256, hidden)}
    linear |= {f"mlp.layers.{i}": s for i, s in zip((0, 2, 4, 6, 7), head_shapes(hidden), strict=True)}
    norms, bare = {"blip.visual_encoder.norm": width}, {}
    for i in range(depth):
        block = f"blip.visual_encoder.blocks.{i}."
        norms |= {f"{block}norm1": width, f"{block}norm2": width}
        linear |= {f"{block}attn.qkv": (3 * width, width), f"{block}attn.proj": (width, width)}
        linear |= {f"{block}mlp.fc1": (4 * width, width), f"{block}mlp.fc2": (width, 4 * width)}
    for i in range(MED["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{i}."
        for kind, source in (("attention", hidden), ("crossattention", width)):
            inputs = {"self.query": hidden, "self.key": source, "self.value": source, "output.dense": hidden}
            linear |= {f"{layer}{kind}.{name}": (hidden, n) for name, n in inputs.items()}
            norms[f"{layer}{kind}.output.LayerNorm"] = hidden
        linear |= {f"{layer}intermediate.dense": (inner, hidden), f"{layer}output.dense": (hidden, inner)}
        norms[f"{layer}output.LayerNorm"] = hidden
    text = "blip.text_encoder.embeddings."
    norms[f"{text}LayerNorm"] = hidden
    bare |= {f"{text}word_embeddings.weight": (MED["vocab_size"], hidden)}
    bare |= {f"{text}position_embeddings.weight": (MED["max_position_embeddings"], hidden)}
    image = "blip.visual_encoder."
    bare |= {f"{image}cls_token": (1, 1, width), f"{image}pos_embed": (1, (image_size // 16) ** 2 + 1, width)}
    linear[f"{image}patch_embed.proj"] = (width, 3, 16, 16)
    bare |= {f"{name}.weight": shape for name, shape in linear.items()}
    bare |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return bare | {f"{name}.{kind}": (n,) for name, n in norms.items() for kind in ("weight", "bias")}


def head_shapes(width):
    return [(1024, width), (128, 1024), (64, 128), (16, 64), (1, 16)]


def random_weights(shapes, seed=0):
    """Such that every tensor tells in what comes out."""
    g, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g)
        weights[name] = x * 0.3 if len(shape) == 1 or "embed" in name else x * (1.5 / x[0].numel() ** 0.5)
        if "norm" in name.lower() and name.endswith("weight"):
            weights[name] += 1
    return weights


def save_imagereward(folder, tokenizer):
    """A small random ImageReward.pt with med_config.json, and BERT's tokenizer with few words; as on the hub."""
    folder.mkdir()
    weights = random_weights(imagereward_shapes())
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    from transformers import BertTokenizer

    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(tokenizer / "vocab.txt"), do_lower_case=True).save_pretrained(tokenizer)
    (tokenizer / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    (tokenizer / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')


def save_aesthetic(folder, width):
    folder.mkdir()
    shapes = {f"layers.{i}.weight": s for i, s in zip((0, 2, 4, 6, 7), head_shapes(width), strict=True)}
    shapes |= {k.replace("weight", "bias"): s[:1] for k, s in shapes.items()}
    torch.save(random_weights(shapes), folder / "aesthetic-model.pth")
