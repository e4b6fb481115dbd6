"""Values of full-batch data that steer Python: the data never change, so a traced step may read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from uncompiled import replace_compiler

from deepprob.fitting.callbacks import Callback
from deepprob.inference import svi
from deepprob.programs.program import Program

Y = 1.0 + torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([3, 2, 4, 1, 4, 2])


def likelihood(loc: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0).expand(y.shape).to_event(y.dim() - 1), obs=y)


def asserted(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    assert lengths.max() <= y.shape[1]
    likelihood(loc, y)


def counted(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    likelihood(loc / int(lengths.sum()), y)


def looped(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    for t in range(int(lengths.max())):
        with pyro.plate(f"rows_{t}", len(y)), pyro.poutine.mask(mask=t < lengths):
            pyro.sample(f"y_{t}", dist.Normal(loc, 1.0), obs=y[:, t])


def branched(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    likelihood(loc.exp() if (y > 0).all() else loc, y)


def listed(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    for row, length in zip(range(len(y)), lengths.tolist(), strict=True):
        pyro.sample(f"y_{row}", dist.Normal(loc, 1.0).expand([length]).to_event(1), obs=y[row, :length])


def compared(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    likelihood(loc if torch.equal(lengths, lengths.clone()) and 3 in lengths else -loc, y)


def written(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    copy = y.clone()
    copy[0, 0] = 3.0
    likelihood(loc * float(copy.sum()), y)


class Stop(Callback):
    """Ends a fit after its first epoch."""

    def epoch_end(self, fit: Any) -> None:
        fit.stop = True


BODIES = (asserted, counted, looped, branched, listed, compared, written)


def program_of(body: Callable[[Tensor, Tensor, Tensor], None], **options: Any) -> Program:
    def model(y: Tensor, lengths: Tensor) -> None:
        body(y, lengths, pyro.sample("loc", dist.Normal(0.0, 1.0)))

    return Program.of(model, "normal", **options)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_values_of_all_rows_may_be_read(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    posterior = svi(program_of(body), (Y, LENGTHS), steps=5, compile=True, progress=False)
    assert posterior.config["compiled"]


@pytest.mark.parametrize("body", [counted, branched], ids=lambda body: body.__name__)
@pytest.mark.parametrize("compile", [True, "auto"])
def test_values_of_a_minibatch_may_not(body: Any, compile: Any) -> None:
    with pytest.warns(UserWarning, match=r"depends on a value of a tensor .*, at test_settled_values\.py:\d+ `like"):
        posterior = svi(
            program_of(body, data_plate="data"),
            (Y, LENGTHS),
            steps=30000 if compile == "auto" else 5,
            batch_size=3,
            compile=compile,
            progress=False,
            callbacks=[Stop()],
        )
    assert not posterior.config["compiled"]


def drawn(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    likelihood(loc if bool(y.sum() + loc > 0) else -loc, y)


def written_by_a_draw(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    copy = y.clone()
    view = copy[0]
    view[0] = loc
    likelihood(loc * float(copy.detach().sum()), y)


def random(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    likelihood(loc * float(torch.poisson(y).sum()), y)


@pytest.mark.parametrize("body", [drawn, written_by_a_draw, random], ids=lambda body: body.__name__)
def test_values_that_depend_on_a_draw_may_not(body: Any) -> None:
    with pytest.warns(UserWarning, match=r"^not compiled: the computation depends on a value"):
        posterior = svi(program_of(body), (Y, LENGTHS), steps=5, compile=True, progress=False)
    assert not posterior.config["compiled"]


def masked(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    likelihood(loc * y[y > loc].sum(), y)


def counted_by_where(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
    likelihood(loc * torch.where(y > loc)[0].sum(), y)


@pytest.mark.parametrize("body", [masked, counted_by_where], ids=lambda body: body.__name__)
@pytest.mark.parametrize("compile", [True, "auto"])
def test_a_shape_that_depends_on_values_is_named_with_its_line(body: Any, compile: Any) -> None:
    reason = (
        r"^not compiled: the shape of a result depends on values .*, at test_settled_values\.py:\d+ `likelihood\(loc \*"
    )
    with pytest.warns(UserWarning, match=reason):
        svi(program_of(body), (Y, LENGTHS), steps=30000, compile=compile, progress=False, callbacks=[Stop()])


def test_an_error_about_bools_is_not_taken_for_a_branch() -> None:
    class Typed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if get_proxy_mode() is not None:
                raise RuntimeError("expected a bool tensor")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return gradients[0]

    def typed(y: Tensor, lengths: Tensor, loc: Tensor) -> None:
        likelihood(Typed.apply(loc), y)  # type: ignore[no-untyped-call]

    with pytest.warns(
        UserWarning, match=r"^not compiled: expected a bool tensor, at test_settled_values\.py:\d+ `raise"
    ):
        svi(program_of(typed), (Y, LENGTHS), steps=5, compile=True, progress=False)
