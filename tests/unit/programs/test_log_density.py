"""The log-density of a program's latents is a pure function of them."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.tracing import log_density

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(7, 2, generator=G), torch.randn(7, generator=G)


def regression(mean: Callable[[Tensor], Tensor], net: nn.Module | None = None) -> ProgramInstance:
    def model(x: Tensor, y: Tensor) -> None:
        if net is not None:
            pyro.module("net", net)
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean(x), scale), obs=y)

    return ProgramInstance(Program.of(model, "normal"), (X, Y), 7)


def test_layers_run_in_evaluation_mode_which_is_undone() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    net[0].running_mean += 0.5
    instance = regression(lambda x: net(x)[..., 0], net)
    frozen, *others = [
        module for module in instance.program.modules() if isinstance(module, nn.BatchNorm1d | nn.Linear)
    ]
    frozen.eval()
    before = {name: x.clone() for name, x in instance.tensors().items()}
    state = torch.get_rng_state()
    density = log_density(instance, (X, Y), chains=3)
    q = torch.tensor([[-1.0], [0.0], [1.0]])
    expected = dist.Normal(net.eval()(X)[:, 0], q.exp()).log_prob(Y).sum(1)
    expected = expected + dist.HalfNormal(1.0).log_prob(q.exp()[:, 0]) + q[:, 0]
    for _ in range(2):
        assert torch.allclose(density(q)[0], expected, atol=1e-4)
    assert torch.equal(density.values(q)["scale"].flatten(), q.exp().flatten())
    assert torch.equal(torch.get_rng_state(), state)
    assert not frozen.training
    assert instance.program.training
    assert all(module.training for module in others)
    assert all(torch.equal(x, before[name]) for name, x in instance.tensors().items())


def subsampled(x: Tensor) -> Tensor:
    with pyro.plate("some", 7, subsample_size=3) as index:
        return x[index].mean() * x[:, 0]


@pytest.mark.parametrize(
    ("mean", "operation", "line"),
    [
        (lambda x: x[:, 0] + torch.randn(()), "randn", r"`\(lambda x: x\[:, 0\] \+ torch\.randn"),
        (lambda x: functional.dropout(x, 0.5)[:, 0], r"\w*(dropout|bernoulli)\w*", r"`\(lambda x: functional"),
        (subsampled, "randperm", "`with pyro.plate"),
    ],
)
def test_refuses_draws_outside_of_sample_sites(mean: Callable[[Tensor], Tensor], operation: str, line: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"the model draws random numbers outside of its sample sites, .*: {operation} draws random numbers, at "
        rf"test_log_density\.py:\d+ {line}.*\. Draw them at pyro\.sample, or give them as data\.",
    ):
        log_density(regression(mean), (X, Y), chains=2)


def test_a_failed_query_restores_the_mode() -> None:
    instance = regression(lambda x: x[:, 0] + torch.rand(()))
    with pytest.raises(ValueError, match="outside of its sample sites"):
        log_density(instance, (X, Y), chains=2)
    assert instance.program.training
    assert all(module.training for module in instance.program.modules())


def test_density_of_a_prior() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    density = log_density(ProgramInstance(Program.of(model, "normal"), (), 1), (), chains=2)
    value, _ = density(torch.tensor([[0.0], [1.0]]))
    assert float(value[0] - value[1]) == pytest.approx(0.5)
