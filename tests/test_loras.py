"""LoRAs: every layout moves the weights by exactly strength * scale * B A, and nothing else; what does not fit is named."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import SAMPLERS, demo_settings, latents, load, script
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dipo import loras
from dipo.checks import check_lora, check_sampling
from dipo.cli import UserError
from dipo.files import lora_and_strength, lora_names
from dipo.loras import diffusers_name, weights_by_name

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn"
TEXT = "text_model.encoder.layers.1."
# Linear layers, convolutions of 3x3 and 1x1, and layers of all text encoders, each with its own rank.
UNET = {f"{ATTENTION}1.to_q": 2, f"{ATTENTION}2.to_k": 3, f"{ATTENTION}2.to_out.0": 4, "up_blocks.1.resnets.0.conv2": 2}
UNET |= {
    "up_blocks.1.resnets.0.conv_shortcut": 2,
    "down_blocks.1.attentions.0.proj_in": 3,
    "down_blocks.0.downsamplers.0.conv": 2,
}
UNET |= {
    "mid_block.resnets.1.time_emb_proj": 1,
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": 3,
    "conv_in": 2,
}
ENCODER = {f"{TEXT}self_attn.q_proj": 2, f"{TEXT}self_attn.out_proj": 3, f"{TEXT}mlp.fc1": 2}


def merge_loras(pipe, entries, strict=True):
    """As a script's load_pipeline does it, which reads them before the pipeline."""
    read = [loras.read_lora(entry, pipe.unet.config.cross_attention_dim) for entry in entries]
    loras.merge_loras(pipe, read, strict)


@pytest.fixture(scope="module")
def sdxl():
    return load()


@pytest.fixture(scope="module")
def sd15(sdxl):
    """A random StableDiffusionPipeline as SD 1.5 is built: one text encoder, convolutions around its attention."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=32, sample_size=8, **blocks
    )
    config = CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    pipe = StableDiffusionPipeline(
        *(None, CLIPTextModel(config), sdxl.tokenizer, unet, DDIMScheduler(), None, None), requires_safety_checker=False
    )
    return pipe


def models(pipe):
    return {m: getattr(pipe, m) for m in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, m, None) is not None}


def weights(pipe):
    return {f"{m}.{k}": v.clone() for m, model in models(pipe).items() for k, v in model.state_dict().items()}


def layer_weight(pipe, model, layer):
    """The name, as weights has it, of a layer's weight; text_model in front is no part of it in every transformers."""
    names = [f"{model}.{x}.weight" for x in (layer, layer.removeprefix("text_model."))]
    return next(n for n in names if n in weights(pipe))


def factors(pipe, seed=0, dtype=torch.float32):
    """Random (down, up, alpha) of each layer, by its model and its name in diffusers."""
    g, made = torch.Generator().manual_seed(seed), {}
    wanted = {("unet", k): r for k, r in UNET.items() if f"unet.{k}.weight" in weights(pipe)}
    wanted |= {(m, k): r for m in models(pipe) if m != "unet" for k, r in ENCODER.items()}
    for i, ((model, layer), rank) in enumerate(wanted.items()):
        out, *into = weights(pipe)[layer_weight(pipe, model, layer)].shape
        down = torch.randn(rank, *into, generator=g) / 4
        up = torch.randn(out, rank, *[1] * (len(into) - 1), generator=g) / 4
        made[model, layer] = (down.to(dtype), up.to(dtype), 1.5 + i)
    return made


def product(down, up):
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(len(up), *down.shape[1:])


def check(pipe, before, changes, atol=1e-6):
    """The weights have moved by changes, {(model, layer): float64}, and no other has moved at all."""
    after = weights(pipe)
    moved = {layer_weight(pipe, *key): change for key, change in changes.items()}
    assert after.keys() == before.keys() and len(moved) == len(changes) > 0
    for name, old in before.items():
        if name in moved:
            torch.testing.assert_close(after[name].double(), old.double() + moved[name], atol=atol, rtol=atol, msg=name)
            assert not torch.equal(after[name], old)
        else:
            assert torch.equal(after[name], old), name
    assert not any(isinstance(m, BaseTunerLayer) for model in models(pipe).values() for m in model.modules())


def kohya(layers, te="lora_te1_"):
    heads = {"unet": "lora_unet_", "text_encoder": te, "text_encoder_2": "lora_te2_"}
    tensors = {}
    for (model, layer), (down, up, alpha) in layers.items():
        name = heads[model] + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return tensors


