"""A faster UNet: keys and values of the prompt once for all steps, and torch.compile."""

import contextlib
import sys

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from tqdm import tqdm

from dipo.cli import UserError, first_line
from dipo.models import Text

# torch.compile's options on a GPU, those of huggingface/diffusion-fast.
INDUCTOR = {
    "max_autotune": True,
    "triton.cudagraphs": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
}


class Given(torch.nn.Module):
    """A layer whose output is known, for all rows of its input or for the last ones."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.register_buffer("output", output, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output[-len(x) :]


@contextlib.contextmanager
def projected_once(unet: UNet2DConditionModel, text: Text):
    """Inside, cross-attention takes the keys and values of this text as computed here, once for all steps: they depend
    on nothing else. A compiled UNet finds them where those of the last batch of this size were, as CUDA graphs need."""
    layers, known = [], {}
    if isinstance(unet, UNet2DConditionModel) and unet.encoder_hid_proj is None:
        if unet._compiled_call_impl is not None:
            known = unet.__dict__.setdefault("known_projections", {}).setdefault(len(text.prompt_embeds), {})
        for m in unet.modules():
            if type(m).__name__ == "Attention" and m.is_cross_attention and m.norm_cross is None:
                names = ("to_kv",) if isinstance(m.processor, FusedAttnProcessor2_0) else ("to_k", "to_v")
                layers += [(m, name, getattr(m, name)) for name in names]
    try:
        for m, name, layer in layers:
            output = layer(text.prompt_embeds)
            if (m, name) in known:
                known[m, name].output.copy_(output)
            else:
                known[m, name] = Given(output)
            setattr(m, name, known[m, name])
        yield
    finally:
        for m, name, layer in layers:
            setattr(m, name, layer)


def compile_unet(pipe: DiffusionPipeline) -> None:
    """Have torch.compile take the UNet, with its attention's projections fused and its images as channels_last, on a GPU
    the VAE's decoder too, at its next calls. What is compiled stays in torch's own cache on the disk."""
    if pipe.unet._compiled_call_impl is not None:
        return
    tqdm.write("compiling the UNet, which takes longest the first time", file=sys.stderr)
    cuda = pipe.unet.device.type == "cuda"
    with compiling():
        pipe.unet.fuse_qkv_projections()
        for part in [pipe.unet] + [pipe.vae.decoder] * cuda:
            part.to(memory_format=torch.channels_last)
            part.compile(options=INDUCTOR if cuda else None, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def compiling():
    """UserError for what goes wrong with torch.compile inside (no compiler on the machine, say), but lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        raise UserError(f"--compile: torch.compile fails here ({first_line(e)[:200]}); leave it out") from e


def forget_compiled(pipe: DiffusionPipeline) -> None:
    """Let go what was compiled for batches of another size, which holds memory."""
    torch.compiler.reset()
    pipe.unet.__dict__.pop("known_projections", None)
