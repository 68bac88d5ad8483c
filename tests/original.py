"""Small random pipelines, and pipelines written out in the original layout, as single-file checkpoints have it."""

import re

import torch
from conftest import DEMO
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def renamed(weights, names):
    """The weights whose names begin with one of names, under the new beginning."""
    found = {}
    for key, value in weights.items():
        start = max((n for n in names if key.startswith(f"{n}.")), key=len, default=None)
        if start is not None:
            found[names[start] + key[len(start) :]] = value
    return found


def original_unet(unet):
    """ldm's names (openaimodel.py): input blocks are numbered through all levels, a downsampling is one of them."""
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    names |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    names |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"mid_block.attentions.0": "middle_block.1"}
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    n = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if block.downsamplers:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for j in range(len(block.resnets)):
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{1 + attends}.conv"
    names |= {f"{a}.{x}": f"{b}.{y}" for a, b in resnets.items() for x, y in RESNET.items()}
    weights = renamed(unet.state_dict(), names)
    assert len(weights) == len(unet.state_dict())
    return {f"model.diffusion_model.{k}": v for k, v in weights.items()}


def original_vae(vae):
    """ldm's names (autoencoder.py): the decoder's levels are numbered from below, attention is by 1x1 convolutions."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(vae.config.block_out_channels)
    for side, blocks, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for a, b in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            names[f"{side}.{a}"] = f"{side}.{b}"
        for a, b in (("resnets.0", "block_1"), ("attentions.0", "attn_1"), ("resnets.1", "block_2")):
            names[f"{side}.mid_block.{a}"] = f"{side}.mid.{b}"
        for i in range(levels):
            level = f"{side}.{blocks}.{i if side == 'encoder' else levels - 1 - i}"
            for j in range(vae.config.layers_per_block + (side == "decoder")):
                names[f"{side}.{blocks}_blocks.{i}.resnets.{j}"] = f"{level}.block.{j}"
            names[f"{side}.{blocks}_blocks.{i}.{sampler}rs.0.conv"] = f"{level}.{sampler}.conv"
    weights, parts = {}, {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_out.0": "proj_out"}
    parts |= {"to_q": "q", "to_k": "k", "to_v": "v"}
    for key, value in renamed(vae.state_dict(), names).items():
        is_matrix = re.search(r"attn_1\.(to_.*)\.weight", key)
        for a, b in parts.items():
            key = key.replace(f".{a}.", f".{b}.")
        weights[f"first_stage_model.{key}"] = value[:, :, None, None] if is_matrix else value
    assert len(weights) == len(vae.state_dict())
    return weights


def text_weights(encoder):
    return {
        f"text_model.{k.removeprefix('text_model.')}" if "projection" not in k else k: v
        for k, v in encoder.state_dict().items()
    }


def original_clip(encoder, prefix):
    return {prefix + k: v for k, v in text_weights(encoder).items()}


def original_open_clip(encoder, prefix):
    """open_clip's names: queries, keys and values in one matrix, the projection transposed."""
    weights, given = {}, text_weights(encoder)
    simple = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight"}
    simple |= {"text_model.embeddings.position_embedding.weight": "positional_embedding"}
    simple |= {f"text_model.final_layer_norm.{x}": f"ln_final.{x}" for x in ("weight", "bias")}
    for old, new in simple.items():
        weights[new] = given[old]
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer |= {"self_attn.out_proj": "attn.out_proj"}
    for i in range(encoder.config.num_hidden_layers):
        old, new = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            weights |= {f"{new}{b}.{kind}": given[f"{old}{a}.{kind}"] for a, b in layer.items()}
            weights[f"{new}attn.in_proj_{kind}"] = torch.cat([given[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"])
    if "text_projection.weight" in given:
        weights["text_projection"] = given["text_projection.weight"].T
    return {prefix + k: v for k, v in weights.items()}


def save_original(pipe, path, *marks):
    """The pipeline as one .safetensors file, with empty tensors of these names."""
    weights = original_unet(pipe.unet) | original_vae(pipe.vae) | {name: torch.tensor([]) for name in marks}
    if isinstance(pipe, StableDiffusionXLPipeline):
        weights |= original_clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        weights |= original_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.text_encoder.config.hidden_act == "gelu":
        weights |= original_open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        weights |= original_clip(pipe.text_encoder, "cond_stage_model.transformer.")
    save_file({k: v.contiguous() for k, v in weights.items()}, path)


def text_config(width, act, **more):
    words = {"vocab_size": 666, "bos_token_id": 664, "eos_token_id": 665, "hidden_act": act, "projection_dim": width}
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2, **words
    )


def small_pipeline(family="sd15", **scheduler):
    """A random pipeline of SDXL's ("sdxl"), SD 1.5's or SD 2.1's kind that makes pictures of 64 pixels, with the demo's
    words. scheduler: what differs from SD 1.5's configuration."""
    torch.manual_seed(0)
    unet = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    unet |= {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet |= {"cross_attention_dim": 32, "attention_head_dim": 8 if family == "sd15" else (2, 4)}
    unet |= {"use_linear_projection": family != "sd15", "upcast_attention": family == "sd21"}
    parts = {}
    if family == "sdxl":
        unet |= {"cross_attention_dim": 80, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        unet |= {"projection_class_embeddings_input_dim": 48 + 6 * 8}
        parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(48, "gelu"))
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(DEMO / "tokenizer_2")
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    channels = {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64}
    channels |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    config |= {"clip_sample": False, "set_alpha_to_one": False} | scheduler
    pipe = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    return pipe(
        unet=UNet2DConditionModel(**unet).eval(),
        vae=AutoencoderKL(**channels).eval(),
        text_encoder=CLIPTextModel(text_config(32, "gelu" if family == "sd21" else "quick_gelu")).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(DEMO / ("tokenizer_2" if family == "sd21" else "tokenizer")),
        scheduler=DDIMScheduler(**config),
        **parts,
    )