ORIGINAL = {  # of the demo's UNet, which has one layer a block, by hand
    f"{ATTENTION}1.to_q": "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    f"{ATTENTION}2.to_k": "input_blocks_3_1_transformer_blocks_0_attn2_to_k",
    f"{ATTENTION}2.to_out.0": "input_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    "up_blocks.1.resnets.0.conv2": "output_blocks_2_0_out_layers_3",
    "up_blocks.1.resnets.0.conv_shortcut": "output_blocks_2_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "conv_in": "input_blocks_0_0",
}


def kohya_original(layers):
    return kohya({(m, ORIGINAL.get(k, k)): parts for (m, k), parts in layers.items()})


def kohya_sd15(layers):
    return kohya(layers, te="lora_te_")


def diffusers_old(layers, down="lora.down", up="lora.up"):
    pairs = {f"{m}.{k}": parts for (m, k), parts in layers.items()}
    return {f"{k}.{end}.weight": t for k, (*two, _) in pairs.items() for end, t in zip((down, up), two, strict=True)}


def diffusers_text(layers):
    """As its trainers wrote text encoders: lora_linear_layer."""
    text = {key: parts for key, parts in layers.items() if key[0] != "unet"}
    unet = {key: parts for key, parts in layers.items() if key[0] == "unet"}
    return diffusers_old(text, "lora_linear_layer.down", "lora_linear_layer.up") | diffusers_old(unet, "lora_A", "lora_B")


def diffusers_new(layers):
    return diffusers_old(layers, "lora_A", "lora_B")


def peft(layers, prefix="base_model.model.", adapter=""):
    layers = {k: parts for (m, k), parts in layers.items() if m == "unet"}
    names = (f"lora_A{adapter}.weight", f"lora_B{adapter}.weight")
    return {f"{prefix}{k}.{end}": t for k, (*two, _) in layers.items() for end, t in zip(names, two, strict=True)}


def peft_bare(layers):
    return peft(layers, "", ".default")


def processors(layers):
    """The attention processors' own state, which diffusers wrote in 2023, with and without a model in front."""
    layers = {(m, k): parts for (m, k), parts in layers.items() if "attn" in k}
    tensors = {}
    for (model, layer), (down, up, _) in layers.items():
        name = layer.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.").removesuffix(".0")
        name = name.replace("q_proj", "to_q").replace("out_proj", "to_out")
        model = "" if model == "unet" else f"{model}."
        tensors |= {f"{model}{name}_lora.down.weight": down, f"{model}{name}_lora.up.weight": up}
    return tensors


# Which layouts have an alpha of their own; the others' scale is 1.
@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("layout", [kohya, kohya_original])
def test_kohya(sdxl, tmp_path, layout, alpha):
    pipe, made = copy.deepcopy(sdxl), factors(sdxl)
    before, tensors = weights(pipe), layout(made)
    save_file({k: v for k, v in tensors.items() if alpha or not k.endswith("alpha")}, tmp_path / "a.safetensors")
    merge_loras(pipe, (f"{tmp_path}/a.safetensors:0.8",))
    check(pipe, before, {k: 0.8 * (a / len(d) if alpha else 1) * product(d, u) for k, (d, u, a) in made.items()})


LAYOUTS = [diffusers_old, diffusers_new, diffusers_text, processors, peft, peft_bare]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_without_alpha_have_full_strength_at_mixed_ranks(sdxl, tmp_path, layout, capfd):
    pipe, made = copy.deepcopy(sdxl), factors(sdxl)
    before, tensors = weights(pipe), layout(made)
    save_file(tensors, tmp_path / "a.safetensors")
    merge_loras(pipe, (f"{tmp_path}/a.safetensors:-0.5",))
    said = "its scale is in peft's adapter_config.json, which is not beside it; taken as 1"
    assert (said in capfd.readouterr().err) == (layout is peft)
    few = {k: v for k, v in made.items() if any(t is v[0] for t in tensors.values())}
    assert {len(d) for d, *_ in few.values()} > {2, 3} and (layout in LAYOUTS[4:] or {m for m, _ in few} == {*models(sdxl)})
    check(pipe, before, {k: -0.5 * product(d, u) for k, (d, u, _) in few.items()})


