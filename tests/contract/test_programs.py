"""The contract of every registered model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from scenarios import MODEL_SCENARIOS, fit

from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.models import MODELS
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.example import Example
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

NAMES = sorted(MODEL_SCENARIOS)


def test_every_registered_name_has_a_scenario() -> None:
    assert all(cls.registry_name == name for name, cls in MODELS.items())


def test_an_example_is_a_new_program_with_the_same_data(name: str) -> None:
    one, two = MODELS[name].example(), MODELS[name].example()
    assert isinstance(one, Example) and type(one.program) is MODELS[name] and one.program is not two.program
    assert all(torch.equal(a, b) for a, b in zip(one.data, two.data, strict=True))
    assert 1 <= one.inputs <= len(one.data)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def posterior(name: str) -> Posterior:
    return fit(name)


def instance(name: str) -> ProgramInstance:
    scenario = MODEL_SCENARIOS[name]
    program = scenario.make()
    batch = program.accept(scenario.data if len(scenario.data) > 1 else scenario.data[0])
    return ProgramInstance(program, batch, len(batch[0]))


def test_config_rebuilds_the_program(name: str) -> None:
    program = MODEL_SCENARIOS[name].make()
    assert program.config is not None
    assert program.registry_name == name
    twin = MODELS[name](**json.loads(json.dumps(program.config)))
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in program.named_parameters()}
    assert twin.config == program.config


def test_guide_covers_every_latent_site(name: str) -> None:
    found = instance(name).structure
    assert found.latent
    assert found.observed


def test_gradients_reach_every_parameter(name: str) -> None:
    scenario = MODEL_SCENARIOS[name]
    own = instance(name)
    batch = own.program.accept(scenario.data if len(scenario.data) > 1 else scenario.data[0])
    with torch.random.fork_rng(), own.running():
        torch.manual_seed(0)
        totals = {n: torch.zeros_like(p) for n, p in own.parameters().items()}
        for _ in range(5):  # a unit that is inactive in one draw is active in another
            loss, _ = ELBO()(Run(own.program, own.program.prepare(*batch), torch.arange(24), 24))
            gradients = torch.autograd.grad(loss, list(own.parameters().values()), allow_unused=True)
            for n, g in zip(totals, gradients, strict=True):
                assert g is not None, f"no gradient reaches {n}"
                totals[n] += g.abs()
    assert [n for n, t in totals.items() if not bool((t > 0).any())] == []


@pytest.mark.parametrize("rows", [1, 5, 24])
def test_elbo_terms_for_every_batch_size(name: str, rows: int) -> None:
    """Terms of rows are scaled by N / B, so that the global KL weighs the same for every batch size."""
    scenario, own = MODEL_SCENARIOS[name], instance(name)
    own.program.eval()
    batch = own.program.accept(scenario.data if len(scenario.data) > 1 else scenario.data[0])
    part = tuple(x[:rows] for x in batch)

    def terms(data: tuple[torch.Tensor, ...], num_data: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        run = Run(own.program, own.program.prepare(*data), torch.arange(len(data[0])), num_data)
        return ELBO()(run)[1]

    with torch.random.fork_rng(), torch.no_grad(), own.running():
        alone, within = terms(part, rows), terms(part, 24)
    assert float(within["likelihood"]) == pytest.approx(float(alone["likelihood"]), rel=1e-4)
    assert float(within["kl_local"]) == pytest.approx(float(alone["kl_local"]), rel=1e-4, abs=1e-6)
    assert float(within["kl_global"]) == pytest.approx(float(alone["kl_global"]) * rows / 24, rel=1e-4, abs=1e-6)


def test_seeded_fits_are_equal_and_independent(name: str, posterior: Posterior) -> None:
    scenario = MODEL_SCENARIOS[name]
    program = scenario.make()
    before = {n: v.clone() for n, v in program.state_dict().items()}
    data = scenario.data if len(scenario.data) > 1 else scenario.data[0]
    first, second = (svi(program, data, epochs=3, batch_size=8) for _ in range(2))
    assert all(torch.equal(v, before[n]) for n, v in program.state_dict().items())
    state, other = first.instance.snapshot(), second.instance.snapshot()
    assert all(torch.equal(v, other[n]) for n, v in state.items())
    with torch.no_grad():
        for value in first.program.parameters():
            value.zero_()
    assert all(torch.equal(v, other[n]) for n, v in second.instance.tensors().items())


def test_random_state_and_store_are_unchanged(name: str, tmp_path: Path) -> None:
    scenario = MODEL_SCENARIOS[name]
    program, data = scenario.make(), scenario.data if len(scenario.data) > 1 else scenario.data[0]
    pyro.param("theirs", torch.zeros(()))
    before = torch.get_rng_state()
    posterior = svi(program, data, epochs=2, held_out=data)
    posterior.save(tmp_path / "fit")
    posterior = Posterior.load(tmp_path / "fit")
    posterior.predict(*scenario.data[: scenario.inputs], draws=2)
    posterior.elbo(*scenario.data)
    posterior.sample(*scenario.data, draws=2)
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    pyro.clear_param_store()


def test_programs_with_equal_parameter_names_train_apart(name: str) -> None:
    scenario = MODEL_SCENARIOS[name]
    alone = fit(name, seed=1).instance.tensors()
    fit(name, seed=2)
    beside = fit(name, seed=1).instance.tensors()
    assert all(torch.equal(v, beside[n]) for n, v in alone.items())
    start = svi(scenario.make(), scenario.data if len(scenario.data) > 1 else scenario.data[0], epochs=1, seed=1,
                optimizer="sgd")  # fmt: skip
    assert start.instance.tensors().keys() == alone.keys()


def test_query_shapes(name: str, posterior: Posterior) -> None:
    scenario = MODEL_SCENARIOS[name]
    assert posterior.log_likelihood(*scenario.data, draws=3).shape == (3, 24)
    assert posterior.elbo(*scenario.data).shape == (24,)
    for site, value in posterior.sample(*scenario.data, draws=3).items():
        local = site in posterior.structure.summed or posterior.latent_sites[site] == "local"
        assert value.shape[: 1 + local] == ((3, 24) if local else (3,))
    assert posterior.predict(*scenario.data[: scenario.inputs], draws=3).mean.shape[0] == 24
    evidence = posterior.log_evidence(*scenario.data, particles=3)
    assert evidence.shape == (() if "global" in posterior.latent_sites.values() else (24,))


def test_latents_of_rows_are_encoded_and_decoded(name: str, posterior: Posterior) -> None:
    data = MODEL_SCENARIOS[name].data
    if "local" not in posterior.latent_sites.values():
        with pytest.raises(ValueError, match="encode is about the latent sites of rows"):
            posterior.encode(*data)
        return
    sites = [n for n, kind in posterior.latent_sites.items() if kind == "local"]
    codes, rows, drawn = (
        posterior.encode(*data),
        posterior.reconstruct(*data, draws=2),
        posterior.sample(*data, draws=2),
    )
    means, sds = (x if isinstance(x, dict) else {sites[0]: x} for x in (codes.mean, codes.sd))
    for site in set(sites) - set(codes.classes):
        assert means[site].shape == sds[site].shape == drawn[site].shape[1:]
    for site in codes.classes:
        assert means[site].shape[:-1] == drawn[site].shape[1:] and bool((means[site].sum(-1) - 1 < 1e-5).all())
    known = {site: x.argmax(-1) if site in codes.classes else x for site, x in means.items()}
    assert posterior.decode(known, *data, draws=2).draws.shape == rows.draws.shape


def test_missing_values_are_drawn_and_the_others_stay(name: str, posterior: Posterior) -> None:
    data = MODEL_SCENARIOS[name].data
    (site,) = posterior.structure.observed
    place = posterior.program.argument_names.index(site)
    whole = posterior.program.accept(data)[place]
    missing = torch.zeros(whole.shape, dtype=torch.bool)
    missing[:2] = True
    gaps = [torch.where(missing, torch.nan, x) if i == place else x for i, x in enumerate(data)]
    filled = posterior.impute(*gaps, draws=3, sweeps=1).draws
    assert torch.equal(filled[:, ~missing], whole[~missing].expand(3, -1))
    assert bool(filled.isfinite().all()) and len(filled[:, missing].unique()) > 1


def test_to_arviz_groups(name: str, posterior: Posterior) -> None:
    idata = posterior.to_arviz(*MODEL_SCENARIOS[name].data, draws=4)
    groups = {"posterior", "posterior_predictive", "log_likelihood", "observed_data", "sample_stats", "prior"}
    assert groups | {"prior_predictive"} <= set(idata.groups())
    assert set(idata.posterior.data_vars) == {*posterior.latent_sites, *posterior.structure.summed}
    for values in idata.log_likelihood.data_vars.values():
        assert values.shape == (1, 4, 24)


_FRESH = """
import sys, json, torch
sys.path.insert(0, {folder!r})
from scenarios import MODEL_SCENARIOS
from deepprob.posteriors.posterior import Posterior
posterior = Posterior.load({path!r})
scenario = MODEL_SCENARIOS[{name!r}]
print(json.dumps(posterior.log_likelihood(*scenario.data, draws=5).double().tolist()))
"""


def test_loads_in_a_fresh_process_with_equal_densities(name: str, posterior: Posterior, tmp_path: Path) -> None:
    posterior.save(tmp_path / "fit")
    code = _FRESH.format(folder=str(Path(__file__).parent), path=str(tmp_path / "fit"), name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = posterior.log_likelihood(*MODEL_SCENARIOS[name].data, draws=5).double()
    assert torch.allclose(torch.tensor(json.loads(done.stdout), dtype=torch.float64), here, rtol=0, atol=1e-6)


def test_copy_shares_no_parameter_or_buffer(name: str) -> None:
    program = MODEL_SCENARIOS[name].make()
    twin: Program = copy.deepcopy(program)
    assert not {id(p) for p in program.parameters()} & {id(p) for p in twin.parameters()}
    assert not {id(b) for b in program.buffers()} & {id(b) for b in twin.buffers()}
