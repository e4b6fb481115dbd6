"""Users' programs: what Pyro fits is fitted with Pyro's bound, and a fit answers every question as runs by Pyro do.

Sizes of rows, groups and draws differ in one half of the tests and are equal in the other: a table that is indexed
along the draws shows in one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from user_programs import DIFFERENT, EQUAL, LARGE, PROGRAMS, Sizes, UserProgram

import deepprob as dp
from deepprob.engine.noise import LiftedNoise
from deepprob.engine.random import RandomStream
from deepprob.fitting.gradients import GradientProgram, trace_gradients
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.copying import forget_values
from deepprob.programs.layout import Layout
from deepprob.programs.run import Run
from deepprob.programs.sites import is_deterministic, is_factor, sample_sites

KINDS = sorted({kind for kind, _ in PROGRAMS.values()})
RELATIVE = 1e-5
# Pyro warns that an AutoGuide cannot start at a value of a reparameterized site.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not commute with initialization:RuntimeWarning")
VERDICTS = ("pass", "caution", "fail", "unchecked")


def first_of_its_kind(name: str) -> bool:
    kind = PROGRAMS[name][0]
    return name == next(n for n, (k, _) in PROGRAMS.items() if k == kind)


def slow_unless_first(name: str) -> Any:
    return pytest.param(name, marks=[] if first_of_its_kind(name) else [pytest.mark.slow])


def make(name: str, sizes: Sizes) -> UserProgram:
    return PROGRAMS[name][1](sizes)


def fit(case: UserProgram, steps: int = 3) -> Posterior:
    store = pyro.get_param_store()
    with warnings.catch_warnings(), store.scope():
        warnings.filterwarnings("ignore", ".*did not|.*unseen", UserWarning)
        for name, (value, constraint) in case.stored.items():
            store.setdefault(name, value, constraint)
        return svi(
            case.program(), case.data, steps=steps, batch_size=None, objective=case.objective, seed=1, compile=False,
            optimizer=Optimizer(learning_rate=case.learning_rate), progress=False,
        )  # fmt: skip


class Unobserve(UnconditionMessenger):
    """Draws data anew, as `pyro.infer.Predictive` does, except for factors and deterministic sites."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg) and not is_factor(msg):
            super()._pyro_sample(msg)


class At(Messenger):
    """Conditions sites on the values of one draw, which have no axes for plates around other sites."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value, shape = self.values[msg["name"]], msg["fn"].shape()
            msg["value"] = value.reshape(shape) if value.numel() == shape.numel() else value
            msg["is_observed"] = True


@contextmanager
def whole_plates() -> Iterator[None]:
    """Pyro's plates with all of their rows, as a query sees the plates that draw some of them in a fit."""
    pyros = SubsampleMessenger._subsample

    def whole(name: str, size: Any = None, subsample_size: Any = None, *rest: Any) -> Any:
        return pyros(name, size, None, *rest)

    SubsampleMessenger._subsample = staticmethod(whole)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(pyros)


# -- by Pyro alone ----------------------------------------------------------------------------------------------------


def pyros_model(posterior: Posterior) -> Any:
    """The user's model with its fitted networks, without anything of ours around it."""
    return posterior.program.__dict__["_model"]


def pyros_guide(posterior: Posterior) -> Any:
    return posterior.program.current_guide


def gradients(loss: Tensor, posterior: Posterior) -> dict[str, Tensor]:
    params = posterior.instance.parameters()
    if not params:
        return {}
    found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return dict(zip(params, found, strict=True))