@pytest.mark.parametrize("layout", [kohya_sd15, *LAYOUTS])
def test_pipelines_with_one_text_encoder(sd15, tmp_path, layout):
    pipe, made = copy.deepcopy(sd15), factors(sd15)
    before, tensors = weights(pipe), layout(made)
    save_file(tensors, tmp_path / "a.safetensors")
    merge_loras(pipe, (f"{tmp_path}/a.safetensors",))
    few = {k: v for k, v in made.items() if any(t is v[0] for t in tensors.values())}
    assert before["unet.down_blocks.1.attentions.0.proj_in.weight"].ndim == 4
    check(pipe, before, {k: (a / len(d) if layout is kohya_sd15 else 1) * product(d, u) for k, (d, u, a) in few.items()})


def test_linear_factors_for_a_1x1_convolution_and_the_reverse(sd15, sdxl, tmp_path):
    """proj_in is the one in SD 1.5, the other in SDXL; trainers' shapes differ."""
    for pipe in map(copy.deepcopy, (sd15, sdxl)):
        before = weights(pipe)
        key = ("unet", "down_blocks.1.attentions.0.proj_in")
        down, up, alpha = factors(pipe)[key]
        change = product(down, up)
        other = [t.flatten(1) if t.ndim == 4 else t[..., None, None] for t in (down, up)]
        save_file(diffusers_new({key: (*other, alpha)}), tmp_path / "a.safetensors")
        merge_loras(pipe, (f"{tmp_path}/a.safetensors",))
        check(pipe, before, {key: change})


def test_several_are_merged_one_after_the_other_each_with_its_strength(sdxl, tmp_path):
    pipe, one, two = copy.deepcopy(sdxl), factors(sdxl, 1), factors(sdxl, 2)
    before = weights(pipe)
    save_file(kohya(one), tmp_path / "a:3.safetensors")  # a path with a colon that exists wins
    save_file(peft(two), tmp_path / "b.safetensors")
    merge_loras(pipe, (f"{tmp_path}/a:3.safetensors", f"{tmp_path}/b.safetensors:1e-1"))
    changes = {k: a / len(d) * product(d, u) for k, (d, u, a) in one.items()}
    for key, (d, u, _) in two.items():
        changes[key] += 0.1 * product(d, u) * (key[0] == "unet")
    check(pipe, before, changes)


@pytest.mark.parametrize(("lora", "base"), [("float16", "float32"), ("bfloat16", "float16"), ("float32", "bfloat16")])
def test_half_precision_products_are_computed_in_float32(sdxl, tmp_path, lora, base):
    """So that a half-precision weight is the nearest number to the exact sum."""
    lora, base = getattr(torch, lora), getattr(torch, base)
    pipe, made = copy.deepcopy(sdxl).to(base), factors(sdxl, dtype=lora)
    before = weights(pipe)
    save_file(kohya(made), tmp_path / "a.safetensors")
    merge_loras(pipe, (f"{tmp_path}/a.safetensors",))
    eps = torch.finfo(base).eps
    check(pipe, before, {k: a / len(d) * product(d, u) for k, (d, u, a) in made.items()}, atol=max(0.51 * eps, 1e-6))


# ------------------------------------------------------------------------------------------------- what libraries write


def random_adapter(model, **config):
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "conv1", "time_emb_proj"] if isinstance(model, UNet2DConditionModel) else ["q_proj", "fc1"]
    config = LoraConfig(**({"r": 4, "target_modules": targets, "init_lora_weights": False} | config))
    adapted = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + torch.rand_like(parameter)
    return adapted


