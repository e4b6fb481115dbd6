"""The mixture VAE: what a report of it costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, MixtureVAE


def test_a_report_decodes_at_most_three_times_the_codes_of_a_plain_vae() -> None:
    """Sums over clusters, and draws of them, need no other codes; the decoder is most of the work on images.

    A decoder that counts cannot be traced, so neither report asks for the amortization gap.
    """
    decoded = {"VAE": 0, "MixtureVAE": 0}
    x = torch.rand(300, 20, generator=torch.Generator().manual_seed(0)).round()
    for model in (VAE, MixtureVAE):

        class Counted(nn.Linear):
            name = model.__name__

            def forward(self, z: Tensor) -> Tensor:
                decoded[self.name] += z.shape[:-1].numel()
                return super().forward(z)

        posterior = svi(model((20,), latent_dim=3, decoder=Counted(3, 20)), x[:200], steps=30, seed=0, progress=False)
        decoded[model.__name__] = 0
        dp.check(posterior, x[200:])
    assert 0 < decoded["MixtureVAE"] <= 3 * decoded["VAE"], decoded
