"""The subsequence tau of the training timesteps that DDIM walks."""

import math

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules


def ddim_timesteps(steps: int, spacing: str, train_steps: int = 1000, offset: int = 1) -> list[int]:
    """The subsequence tau of the training timesteps, descending (Song et al. 2021, section 4.2).

    The same as diffusers' DDIMScheduler.set_timesteps with one exception of weight. Its "leading" spacing takes the
    whole-number stride train_steps // steps, and so 800 steps would start from pure noise at t = 800. Where that leaves the
    first timestep a stride or more too low, the real-valued stride is used and rounded down: 800 steps start at 999. Two
    corner cases follow: 1000 "leading" steps are 999 to 0, not 1000 to 1, and one "linspace" step is at 999, not 0.

    steps: 1 to train_steps. spacing: "leading", "trailing" or "linspace". offset: the scheduler's steps_offset, used by
    "leading". Lin et al. 2023 (Common diffusion noise schedules and sample steps are flawed) compares the three.
    """
    i = np.arange(steps)
    if spacing == "leading":
        stride = train_steps // steps
        too_low = (steps - 1) * (train_steps / steps - stride) >= train_steps / steps
        tau = i * train_steps // steps if too_low else i * stride
        tau = (tau + min(offset, train_steps - 1 - tau[-1]))[::-1]
    elif spacing == "trailing":
        tau = np.round(train_steps - i * (train_steps / steps)) - 1
    else:
        tau = np.round(np.linspace(train_steps - 1, 0, steps))
    return [int(t) for t in tau]


def subsequence(pipe, steps: int, spacing: str) -> list[int]:
    """tau for a pipeline, descending: ddim_timesteps by its scheduler's configuration, or Align Your Steps for "ays"."""
    trained = pipe.scheduler.config
    if spacing != "ays":
        return ddim_timesteps(steps, spacing, trained.num_train_timesteps, trained.steps_offset)
    family = "StableDiffusionXL" if hasattr(pipe, "text_encoder_2") else "StableDiffusion"
    return align_your_steps(steps, pipe.scheduler, AysSchedules[f"{family}Timesteps"])


def align_your_steps(steps: int, scheduler, known: list[int]) -> list[int]:
    """Align Your Steps (Sabour et al. 2024). known: the ten timesteps optimised for a model; for other counts its authors
    take their noise levels, the last step's end with them, log-linearly. steps: 1 to 50; with more, some would coincide."""
    sigma = np.log((1 / scheduler.alphas_cumprod.double().numpy() - 1) ** 0.5)
    wanted = np.interp(np.arange(steps) / steps, np.linspace(0, 1, len(known) + 1), sigma[[*known, 0]])
    return [int(t) for t in np.round(np.interp(wanted, sigma, np.arange(len(sigma))))]


def successive(scheduler, tau: list[int], device: torch.device) -> list[tuple[torch.Tensor, float, float]]:
    """For every timestep of tau: itself on the device, (), its alpha_bar, and that of the timestep which comes next.

    The last one goes to the scheduler's final_alpha_cumprod, alpha_bar[0] where set_alpha_to_one is False, as SDXL has it.
    diffusers steps to t - 1000 // steps instead, whatever comes next. All is known before the first step.
    """
    alpha_bar = scheduler.alphas_cumprod.double()
    a = [*alpha_bar[tau].tolist(), float(scheduler.final_alpha_cumprod)]
    return list(zip(torch.tensor(tau, device=device), a[:-1], a[1:], strict=True))


def noise_level(a_t: float) -> float:
    """sigma = sqrt(1 / alpha_bar - 1) of Karras et al. 2022, infinite where all is noise."""
    return math.sqrt(1 / a_t - 1) if a_t else math.inf
