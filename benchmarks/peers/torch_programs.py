"""The programs of the SVI benchmark written by hand in torch: every ``loss(*batch)`` is a one-sample negative ELBO.

They are over all N rows, as Pyro's losses are. The networks are those of `pyro_programs`, so that all start alike.
"""

from __future__ import annotations

import math

import torch
from peers import pyro_programs
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot, softplus

_LOG_2PI = math.log(2 * math.pi)
_START_RAW = math.log(math.expm1(0.1))  # Pyro's AutoNormal starts at standard deviations of 0.1


def _normal(x: Tensor, loc: Tensor | float, sd: Tensor) -> Tensor:
    return -0.5 * ((x - loc) / sd).square() - sd.log() - 0.5 * _LOG_2PI


def _pixels(logits: Tensor, x: Tensor) -> Tensor:
    """Log-probability of every row's pixels."""
    return -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def _code(out: Tensor) -> tuple[Tensor, Tensor]:
    """A draw of the code, and its KL from N(0, I) for every row."""
    loc, log_sd = out.chunk(2, -1)
    z = loc + log_sd.exp() * torch.randn_like(loc)
    return z, 0.5 * (loc.square() + (2 * log_sd).exp() - 1 - 2 * log_sd).sum(-1)


class _MeanField(nn.Module):
    """Independent normals over unconstrained latents."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.loc = nn.ParameterList([torch.zeros(shape) for shape in shapes])
        self.raw = nn.ParameterList([torch.full(shape, _START_RAW) for shape in shapes])

    def draw(self) -> tuple[list[Tensor], Tensor]:
        """Draws, and the sum of their log-densities."""
        values, log_density = [], torch.zeros((), device=self.loc[0].device)
        for loc, raw in zip(self.loc, self.raw, strict=True):
            sd, noise = softplus(raw), torch.randn_like(loc)
            values.append(loc + sd * noise)
            log_density = log_density - (0.5 * noise.square() + sd.log() + 0.5 * _LOG_2PI).sum()
        return values, log_density


class EightSchools(_MeanField):
    def __init__(self) -> None:
        super().__init__((), (), (8,))

    def loss(self, y: Tensor, sd: Tensor) -> Tensor:
        (mean, log_spread, effect), log_q = self.draw()
        spread = log_spread.exp()
        prior = -0.5 * (mean / 5).square() - math.log(5) - 0.5 * _LOG_2PI
        prior = prior + math.log(2 / (5 * math.pi)) - torch.log1p((spread / 5).square()) + log_spread
        prior = prior - (0.5 * effect.square() + 0.5 * _LOG_2PI).sum()
        return log_q - prior - _normal(y, mean + spread * effect, sd).sum()


class BayesianNetwork(_MeanField):
    def __init__(self, num_data: int, features: int = 8, hidden: int = 50) -> None:
        super().__init__((features, hidden), (hidden,), (hidden, 1), (1,), ())
        self.num_data = num_data

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (*weights, log_noise), log_q = self.draw()
        w1, b1, w2, b2 = weights
        log_p = -0.5 * (log_noise + 1).square() - 0.5 * _LOG_2PI
        log_p = log_p - sum((0.5 * w.square() + 0.5 * _LOG_2PI).sum() for w in weights)
        f = (torch.tanh(x @ w1 + b1) @ w2 + b2).squeeze(-1)
        return log_q - log_p - self.num_data / len(y) * _normal(y, f, log_noise.exp()).sum()


class LogisticRegression(_MeanField):
    def __init__(self, num_data: int, features: int) -> None:
        super().__init__((features,), ())
        self.num_data = num_data

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (w, b), log_q = self.draw()
        log_p = -0.5 * (w.square().sum() + b.square()) - 0.5 * (len(w) + 1) * _LOG_2PI
        misfit = binary_cross_entropy_with_logits(x @ w + b, y, reduction="sum")
        return log_q - log_p + self.num_data / len(y) * misfit


class VAE(pyro_programs.VAE):
    def loss(self, x: Tensor) -> Tensor:
        z, kl = _code(self.encoder(x))
        return self.num_data / len(x) * (kl - _pixels(self.decoder(z), x)).sum()


class SemiSupervisedVAE(pyro_programs.SemiSupervisedVAE):
    def loss(self, x: Tensor, labelled: Tensor, label: Tensor) -> Tensor:
        joined = pyro_programs.joined
        log_q = self.classifier(x).log_softmax(-1).T  # (10, B)
        every = torch.eye(self.classes, dtype=x.dtype, device=x.device).unsqueeze(1)  # (10, 1, 10)
        z, kl = _code(self.encoder(joined(x, every)))
        elbo = _pixels(self.decoder(joined(z, every)), x) - kl - math.log(self.classes) - log_q  # (10, B)
        unlabelled = (log_q.exp() * elbo).sum()
        y = one_hot(label, self.classes).to(x.dtype)
        z, kl = _code(self.encoder(joined(labelled, y)))
        known = (_pixels(self.decoder(joined(z, y)), labelled) - kl).sum()
        classified = -cross_entropy(self.classifier(labelled), label, reduction="sum")
        return -self.num_data / len(x) * (unlabelled + known + classified)


class DeepMarkovModel(pyro_programs.DeepMarkovModel):
    def loss(self, x: Tensor, backwards: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        summary = self.summarise(backwards, mask, lengths)
        z, z_guide = self.start.expand(len(x), -1), self.start_guide.expand(len(x), -1)
        total = torch.zeros((), device=x.device)
        for t in range(x.shape[1]):
            loc, sd = self.combine(z_guide, summary[:, t])
            prior_loc, prior_sd = self.transit(z)
            z = z_guide = loc + sd * torch.randn_like(loc)
            kl = (_normal(z, loc, sd) - _normal(z, prior_loc, prior_sd)).sum(-1)
            total = total + ((kl - _pixels(self.emitter(z), x[:, t])) * mask[:, t]).sum()
        return total