def assert_bound_is_pyros(case: UserProgram, posterior: Posterior) -> None:
    instance = posterior.instance
    batch, known = instance.program.accept(case.data), set(instance.store["params"])
    instance.program.train()
    with instance.running():
        with RandomStream(5).drawing():
            forget_values(instance.program)
            run = Run(instance.program, batch, torch.arange(instance.num_data), instance.num_data,
                      plates=instance.structure.plates)  # fmt: skip
            loss = instance.num_data * case.objective(run)[0]
            ours = gradients(loss, posterior)
        with RandomStream(5).drawing():
            forget_values(instance.program)
            elbo: Any = case.pyro()
            elbo.max_plate_nesting = instance.structure.plates
            own = set(instance.store["params"])
            theirs = pyros_loss(elbo, pyros_model(posterior), pyros_guide(posterior), case)
            for name in set(instance.store["params"]) - own:  # Pyro keeps averages of costs there
                del instance.store["params"][name], instance.store["constraints"][name]
            expected = gradients(theirs, posterior)
    instance.program.eval()
    for name in instance.store["params"].keys() - known:  # Pyro keeps averages of costs there
        del instance.store["params"][name], instance.store["constraints"][name]
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4, abs=1e-4)
    assert not ours or any(bool((g != 0).any()) for g in ours.values())
    size = max([float(g.abs().max()) for g in expected.values()], default=1.0)
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-4 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def pyros_loss(elbo: Any, model: Any, guide: Any, case: UserProgram) -> Tensor:
    if hasattr(elbo, "differentiable_loss"):
        return torch.as_tensor(elbo.differentiable_loss(model, guide, *case.args, **case.kwargs))
    bound, loss = elbo._loss_and_surrogate_loss(model, guide, case.args, case.kwargs)
    return torch.as_tensor(loss - (bound + loss).detach())


def by_hand(posterior: Posterior, case: UserProgram, latents: dict[str, Tensor], k: int) -> Any:
    """The trace of Pyro's model at the latent values of one draw."""
    values = {name: value[k] for name, value in latents.items()}
    forget_values(posterior.program)
    with torch.no_grad(), posterior.instance.running(), RandomStream(6).drawing(), whole_plates():
        return poutine.trace(At(values)(pyros_model(posterior))).get_trace(*case.args, **case.kwargs)


def log_joint(posterior: Posterior, case: UserProgram, latents: dict[str, Tensor], k: int) -> float:
    """Pyro's log p(x, z) at the latent values of one draw, with enumerated sites summed out."""
    values = {name: value[k] for name, value in latents.items()}
    forget_values(posterior.program)
    with torch.no_grad(), posterior.instance.running(), RandomStream(6).drawing(), whole_plates():
        model = At(values)(pyros_model(posterior))
        elbo = TraceEnum_ELBO(max_plate_nesting=posterior.structure.plates)
        return -float(elbo.loss(model, lambda *_, **__: None, *case.args, **case.kwargs))


def likelihood_nodes(posterior: Posterior, trace: Any) -> list[Any]:
    """The observed sites, and the factors inside the row plate."""
    plate, observed = posterior.structure.row_plate, posterior.structure.observed
    sites = dict(sample_sites(trace))
    factors = [s for s in sites.values() if is_factor(s) and plate in {f.name for f in s["cond_indep_stack"]}]
    return [*(sites[n] for n in observed), *factors]


# -- every question ---------------------------------------------------------------------------------------------------


def assert_likelihood_is_pyros(case: UserProgram, posterior: Posterior, draws: int) -> None:
    latents = {n: v for n, v in posterior.sample(*asked(case), draws=draws, seed=3).items()
               if n in posterior.structure.latent}  # fmt: skip
    assert set(latents) == set(posterior.structure.latent)
    assert all(len(value) == draws for value in latents.values())
    if case.rows is None:
        with pytest.raises(ValueError, match="data_plate="):
            posterior.log_likelihood(*asked(case), draws=draws, seed=3)
        return
    found = posterior.log_likelihood(*asked(case), draws=draws, seed=3)
    assert found.shape == (draws, case.rows)
    assert bool(torch.isfinite(found).all())
    if not same_noise(case, posterior):
        return
    for k in range(draws):
        if posterior.structure.summed:
            trace = by_hand(posterior, case, latents, k)
            prior = sum(float(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]).sum()) for name in latents)
            expected = log_joint(posterior, case, latents, k) - prior
        else:
            trace = by_hand(posterior, case, latents, k)
            trace.compute_log_prob()
            expected = float(sum(node["log_prob_sum"] for node in likelihood_nodes(posterior, trace)))
        assert float(found[k].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-3), f"draw {k}"


def same_noise(case: UserProgram, posterior: Posterior) -> bool:
    """Whether two queries with one seed draw the same latent values: the guide's noise is normal or uniform."""
    with torch.no_grad(), posterior.instance.running(), RandomStream(0).drawing(), LiftedNoise() as noise:
        pyros_guide(posterior)(*case.args, **case.kwargs)
        return not noise.size.unserved


