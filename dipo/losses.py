"""What training minimises: Diffusion-DPO, and the objectives that it is compared with, each from its paper."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import reduce

# What beta is by default, where a loss has one: the authors' own. (DSPO's is theirs for SD 1.5: see there.)
BETAS = {"dpo": 5000.0, "ipo": 5000.0, "kto": 1000.0, "mapo": 0.1, "dspo": 0.001}
# What a loss is where model and reference agree, as they do before the first step; the others start at the noise error.
STARTS = {"dpo": math.log(2), "ipo": 0.25, "kto": 0.5}
WITHOUT_REFERENCE = ("sft", "mapo")
TRAIN_TIMESTEPS = 1000


class Errors(NamedTuple):
    """Of B pairs, winners (w) and losers (l): the mean squared errors of the model, m, and of the reference, r, all (B,),
    and the winners' model_pred - target, e, and model_pred - reference_pred, d, (B, C, H, W)."""

    m_w: torch.Tensor
    m_l: torch.Tensor
    r_w: torch.Tensor
    r_l: torch.Tensor
    e_w: torch.Tensor
    d_w: torch.Tensor


def argument(x: Errors, beta: float) -> torch.Tensor:
    """-beta / 2 * ((m_w - m_l) - (r_w - r_l)) of each pair, (B,): above 0 where the model prefers the winner, beside the
    loser, more than the reference does."""
    return -beta / 2 * ((x.m_w - x.m_l) - (x.r_w - x.r_l))


def dpo(x: Errors, beta: float) -> torch.Tensor:
    """-log sigmoid(argument): Diffusion-DPO (Wallace et al. 2024, equation 14, with a constant weight)."""
    return -F.logsigmoid(argument(x, beta)).mean()


def ipo(x: Errors, beta: float) -> torch.Tensor:
    """(argument - 1/2)^2: IPO (Azar et al. 2024, equation 17), beta^2 times its (h - 1 / (2 beta))^2, where the log ratio h
    is argument / beta. The margin has an end, so that labels that are always right do not pull without limit."""
    return (argument(x, beta) - 0.5).square().mean()


def sft(x: Errors, beta: float | None) -> torch.Tensor:
    """m_w: supervised fine-tuning on the winners, without beta and reference."""
    return x.m_w.mean()


def kto(x: Errors, beta: float) -> torch.Tensor:
    """1 - sigmoid(beta (g - z)) of a winner, 1 - sigmoid(-beta (g - z)) of a loser, g = r - m, and z the mean of g over the
    batch of all devices, at least 0, without gradient: Diffusion-KTO (Li et al. 2024) as its code has it by default. So it
    alone depends on how many pairs are held at once, --train-batch-size times the processes."""
    g_w, g_l = x.r_w - x.m_w, x.r_l - x.m_l
    z = reduce((g_w + g_l).detach().mean() / 2, "mean").clamp(min=0)
    return 1 - (torch.sigmoid(beta * (g_w - z)) + torch.sigmoid(-beta * (g_l - z))).mean() / 2


def mapo(x: Errors, beta: float) -> torch.Tensor:
    """m_w - beta log sigmoid(T (f(m_w) - f(m_l))), f(m) = m/2 / (exp(m/2) - 1), T = 1000 timesteps: MaPO (Hong et al. 2024)
    with the constants of its code, without a reference."""
    f_w, f_l = (m / 2 / torch.expm1(m / 2) for m in (x.m_w, x.m_l))
    return (x.m_w - beta * F.logsigmoid(TRAIN_TIMESTEPS * (f_w - f_l))).mean()


def dspo(x: Errors, beta: float) -> torch.Tensor:
    """|e_w - beta (1 - sigmoid(argument)) d_w|^2: DSPO (Zhu et al. 2025) as its code for SD 1.5 has it, with beta 0.001
    nearly sft. Beyond beta (1 - sigmoid) = 1 the gradient turns round and leads away from the winner. (Their code for SDXL
    has other losses in its place, the first of them (1 - sigmoid)^2.)"""
    weight = beta * (1 - torch.sigmoid(argument(x, beta)))
    return (x.e_w - weight.view(-1, 1, 1, 1) * x.d_w).square().mean()


LOSSES = {f.__name__: f for f in (dpo, ipo, sft, kto, mapo, dspo)}


def preserve_winner(model_pred: torch.Tensor, target: torch.Tensor, mu: float) -> torch.Tensor:
    """The same predictions (2B, C, H, W), where the gradient of each loser is scaled so that a step of descent in the space
    of predictions raises its winner's error by nothing, to first order: Diffusion-SDPO (Fu et al. 2025).

    The gradients of the two errors are e_w and e_l, up to a factor; the scale is (1 - mu) |e_w|^2 / (e_w . e_l), at most 1,
    and 1 where e_w . e_l <= 0. mu: the share of the winner's own descent that has to be left. The scale is here of each
    pair; the authors' code has one for all that a device holds.
    """
    winner, loser = model_pred.chunk(2)
    e_w, e_l = (model_pred - target).detach().flatten(1).chunk(2)
    both = (e_w * e_l).sum(dim=1)
    scale = torch.where(both > 0, (1 - mu) * e_w.square().sum(dim=1) / both, 1).clamp(max=1)
    return torch.cat([winner, loser.detach() + scale.view(-1, 1, 1, 1) * (loser - loser.detach())])


def preference_loss(
    name: str,
    model_pred: torch.Tensor,
    reference_pred: torch.Tensor | None,
    target: torch.Tensor,
    beta: float | None,
    winner_preserving: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Errors]:
    """One of LOSSES, of B pairs, computed in float32 (float64 for float64).

    model_pred, reference_pred, target: (2B, C, H, W), the winners first. The target is the noise, which winner and loser
    share, or their v (Salimans and Ho 2022), whose squared error is the noise's over alpha_bar. Without reference_pred
    r is 0 and d is e. winner_preserving: preserve_winner's mu. Returns the mean loss (), the arguments (B,), the errors.
    """
    kind = torch.float64 if target.dtype == torch.float64 else torch.float32
    model_pred, target = model_pred.to(kind), target.to(kind)
    reference_pred = target if reference_pred is None else reference_pred.to(kind)
    if winner_preserving is not None:
        model_pred = preserve_winner(model_pred, target, winner_preserving)
    m, r = ((pred - target).square().mean(dim=(1, 2, 3)) for pred in (model_pred, reference_pred))
    e_w, d_w = ((model_pred - x).chunk(2)[0] for x in (target, reference_pred))
    x = Errors(*m.chunk(2), *r.chunk(2), e_w, d_w)
    return LOSSES[name](x, beta), argument(x, beta or 1.0), x
