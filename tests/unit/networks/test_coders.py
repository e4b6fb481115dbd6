"""The encoder and the decoder of an autoencoder by name: shapes, layouts, blocks and messages."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, BayesianVAE
from deepprob.networks import MLP, ConvDecoder, ConvEncoder, network_from_config
from deepprob.networks.coders import Coders, SideBySide
from deepprob.networks.initialisation import init_weights
from deepprob.networks.residual import ResidualBlock

CASES = [("conv", (6, 5)), ("conv", (3, 8, 8)), ("residual", (7, 6)), ("residual", (3, 4, 4)), ("residual", (5,))]


@pytest.mark.parametrize(("network", "shape"), CASES)
def test_a_vae_with_every_network_fits_saves_and_loads(network: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.rand(12, *shape, generator=torch.Generator().manual_seed(0))
    program = VAE(shape, 2, (4, 3), network=network)
    posterior = svi(program, x, steps=3, progress=False)
    assert posterior.predict(x, draws=3).mean.shape == (12, *shape)
    posterior.save(tmp_path / "fit")
    again = dp.Posterior.load(tmp_path / "fit")
    torch.testing.assert_close(again.log_likelihood(x, draws=2), posterior.log_likelihood(x, draws=2))
    assert any(isinstance(m, ResidualBlock) for m in program.modules()) == (network == "residual")
    assert any(isinstance(m, nn.Conv2d) for m in program.modules()) == (len(shape) > 1)


def test_a_compiled_step_equals_an_eager_one() -> None:
    x = torch.rand(12, 5, 5, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = [svi(VAE((5, 5), 2, (4,), network="residual"), x, steps=3, compile=c, progress=False) for c in (0, 1)]
    assert fits[0].history.steps["elbo"] == pytest.approx(fits[1].history.steps["elbo"], rel=1e-5)


def test_a_bayesian_decoder_can_be_convolutional() -> None:
    x = torch.rand(12, 5, 5, generator=torch.Generator().manual_seed(0))
    posterior = svi(BayesianVAE((5, 5), 2, (4,), network="residual"), x, steps=2, progress=False)
    assert posterior.elbo(x).isfinite().all()


def test_the_outputs_of_a_value_are_side_by_side() -> None:
    """The last layer's bias belongs to the maps: two numbers a pixel, the same for all pixels of a map."""
    decoder = Coders("conv", (2, 3, 3), (4,), "relu").decoder(2, 2 * 18)
    convolution = [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)][-1]
    convolution.weight.data.zero_()
    convolution.bias.data.copy_(torch.arange(4.0))  # parameter 0 of both channels, then parameter 1
    values = decoder(torch.zeros(5, 2)).detach().reshape(5, 2, 3, 3, 2)
    assert values[0, :, 0, 0].tolist() == [[0.0, 2.0], [1.0, 3.0]]
    x = torch.arange(6.0)
    assert SideBySide(2)(x).tolist() == [0, 3, 1, 4, 2, 5]


def test_classes_of_pixels_belong_to_their_pixel() -> None:
    """With the classes in the wrong order a decoder could not say that one class is everywhere."""
    program = VAE((3, 3), 2, (4,), likelihood="categorical", num_classes=3, network="conv")
    convolution = [m for m in program.decoder.modules() if isinstance(m, nn.ConvTranspose2d)][-1]
    convolution.weight.data.zero_()
    convolution.bias.data.copy_(torch.tensor([0.0, 50.0, 0.0]))
    assert bool((program.decode(torch.zeros(4, 2)).base_dist.probs.argmax(-1) == 1).all())


def test_defaults() -> None:
    assert Coders("dense", (3,), None, "relu").sizes == (400,)
    assert Coders("conv", (3, 3), None, "relu").sizes == Coders("residual", (3, 3), None, "relu").sizes == (32, 64)
    assert Coders("residual", (3,), None, "relu").sizes == (256, 256)
    program = VAE((3, 3), network="conv")
    assert program.config is not None and program.config["hidden_dims"] == [32, 64]
    assert "network" not in (VAE((3, 3)).config or {})


def test_a_new_block_is_the_identity_and_redrawing_makes_it_one_again() -> None:
    block, x = ResidualBlock(4, "tanh"), torch.randn(5, 4)
    assert torch.equal(block(x), x)
    for net in (
        MLP(3, 2, (4,), residual=True),
        ConvEncoder((4, 4), 2, (3,), residual=True),
        ConvDecoder(2, (4, 4), (3,), residual=True),
    ):
        for parameter in net.parameters():
            parameter.data.fill_(0.5)
        record = init_weights(net)
        assert set(record) == {name for name, _ in net.named_parameters()}
        assert all(not bool((p == 0.5).any()) for p in net.parameters())
        assert network_from_config(net.config).config == net.config


def test_messages() -> None:
    with pytest.raises(
        ValueError, match=r"unknown network 'convv'\. Did you mean 'conv'\? Choose from: conv, dense, res"
    ):
        VAE((3, 3), network="convv")
    with pytest.raises(
        ValueError, match=r"network='conv' needs images, .* got rows of shape \(5,\)\. Use network='dense'"
    ):
        VAE((5,), network="conv")
    with pytest.raises(ValueError, match=r"network='residual' needs images, .* got rows of shape \(1, 2, 3, 4\)"):
        VAE((1, 2, 3, 4), network="residual")
    with pytest.raises(
        ValueError, match=r"network='conv' has no effect beside an encoder and a decoder\. Leave it out"
    ):
        VAE((3, 3), 2, network="conv", encoder=nn.Linear(9, 4), decoder=nn.Linear(2, 9))