def assert_runs_are_pyros(case: UserProgram, posterior: Posterior, draws: int, *, predict: bool) -> None:
    """Every site of a run under draws has the density that Pyro gives it at the values of that draw."""
    guide_trace, trace = posterior.trace(*asked(case), draws=draws, seed=4, predict=predict)
    layout = Layout(posterior.structure.row_plate, posterior.structure.plates, draws)
    values = {n: layout.draws_first(guide_trace.nodes[n]) for n in posterior.structure.latent}
    sites = dict(sample_sites(trace))
    values |= {n: layout.draws_first(s) for n, s in sites.items() if not s["is_observed"]}
    for k in range(draws):
        alone = by_hand(posterior, case, values, k)
        alone.compute_log_prob()
        for name, site in sample_sites(alone):
            if is_deterministic(site):
                ours = layout.draws_first(sites[name])[k]
                torch.testing.assert_close(ours.reshape(site["value"].shape), site["value"], rtol=1e-4, atol=1e-4)
            else:
                ours = layout.total(sites[name])[k]
                torch.testing.assert_close(ours, torch.as_tensor(site["log_prob_sum"]), rtol=1e-4, atol=1e-3)


def asked(case: UserProgram) -> tuple[Any, ...]:
    """The call of a query: the arguments spread out, or the dict of keywords; a list alone would be a list of rows."""
    if len(case.args) == 1 and isinstance(case.args[0], list):
        return (case.args,)
    return case.args or ((case.kwargs,) if case.kwargs else ())


def assert_predictions_are_finite(case: UserProgram, posterior: Posterior, draws: int) -> None:
    for site in case.observed:
        predicted = posterior.predict(*asked(case), draws=draws, seed=3, site=site)
        assert len(predicted.draws) == draws
        assert bool(torch.isfinite(torch.as_tensor(predicted.mean, dtype=torch.float64)).all())


def answers(case: UserProgram, posterior: Posterior) -> dict[str, Tensor]:
    """Numbers from every query, to compare a loaded posterior with."""
    found = posterior.sample(*asked(case), draws=5, seed=9)
    found["evidence"] = posterior.log_evidence(*asked(case), particles=5, seed=9)
    for site in case.observed:
        found[f"predicted {site}"] = posterior.predict(*asked(case), draws=5, seed=9, site=site).draws
    if case.rows is not None:
        found["likelihood"] = posterior.log_likelihood(*asked(case), draws=5, seed=9)
    return found | {f"parameter {n}": p for n, p in posterior.parameters().items()}


def assert_saved_and_loaded(case: UserProgram, posterior: Posterior, folder: Path) -> None:
    before = answers(case, posterior)
    posterior.save(folder / "fit")
    after = answers(case, Posterior.load(folder / "fit", program=case.program()))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) or bool(value.isnan().any()), name


def assert_exported(case: UserProgram, posterior: Posterior, draws: int) -> None:
    exported = posterior.to_arviz(*asked(case), draws=draws)
    if posterior.structure.latent:
        assert set(posterior.structure.latent) <= {str(n) for n in exported.posterior.data_vars}
    for name in posterior.structure.latent:
        assert exported.posterior[name].shape[:2] == (1, draws)
    if case.rows is not None:
        assert exported.log_likelihood


def assert_checked(case: UserProgram, posterior: Posterior) -> None:
    report = dp.check(posterior, case.data, draws=20, particles=20)
    assert report.verdict in VERDICTS
    assert any(check.verdict != "unchecked" for check in report.checks)
    assert str(report)


