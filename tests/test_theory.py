"""Contribution 1 of the paper, numerically: swapping DDIM in changes neither Diffusion-DPO's loss nor its gradient.

Song et al. 2021 (DDIM), theorem 1: for eta > 0 the KL divergence between the forward process's step and the model's,

    KL(q(x_p | x_t, x_0) || p(x_p | x_t)) = g_t |e - e_theta|^2,
    g_t = (sqrt(a_p (1 - a_t) / a_t) - sqrt(1 - a_p - s^2))^2 / (2 s^2).

Diffusion-DPO (Wallace et al. 2024, equation 13) takes the difference of four of them at one t, model and reference, winner
and loser. Everything is float64; the divergences come from torch.distributions, not from the formula under test.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import coefficients
from torch.distributions import Independent, Normal, kl_divergence

DIM, PAIRS = 12, 5
STEPS = [(999, 979), (958, 925), (501, 481), (500, 250), (41, 21), (2, 1)]


def alpha_bars():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def sigma_of(a_t, a_p, eta):
    return eta * ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()


def g_of(a_t, a_p, s):
    return ((a_p * (1 - a_t) / a_t).sqrt() - (1 - a_p - s**2).sqrt()) ** 2 / (2 * s**2)


def step(x_t, x_0, a_t, a_p, s):
    """q(x_p | x_t, x_0), DDIM's equation 7; with the model's guess of x_0 it is p(x_p | x_t), equation 10."""
    mean = a_p.sqrt() * x_0 + (1 - a_p - s**2).sqrt() * (x_t - a_t.sqrt() * x_0) / (1 - a_t).sqrt()
    return Independent(Normal(mean, s), 1)


class Net(torch.nn.Module):
    """A small noise predictor e_theta(x_t, t)."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(DIM + 1, 32), torch.nn.Tanh(), torch.nn.Linear(32, DIM))

    def forward(self, x, t):
        return self.layers(torch.cat([x, torch.full_like(x[:, :1], t / 1000)], dim=1))


@pytest.fixture
def world():
    """Model and reference that differ, pairs of winners and losers, and one noise for both of a pair."""
    torch.manual_seed(0)
    model = Net().double()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    winner, loser, e = (torch.randn(PAIRS, DIM, dtype=torch.float64) for _ in range(3))
    return model, reference, winner, loser, e


def noised(x_0, e, a_t):
    return a_t.sqrt() * x_0 + (1 - a_t).sqrt() * e


def guess(net, x_t, t, a_t):
    return (x_t - (1 - a_t).sqrt() * net(x_t, t)) / a_t.sqrt()


def dpo_inner(term, model, reference, winner, loser):
    """(model - reference on winners) - (model - reference on losers), (PAIRS,), for any per-image term(net, x_0)."""
    return (term(model, winner) - term(reference, winner)) - (term(model, loser) - term(reference, loser))


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_the_kl_of_a_ddim_step_is_g_times_the_noise_error(world, t, t_prev, eta):
    model, _, x_0, _, e = world
    a_t, a_p = alpha_bars()[[t, t_prev]]
    s = sigma_of(a_t, a_p, eta)
    x_t = noised(x_0, e, a_t)
    kl = kl_divergence(step(x_t, x_0, a_t, a_p, s), step(x_t, guess(model, x_t, t, a_t), a_t, a_p, s))
    torch.testing.assert_close(kl, g_of(a_t, a_p, s) * (e - model(x_t, t)).square().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_dpo_from_kls_is_diffusion_dpo_up_to_g(world, t, t_prev, eta):
    """The argument and its gradient are g_t times Diffusion-DPO's; so with beta_t = beta / g_t, the constant weight that
    Diffusion-DPO sets, loss and gradient are the same."""
    model, reference, winner, loser, e = world
    a_t, a_p = alpha_bars()[[t, t_prev]]
    s, beta = sigma_of(a_t, a_p, eta), 3.0
    g = g_of(a_t, a_p, s)

    def by_kl(net, x_0):
        x_t = noised(x_0, e, a_t)
        return kl_divergence(step(x_t, x_0, a_t, a_p, s), step(x_t, guess(net, x_t, t, a_t), a_t, a_p, s))

    def by_noise(net, x_0):
        return (e - net(noised(x_0, e, a_t), t)).square().sum(1)

    def gradient(value):
        return torch.cat([d.flatten() for d in torch.autograd.grad(value, list(model.parameters()))])

    inner_kl, inner_noise = (dpo_inner(term, model, reference, winner, loser) for term in (by_kl, by_noise))
    torch.testing.assert_close(inner_kl, g * inner_noise, rtol=1e-8, atol=1e-12 * g.item())
    scale = gradient(inner_noise.sum()).abs().max().item()
    inner_kl, inner_noise = (dpo_inner(term, model, reference, winner, loser) for term in (by_kl, by_noise))
    torch.testing.assert_close(
        gradient(inner_kl.sum()), g * gradient(inner_noise.sum()), rtol=1e-8, atol=1e-9 * scale * g.item()
    )
    inner_kl, inner_noise = (dpo_inner(term, model, reference, winner, loser) for term in (by_kl, by_noise))
    dipo = -F.logsigmoid(-(beta / g) * inner_kl).mean()
    diffusion_dpo = -F.logsigmoid(-beta * inner_noise).mean()
    torch.testing.assert_close(dipo, diffusion_dpo, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(dipo), gradient(diffusion_dpo), rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_constants_cancel_where_the_model_has_another_variance(world, eta):
    """p with a deviation of its own (1.3 s) adds log terms to each KL. They depend on neither network nor picture."""
    model, reference, winner, loser, e = world
    t, t_prev = 501, 481
    a_t, a_p = alpha_bars()[[t, t_prev]]
    s = sigma_of(a_t, a_p, eta)
    wide = 1.3 * s

    def by_kl(net, x_0):
        x_t = noised(x_0, e, a_t)
        q = step(x_t, x_0, a_t, a_p, s)
        mean = step(x_t, guess(net, x_t, t, a_t), a_t, a_p, s).mean
        return kl_divergence(q, Independent(Normal(mean, wide), 1))

    def by_noise(net, x_0):
        return (e - net(noised(x_0, e, a_t), t)).square().sum(1)

    g = g_of(a_t, a_p, s) * s**2 / wide**2
    constant = by_kl(model, winner) - g * by_noise(model, winner)
    expected = DIM * (torch.log(wide / s) + s**2 / (2 * wide**2) - 0.5)
    torch.testing.assert_close(constant, expected.expand(PAIRS), rtol=1e-9, atol=1e-9)
    inner = [dpo_inner(term, model, reference, winner, loser) for term in (by_kl, by_noise)]
    torch.testing.assert_close(inner[0], g * inner[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_the_sampling_loop_takes_the_step_of_the_theory(world, eta):
    """The coefficients of hasty_sample.py's loop give p's mean and deviation."""
    model, _, x_0, _, e = world
    timesteps = [958, 925, 501, 481, 41]
    for i, t in enumerate(timesteps[:-1]):
        a_t, a_p = alpha_bars()[[t, timesteps[i + 1]]]
        x_t = noised(x_0, e, a_t)
        p = step(x_t, guess(model, x_t, t, a_t), a_t, a_p, sigma_of(a_t, a_p, eta))
        a, b, sigma = coefficients(a_t.item(), a_p.item(), eta)
        torch.testing.assert_close(a * x_t + b * model(x_t, t), p.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.full((PAIRS, DIM), sigma, dtype=p.stddev.dtype), p.stddev, rtol=1e-9, atol=0)