PATTERNS = {"rank_pattern": {"attn2.to_k": 6, "conv1": 2}, "alpha_pattern": {r"down_blocks\.1\..*to_q": 5, "conv1": 7}}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, PATTERNS, PATTERNS | {"use_rslora": True}, {"use_dora": True}])
def test_a_folder_of_peft(sdxl, tmp_path, config):
    """Written by save_pretrained; expected both by peft's own merging and by the formulas."""
    adapted = random_adapter(sdxl.unet, lora_alpha=10, **config)
    adapted.save_pretrained(tmp_path / "lora")
    pipe, before = copy.deepcopy(sdxl), weights(sdxl)
    merge_loras(pipe, (str(tmp_path / "lora"),))
    merged = PeftModel.from_pretrained(copy.deepcopy(sdxl.unet), tmp_path / "lora").merge_and_unload().state_dict()
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight, merged[name], atol=1e-5, rtol=1e-5, msg=name)

    tensors, changes = load_file(tmp_path / "lora/adapter_model.safetensors"), {}
    for key, down in tensors.items():
        if "lora_A" not in key:
            continue
        layer, up = (
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"),
            tensors[key.replace("lora_A", "lora_B")],
        )
        alpha = 7 if layer.endswith("conv1") else 5 if layer.startswith("down_blocks.1.") and layer.endswith("to_q") else 10
        rank = 6 if layer.endswith("attn2.to_k") else 2 if layer.endswith("conv1") else 4
        alpha, rank = (alpha, rank) if "rank_pattern" in config else (10, 4)
        assert len(down) == rank
        w = before[f"unet.{layer}.weight"].double()
        change = product(down, up) * (alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
        if config.get("use_dora"):
            m = tensors[key.replace("lora_A.weight", "lora_magnitude_vector")].double().reshape(-1, *[1] * (w.ndim - 1))
            change = m * (w + change) / (w + change).flatten(1).norm(dim=1).reshape(m.shape) - w
        changes["unet", layer] = change
    check(pipe, before, changes)
    # A strength is the share of the whole change, also of DoRA's. The file is known by its configuration, whatever its name.
    pipe = copy.deepcopy(sdxl)
    (tmp_path / "lora/adapter_model.safetensors").rename(tmp_path / "lora/mine.safetensors")
    merge_loras(pipe, (f"{tmp_path}/lora/mine.safetensors:0.25",))
    assert lora_names((f"{tmp_path}/lora/mine.safetensors",))[1:] == [f"{tmp_path}/lora/adapter_config.json"]
    check(pipe, before, {k: 0.25 * v for k, v in changes.items()})


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_lycoris(sdxl, tmp_path, axis):
    """dora_scale has a number for each output, or in older files and OneTrainer's for each input."""
    pipe, made = copy.deepcopy(sdxl), factors(sdxl)
    before, tensors, changes = weights(pipe), kohya(made), {}
    g = torch.Generator().manual_seed(3)
    for key, (down, up, alpha) in made.items():
        w = before[layer_weight(pipe, *key)].double()
        shape = [n if d == axis else 1 for d, n in enumerate(w.shape)]
        m = torch.rand(shape, generator=g) + 0.5
        name = next(k for k, t in tensors.items() if t is down).replace("lora_down.weight", "dora_scale")
        tensors[name] = m
        v = w + alpha / len(down) * product(down, up)
        changes[key] = m.double() * v / v.square().sum([d for d in range(w.ndim) if d != axis], keepdim=True).sqrt() - w
    save_file(tensors, tmp_path / "a.safetensors")
    merge_loras(pipe, (f"{tmp_path}/a.safetensors",))
    check(pipe, before, changes)


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_what_diffusers_saves(sdxl, tmp_path, old, metadata):
    """save_lora_weights with and without the metadata that holds alpha: the weights as diffusers fuses them, and the images
    as it makes them unfused at a strength."""
    # In the old layout diffusers reads attention alone.
    few = {"unet": {"target_modules": ["to_q", "to_k"]}} if old else {}
    adapted = {m: random_adapter(model, lora_alpha=6, **few.get(m, {})) for m, model in models(sdxl).items()}
    layers = {m: get_peft_model_state_dict(a) for m, a in adapted.items()}
    layers = {m: {k.removeprefix("base_model.model."): v * 0.3 for k, v in state.items()} for m, state in layers.items()}
    states = {m: convert_state_dict_to_diffusers(state) if old else state for m, state in layers.items()}
    more = {}
    if metadata:
        more = {f"{m}_lora_adapter_metadata": a.peft_config["default"].to_dict() for m, a in adapted.items()}
    keys = {f"{m}_lora_layers": state for m, state in states.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "lora", **keys, **more)
    reference, pipe, before = copy.deepcopy(sdxl), copy.deepcopy(sdxl), weights(sdxl)
    merge_loras(pipe, (f"{tmp_path}/lora:0.5",))
    scale = 0.5 * (6 / 4 if metadata else 1)
    changes = {
        (m, k.removesuffix(".lora_A.weight")): scale * product(down, state[k.replace("lora_A", "lora_B")])
        for m, state in layers.items()
        for k, down in state.items()
        if "lora_A" in k
    }
    assert {m for m, _ in changes} == {"unet", "text_encoder", "text_encoder_2"}
    check(pipe, before, changes)
    reference.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors", adapter_name="a")
    reference.set_adapters(["a"], [0.5])
    prompts, tau = ["a red hill", "a blue star"], [999, 600, 200]
    theirs, ours, base = (latents(p, prompts, tau) for p in (reference, pipe, sdxl))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-2


def test_names_of_the_original_layout_are_those_of_diffusers(sdxl):
    """Every layer that kohya trains, in an SDXL of two layers a block, through diffusers' own conversion."""
    config = dict(sdxl.unet.config)
    config |= {
        "layers_per_block": 2,
        "block_out_channels": [16, 24, 32],
        "norm_num_groups": 8,
        "attention_head_dim": [1, 1, 2],
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    tails = ("attn1_to_q", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2")
    inner = [f"1_transformer_blocks_0_{tail}" for tail in tails] + ["1_proj_in", "1_proj_out"]
    resnet = [f"0_{x}" for x in ("in_layers_2", "out_layers_3", "emb_layers_1")]
    names = [f"input_blocks_{i}_{x}" for i in (1, 2, 4, 5, 7, 8) for x in resnet + inner * (i > 3)]
    names += [f"output_blocks_{i}_{x}" for i in range(9) for x in [*resnet, "0_skip_connection", *inner * (i < 6)]]
    names += [f"middle_block_{i}_{x[2:]}" for i in (0, 2) for x in resnet] + [f"middle_block_{x}" for x in inner]
    names += ["input_blocks_3_0_op", "input_blocks_6_0_op", "input_blocks_4_0_skip_connection"]
    names += ["output_blocks_2_2_conv", "output_blocks_5_2_conv"]
    known = weights_by_name(unet)
    blocks = {f"lora_unet_{name}.lora_down.weight": name for name in names}
    theirs = {}
    for key, name in _maybe_map_sgm_blocks_to_diffusers(dict(blocks), unet.config).items():
        theirs[name] = _convert_unet_lora_key(key).replace("_lora.down", ".lora.down").removesuffix(".lora.down.weight")
    assert len(theirs) == len(names) == len({*theirs.values()}) > 100
    for name in names:
        ours = diffusers_name(name, 2)
        assert ours in known and ours == diffusers_name(theirs[name]), name
    for name, ours in (
        ("time_embed_2", "time_embedding_linear_2"),
        ("label_emb_0_0", "add_embedding_linear_1"),
        ("out_2", "conv_out"),
    ):
        assert diffusers_name(name, 2) == ours and ours in known
    # Where no attention stands before it, as in SD 1.5's first up block, the upsampler is part 1.
    assert diffusers_name("output_blocks_2_1_conv", 2) == "up_blocks_0_upsamplers_0_conv"


# -------------------------------------------------------------------------------------------------- what does not fit


def merge(pipe, path, tensors, *, strict=True, **header):
    save_file(tensors, path, metadata=header)
    merge_loras(pipe, (str(path),), strict)


def refused(pipe, path, tensors, **options):
    """The one line that a file is refused with; nothing has moved."""
    before = weights(pipe)
    with pytest.raises(UserError) as e:
        merge(pipe, path, tensors, **options)
    assert all(torch.equal(before[k], v) for k, v in weights(pipe).items())
    line = str(e.value)
    assert line.startswith(f"--dpo-lora {path}: ") and "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize(
    ("model", "layer", "here"), [("unet", "conv_in", "64x36"), ("text_encoder_2", f"{TEXT}mlp.fc1", None)]
)
def test_layers_that_fit_nothing_are_named(sdxl, tmp_path, capfd, model, layer, here):
    path, made = tmp_path / "a.safetensors", factors(sdxl)
    here = here or "x".join(map(str, weights(sdxl)[layer_weight(sdxl, model, layer)].shape))
    wrong = {
        (model, "no.such.layer"): (torch.ones(2, 6), torch.ones(7, 2), 1.0),
        (model, layer): (torch.ones(2, 5), torch.ones(7, 2), 1.0),
    }
    right = {key: parts for key, parts in made.items() if key not in wrong}
    tensors = diffusers_new(wrong | right) | {
        f"unet.{ATTENTION}1.to_v.lora_A.weight": torch.ones(2, 96),
        "extra": torch.ones(1),
    }
    line, n = refused(sdxl, path, tensors), len(made) + 3
    assert f"4 of {n} layers fit nothing here (extra; " in line and "; ...); --no-lora-strict merges the others" in line
    problems = (f"{model}.{layer}: for a weight of 7x5, here it is {here}", f"{model}.no.such.layer: no such layer")
    problems += (f"unet.{ATTENTION}1.to_v: incomplete, has down",)
    assert sum(problem in line for problem in problems) == 2  # with "extra" the first three
    pipe, before = copy.deepcopy(sdxl), weights(sdxl)
    capfd.readouterr()
    merge(pipe, path, tensors, strict=False)
    warning = capfd.readouterr().err
    assert warning.startswith(f"warning: --dpo-lora {path}: 4 of {n} layers") and warning.count("\n") == 1
    check(pipe, before, {k: product(d, u) for k, (d, u, _) in right.items()})


def test_nothing_for_the_unet(sdxl, tmp_path):
    made = {key: parts for key, parts in factors(sdxl).items() if key[0] != "unet"}
    path = tmp_path / "a.safetensors"
    assert refused(sdxl, path, kohya(made)).endswith("nothing of it fits the UNet; --no-lora-strict merges the others")
    pipe, before = copy.deepcopy(sdxl), weights(sdxl)
    merge(pipe, path, kohya(made), strict=False)
    check(pipe, before, {k: a / len(d) * product(d, u) for k, (d, u, a) in made.items()})
    strange = {("unet", "a"): (torch.ones(2, 5), torch.ones(7, 2), 1.0)}
    assert "--no-lora-strict" not in refused(sdxl, path, kohya(strange), strict=False)


@pytest.mark.parametrize("layout", [kohya_original, diffusers_new, processors, peft])
@pytest.mark.parametrize("strict", [True, False])
def test_a_lora_of_another_family(sdxl, sd15, tmp_path, layout, strict, monkeypatch):
    """Though some of SD 1.5's shapes are SDXL's too."""
    path, made = tmp_path / "a.safetensors", factors(sdxl)
    _, up, alpha = made["unet", f"{ATTENTION}2.to_k"]
    made["unet", f"{ATTENTION}2.to_k"] = (torch.ones(3, 768), up, alpha)
    line = refused(sdxl, path, layout(made), strict=strict)
    assert "made for text embeddings of 768 numbers (SD 1.5), but this model's have 256; take both from the same" in line
    made["unet", f"{ATTENTION}2.to_k"] = (torch.ones(3, 2048), up, alpha)
    pipe = SimpleNamespace(unet=sd15.unet, text_encoder=sd15.text_encoder)
    monkeypatch.setitem(sd15.unet.config.__dict__, "cross_attention_dim", 768)
    line = refused(pipe, path, layout(made) if layout is not kohya_original else kohya_sd15(made), strict=strict)
    assert "of 2048 numbers (SDXL), but this model's have " in line


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {"lora_unet_a.lokr_w1": torch.ones(2), "lora_unet_a.alpha": torch.ones(())},
            "LyCORIS file (lora_unet_a.lokr_w1)",
        ),
        (
            {"lora_unet_a.hada_w1_a": torch.ones(2, 2), "lora_unet_a.alpha": torch.ones(())},
            "LyCORIS file (lora_unet_a.hada_w1_a)",
        ),
        (
            {f"lora_unet_a.lora_{x}.weight": torch.ones(2, 2, 1, 1) for x in ("mid", "up", "down")},
            "a LyCORIS file (lora_unet_a.lora_mid.weight)",
        ),
        ({"emb_params": torch.ones(4, 768)}, "no LoRA; it is a textual inversion, which"),
        ({"clip_l": torch.ones(4, 768), "clip_g": torch.ones(4, 1280)}, "a textual inversion"),
        ({"<cat>": torch.ones(768)}, "a textual inversion"),
        (
            {f"a{i}.weight": torch.ones(2, 2) for i in range(9)} | {"conv_in.weight": torch.ones(2)},
            "no LoRA; it is a UNet; give it as --dpo-unet",
        ),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3)}, "it is a UNet; give it as --dpo-unet"),
        ({"decoder.conv_in.weight": torch.ones(2, 4, 3, 3)}, "it is a VAE; give it as --vae"),
        (
            {"controlnet_cond_embedding.conv_in.weight": torch.ones(2, 4, 3, 3)},
            "it is a ControlNet, which has no place here",
        ),
        (
            {f"conditioner.a{i}.weight": torch.ones(1, 1, 1) for i in range(2)},
            "it is a whole checkpoint; give it as --base-model",
        ),
        (
            {f"a{i}.weight": torch.ones(2, 2) for i in range(9)},
            "it is of no kind that is known here; its first key is a0.weight",
        ),
    ],
)
def test_files_that_are_no_lora_say_what_they_are(sdxl, tmp_path, tensors, says):
    assert says in refused(sdxl, tmp_path / "a.safetensors", tensors, strict=False)