def assert_traced(case: UserProgram, posterior: Posterior) -> None:
    """The traced loss and gradients equal those of an eager run; a program that cannot be traced says why."""
    instance = posterior.instance
    batch, rows = instance.program.accept(case.data), torch.arange(instance.num_data)
    instance.program.train()
    program = GradientProgram(instance, case.objective)
    with instance.running(), RandomStream(1).drawing():
        graph = trace_gradients(program, batch, rows)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        normal, uniform = (x[0] for x in graph.noise.draw(1, generators, torch.device("cpu")))
        weight = torch.tensor(1.0)
    if graph.noise.unserved:
        instance.program.eval()
        return
    with instance.running(), RandomStream(1).drawing(), torch.no_grad():
        params = [p.detach() for p in program.params]
        loss, _, found, _ = graph.function(params, graph.buffers, graph.fixed, batch, rows, normal, uniform, weight)
    with instance.running(), RandomStream(1).drawing(), LiftedNoise(normal, uniform):
        eager, _, expected = program(batch, rows, weight)
    instance.program.eval()
    torch.testing.assert_close(loss, eager.detach(), rtol=1e-4, atol=1e-4)
    size = max([float(g.abs().max()) for g in expected], default=1.0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("sizes", [DIFFERENT, EQUAL], ids=["different sizes", "equal sizes"])
@pytest.mark.parametrize("name", [slow_unless_first(name) for name in PROGRAMS])
def test_program_is_fitted_and_answers_every_question(name: str, sizes: Sizes, tmp_path: Path) -> None:
    case = make(name, sizes)
    if case.refused:
        with pytest.raises((ValueError, TypeError), match=case.refused):
            fit(case)
        return
    posterior = fit(case)
    assert all(bool(torch.isfinite(p).all()) for p in posterior.parameters().values())
    assert set(posterior.structure.observed) == set(case.observed)
    assert_bound_is_pyros(case, posterior)
    assert_likelihood_is_pyros(case, posterior, sizes.draws)
    assert_runs_are_pyros(case, posterior, sizes.draws, predict=False)
    assert_runs_are_pyros(case, posterior, sizes.draws, predict=True)
    assert_predictions_are_finite(case, posterior, sizes.draws)
    assert_saved_and_loaded(case, posterior, tmp_path)
    assert_exported(case, posterior, sizes.draws)
    assert_checked(case, posterior)
    if case.eager:
        with pytest.raises(Exception, match=case.eager):
            assert_traced(case, posterior)
    else:
        assert_traced(case, posterior)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_draws_are_those_of_pyros_predictive(name: str) -> None:
    """Means of 300 draws differ by less than five standard errors; equal means fail that once in a million."""
    case = make(name, DIFFERENT)
    if case.refused:
        pytest.skip("it is refused")
    posterior, draws = fit(case), 300
    assert_means_agree(guide_draws(posterior, case, draws), posterior.sample(*asked(case), draws=draws, seed=2))
    guide_trace, trace = posterior.trace(*asked(case), draws=draws, seed=2, predict=True)
    layout = Layout(posterior.structure.row_plate, posterior.structure.plates, draws)
    latents = {n: layout.draws_first(guide_trace.nodes[n]) for n in posterior.structure.latent}
    ours = {n: layout.draws_first(s) for n, s in sample_sites(trace) if n in case.observed}
    theirs: dict[str, list[Tensor]] = {n: [] for n in case.observed}
    with torch.no_grad(), posterior.instance.running(), RandomStream(8).drawing(), whole_plates():
        for k in range(draws):
            forget_values(posterior.program)
            model = At({n: v[k] for n, v in latents.items()})(Unobserve()(pyros_model(posterior)))
            alone = poutine.trace(model).get_trace(*case.args, **case.kwargs)
            for n in case.observed:
                theirs[n].append(alone.nodes[n]["value"])
    assert_means_agree({n: torch.stack(x) for n, x in theirs.items()}, ours)


def guide_draws(posterior: Posterior, case: UserProgram, draws: int) -> dict[str, Tensor]:
    """Draws of the guide by Pyro, one run for each."""
    names, found = posterior.structure.latent, []
    with torch.no_grad(), posterior.instance.running(), RandomStream(7).drawing(), whole_plates():
        for _ in range(draws):
            forget_values(posterior.program)
            trace = poutine.trace(pyros_guide(posterior)).get_trace(*case.args, **case.kwargs)
            found.append([trace.nodes[n]["value"] for n in names])
    return {n: torch.stack(x) for n, x in zip(names, zip(*found, strict=True), strict=True)} if names else {}


def assert_means_agree(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        a, b = (x.double().reshape(len(x), -1) for x in (ours[name], expected))
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-6).all()), name


@pytest.mark.parametrize("name", [slow_unless_first(n) for n, (_, f) in PROGRAMS.items() if f(LARGE).answer])
def test_posterior_is_the_closed_form(name: str) -> None:
    case = make(name, LARGE)
    assert case.answer is not None
    case.answer(fit(case, case.steps))


def test_programs_are_many_and_nearly_all_are_fitted() -> None:
    count = {kind: sum(k == kind for k, _ in PROGRAMS.values()) for kind in KINDS}
    assert len(count) == 20
    assert min(count.values()) >= 5
    assert sum(bool(make(name, DIFFERENT).refused) for name in PROGRAMS) <= 3
