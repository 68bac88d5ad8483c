"""A run over images, batch by batch: noise, progress, timing, smaller batches where memory runs out, saving."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm

from dipo.cli import UserError
from dipo.compiled import compile_unet, compiling, forget_compiled
from dipo.devices import clock, device_name
from dipo.files import save_png

VERSIONS = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}


class Batch:
    """B images that are sampled together, of one size in pixels, each with its prompt and seed."""

    def __init__(self, pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], height: int, width: int):
        self.prompts, self.height, self.width, self.device = prompts, height, width, pipe.unet.device
        factor = pipe.vae_scale_factor
        self.shape = (len(prompts), pipe.unet.config.in_channels, height // factor, width // factor)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(self) -> torch.Tensor:
        """Normal noise, float32 (B, 4, H/8, W/8), by the image's own CPU generator: the same on any device, in any batch."""
        noise = randn_tensor(self.shape, self.generators)
        cuda = self.device.type == "cuda"
        return (noise.pin_memory() if cuda else noise).to(self.device, non_blocking=cuda)

    def progress(self, steps: Iterable) -> Iterator:
        """The steps of a loop, noted as they are done."""
        return iter(steps)


class RunBatch(Batch):
    """A batch of a run. It is entered while it is made: what goes wrong inside for want of memory makes the run go on with
    smaller batches. A warm-up, which takes a few steps of tau only, leaves nothing."""

    def __init__(self, run: "Batches", paths: list[Path], tau: list[int], compiled: bool, warm_up: bool):
        records = [run.todo[p] for p in paths]
        size = (records[0]["height"], records[0]["width"])
        super().__init__(run.pipe, [r["prompt"] for r in records], [r["seed"] for r in records], *size)
        self.run, self.paths, self.records, self.tau = run, paths, records, tau
        self.compiled, self.warm_up = compiled, warm_up
        self.measured, self.out_of_memory, self.stance = {}, False, contextlib.ExitStack()

    def __enter__(self) -> "RunBatch":
        self.before = self.run.bar.n
        if self.compiled and self.warm_up:
            self.stance.enter_context(compiling())
        elif self.run.compiled and not self.compiled:
            # A batch of another size, for which all would be compiled anew.
            self.stance.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        self.out_of_memory = isinstance(error, Exception) and should_reduce_batch_size(error)
        if self.out_of_memory:
            self.run.bar.update(self.before - self.run.bar.n)
            self.stance.close()
            return True
        return self.stance.__exit__(kind, error, traceback)

    def progress(self, steps: Iterable) -> Iterator:
        for step in steps:
            yield step
            if not self.warm_up:
                self.run.bar.update(len(self.paths))

    @contextlib.contextmanager
    def timed(self, name: str):
        """Note the seconds per image that pass inside, the device done with all that it was given, as name in the record."""
        start = clock(self.device)
        yield
        self.measured[name] = round((clock(self.device) - start) / len(self.paths), 5)

    def save(self, images: torch.Tensor) -> None:
        """Write images (B, 3, H, W), float32 in [-1, 1], as PNGs with their records. UserError for one with NaN."""
        if self.warm_up:
            return
        more = {"batch_size": len(self.paths), "device": device_name(self.device) + ", compiled" * self.compiled}
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pictures = self.run.pipe.image_processor.postprocess(images.nan_to_num())
        self.run.wait()
        for path, picture, record, is_finite in zip(self.paths, pictures, self.records, finite, strict=True):
            if not is_finite:
                self.run.wait()
                what = f"the image of prompt {record['prompt']!r} with seed {record['seed']} came out with NaN"
                advice = "try --dtype bf16 or fp32, and with fp16 a VAE that can stand it (madebyollin/sdxl-vae-fp16-fix)"
                raise UserError(f"{what}; {advice}")
            written = self.run.writer.submit(save_png, path, picture, record | self.measured | more | VERSIONS)
            self.run.writing.append(written)
        if self.run.timing:
            self.run.wait()


class Batches:
    """The images of this process that are to be made, batch by batch, in their order:

        for batch in Batches(pipe, todo, tau, size, bar):
            with batch:
                latents = sample(pipe, batch, batch.tau, ...)
                batch.save(decode(pipe.vae, latents))

    todo: records, with prompt, seed, height and width, by path. tau: the timesteps. size: of a batch, at most. bar: counts
    steps of images. compiled: torch.compile full batches. timing: times are to be trusted, so a warm-up (of timesteps
    warm_up) comes before the first batch of each size not in warm, and no PNG is written while the next batch is sampled.
    """

    def __init__(
        self, pipe, todo: dict[Path, dict], tau, size: int, bar: tqdm, compiled=False, timing=True, warm_up=None, warm=None
    ):
        self.pipe, self.todo, self.tau, self.bar = pipe, todo, tau, bar
        self.size, self.compiled, self.timing = size, compiled, timing
        self.warm_up, self.warm = warm_up or tau[:2], set() if warm is None else warm
        self.writer, self.writing = ThreadPoolExecutor(1), list[Future]()

    def __iter__(self) -> Iterator[RunBatch]:
        left = list(self.todo)
        with self.writer:
            while left:
                paths = left[: self.size]
                done = len(self.todo) - len(left)
                self.bar.set_postfix_str(f"image {done + 1}-{done + len(paths)} of {len(self.todo)}")
                for batch in self.passes(paths):
                    yield batch
                    if batch.out_of_memory:
                        self.halve(len(paths))
                        break
                else:
                    self.warm.add(len(paths))
                    del left[: len(paths)]
            self.wait()

    def passes(self, paths: list[Path]) -> Iterator[RunBatch]:
        """The warm-ups of a size that has not been run before, and the batch itself."""
        compiled = self.compiled and len(paths) == self.size
        if compiled:
            compile_unet(self.pipe)
        if (self.timing or compiled) and len(paths) not in self.warm:
            # CUDA graphs are recorded in the second call.
            for _ in range(1 + compiled):
                yield RunBatch(self, paths, self.warm_up, compiled, warm_up=True)
        yield RunBatch(self, paths, self.tau, compiled, warm_up=False)

    def halve(self, tried: int) -> None:
        self.size = tried // 2
        self.warm.clear()
        if not self.size:
            raise UserError("one image alone does not fit into the memory; use a smaller --height and --width")
        clear_device_cache(garbage_collection=True)
        forget_compiled(self.pipe)
        tqdm.write(f"out of memory: going on with batches of {self.size}", file=sys.stderr)

    def wait(self) -> None:
        """Until all PNGs are written; what went wrong with them is raised here."""
        while self.writing:
            self.writing.pop(0).result()