def test_what_cannot_be_read(sdxl, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    save_file(peft(factors(sdxl)), tmp_path / "adapter_model.safetensors")
    for name, says in (
        (path, "cannot be read ("),
        (tmp_path / "adapter_model.safetensors", "adapter_config.json"),  # without it the scale is not known
        ("nobody/nothing", "cannot be read (no folder, not in the hub's cache, and the hub is out of reach)"),
        ("nobody/nothing/a.safetensors", "not in the hub's cache"),
    ):
        with pytest.raises(UserError) as e:
            merge_loras(sdxl, (str(name),))
        assert str(e.value).startswith(f"--dpo-lora {name}: cannot be read (") and says in str(e.value)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "config", [[], {"lora_alpha": None}, {"lora_alpha": "8"}, {"lora_alpha": []}, {"lora_alpha": math.inf}]
)
def test_an_alpha_that_is_no_number(sdxl, tmp_path, config):
    save_file(peft(factors(sdxl)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot be read \((alpha of .* is .*, no finite number|.* no attribute .get.)\)"):
        merge_loras(sdxl, (str(tmp_path),))


def test_a_lora_is_read_before_a_model_is_loaded(sdxl, sd15, tmp_path, monkeypatch):
    made = factors(sd15)
    made["unet", f"{ATTENTION}2.to_k"] = (torch.ones(3, 768), *made["unet", f"{ATTENTION}2.to_k"][1:])
    save_file(kohya_sd15(made), tmp_path / "a.safetensors")
    for name in SAMPLERS:
        monkeypatch.setattr(script(name), "load_part", None)
        with pytest.raises(UserError, match="made for text embeddings of 768"):
            load(name, dpo_lora=(str(tmp_path / "a.safetensors"),))


def test_from_the_hubs_cache(sdxl, tmp_path, monkeypatch):
    """Offline: a named file, in a folder too, and the file of a repository, with peft's scale."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    made = factors(sdxl)
    unet = {k: parts for k, parts in made.items() if k[0] == "unet"}
    save_file(peft(made), snapshot / "adapter_model.safetensors")
    (snapshot / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 12, "r": 3}))
    save_file(kohya(made), snapshot / "sub/My LoRA [v1].safetensors")
    before = weights(sdxl)
    for name, changes in (
        ("owner/name:0.5", {k: 0.5 * 12 / len(d) * product(d, u) for k, (d, u, _) in unet.items()}),
        ("owner/name/adapter_model.safetensors", {k: 12 / len(d) * product(d, u) for k, (d, u, _) in unet.items()}),
        ("owner/name/sub/My LoRA [v1].safetensors", {k: a / len(d) * product(d, u) for k, (d, u, a) in made.items()}),
    ):
        check_lora(name)
        pipe = copy.deepcopy(sdxl)
        merge_loras(pipe, (name,))
        check(pipe, before, changes)


# ---------------------------------------------------------------------------------------------------------- settings


def test_names_and_strengths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.8").mkdir()
    for entry, parsed in {
        "a:0.8": ("a:0.8", 1.0),
        "a:0.8:0.5": ("a:0.8", 0.5),
        "owner/name": ("owner/name", 1.0),
        "b.safetensors:-1": ("b.safetensors", -1.0),
        "owner/name/b.safetensors:1e-2": ("owner/name/b.safetensors", 0.01),
    }.items():
        assert lora_and_strength(entry) == parsed
    assert lora_names(("a:0.8:0.5", "x/adapter_model.safetensors:2")) == [
        *("a:0.8", "x/adapter_model.safetensors", "x/adapter_config.json")
    ]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("", "'': no such file"),
        (":0.5", "'': no such file"),
        ("a.txt", "not a .safetensors file"),
        ("b/missing.txt", "no such file"),
        ("b/missing.safetensors", "no such file; give a folder, a .safetensors file or a hub name owner/name"),
        ("missing.safetensors", "no such file"),
        ("a.bin", "pickled"),
        ("owner/name/file.ckpt", "pickled"),
        ("owner/name/file.pt:0.5", "pickled"),
        ("a.safetensors:nan", "'nan' is no number"),
        ("a.safetensors:inf", "'inf' is no number"),
        ("a.safetensors:", "'' is no number"),
        ("a.safetensors:strong", "'strong' is no number; a strength stands behind a colon, as in a.safetensors:0.8"),
        ("empty", "holds no pytorch_lora_weights.safetensors and no adapter_model.safetensors"),
        ("several", "holds several LoRAs (a.safetensors, b.safetensors); name one"),
        ("C/", "no such file"),
    ],
)
def test_bad_names_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, entry, says):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.bin", "a.safetensors"):
        (tmp_path / name).touch()
    for name in ("empty/x", "several/a.safetensors", "several/b.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"^--dpo-lora ") as e:
        check_sampling(demo_settings(dpo_lora=("owner/name:0.5", entry)))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_good_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, *files in (("a", "pytorch_lora_weights.safetensors", "b.safetensors"), ("b", "x.safetensors"), ("c",)):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).touch()
    (tmp_path / "c/adapter_model.safetensors").touch()
    for name in (
        "a",
        "a/b.safetensors",
        "b",
        "c",
        "owner/name-v1.5",
        "owner/name/file.safetensors",
        "owner/name/a/b c.safetensors",
    ):
        check_lora(name)
        check_lora(f"{name}:0.3")


@pytest.mark.parametrize("name", SAMPLERS)
def test_scripts_take_several(sdxl, tmp_path, name):
    made = factors(sdxl)
    save_file(kohya(made), tmp_path / "a.safetensors")
    save_file(kohya(made) | {"extra": torch.ones(1)}, tmp_path / "b.safetensors")
    loras = (f"{tmp_path}/a.safetensors:0.5", f"{tmp_path}/b.safetensors:-0.25")
    with pytest.raises(UserError, match="extra"):
        load(name, dpo_lora=loras)
    pipe = load(name, dpo_lora=loras, lora_strict=False)
    check(pipe, weights(sdxl), {k: 0.25 * a / len(d) * product(d, u) for k, (d, u, a) in made.items()}, atol=2e-6)


def test_records_say_what_was_merged(run, sdxl, tmp_path):
    """As one string, as it always was; a LoRA changed in place is another."""
    from dipo.files import read_record

    save_file(kohya(factors(sdxl)), tmp_path / "a.safetensors")
    save_file(kohya(factors(sdxl, 1)), tmp_path / "b.safetensors")
    few = ("--demo", "--num-inference-steps", 2, "--limit", 1, "--device", "cpu", "--output-dir", "out")
    code, _, err = run("hasty_sample", *few, "--dpo-lora", "a.safetensors", "b.safetensors:0.1")
    assert code == 0, err
    assert read_record(tmp_path / "out/00000.png")["dpo_lora"] == "a.safetensors b.safetensors:0.1"
    assert run("hasty_sample", *few, "--dpo-lora", "a.safetensors", "b.safetensors:0.1")[0] == 0
    code, _, err = run("hasty_sample", *few, "--dpo-lora", "a.safetensors", "b.safetensors:0.2")
    assert code == 2 and "was made with dpo_lora 'a.safetensors b.safetensors:0.1', this run has" in err
    save_file(kohya(factors(sdxl, 2)), tmp_path / "b.safetensors")
    code, _, err = run("hasty_sample", *few, "--dpo-lora", "a.safetensors", "b.safetensors:0.1")
    assert code == 2 and "was made with weights" in err


def test_the_base_side_of_a_comparison_is_untouched(sdxl, tmp_path):
    """Text encoders too, though the tuned side has been loaded before it."""
    module = script("Human_Preference_compare")
    save_file(kohya(factors(sdxl)), tmp_path / "a.safetensors")
    s = replace(demo_settings("Human_Preference_compare", dpo_lora=(str(tmp_path / "a.safetensors"),)), dpo_unet="")
    study, seen = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32), []
    study.batches = lambda pipe, model: seen.append(weights(pipe)) or []
    for model in (s, replace(s, dpo_lora=())):
        module.make_images(model, study)
    tuned, base = seen
    plain = weights(module.load_pipeline(replace(s, dpo_lora=()), study.device, study.dtype))
    assert base.keys() == plain.keys() and all(torch.equal(base[k], v) for k, v in plain.items())
    moved = {k.split(".")[0] for k in tuned if not torch.equal(tuned[k], base[k])}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
