"""The noun `Posterior`: what every routine returns, to sample, predict, score, save and hand to ArviZ."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.posteriors.arviz_compat import from_dict
from deepprob.posteriors.densities import (
    check_data,
    drawn_sites,
    joint_weights,
    local_elbo,
    log_likelihood,
    observed_sites,
    row_weights,
    summed_joint_weights,
    summed_local_elbo,
    summed_log_likelihood,
    summed_row_weights,
)
from deepprob.posteriors.history import History
from deepprob.posteriors.prediction import Prediction
from deepprob.posteriors.saving import Content, read_posterior, write_posterior
from deepprob.posteriors.stored_draws import replay
from deepprob.programs.elimination import Term, terms
from deepprob.programs.enumeration import draw_summed, run_enumerated
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch, num_rows, rows_of_the_fit
from deepprob.programs.program import FunctionProgram, Program
from deepprob.programs.run import Run, run_guide, run_prior, run_program
from deepprob.programs.sites import Site, is_deterministic, sample_sites
from deepprob.programs.structure import Structure, check_stacked
from deepprob.storage import versions

# So many numbers of one kind of activation are held at a time; more rows than that go in several calls.
_CHUNK = 2**24


class Posterior:
    """The posterior over a program's latent sites, whatever the routine that found it.

    Two kinds: one holds a guide (a point estimate is a Delta guide), one holds draws with a chain axis. Both answer the
    same questions. Every query takes a ``seed`` and leaves the caller's random state alone; none loops over draws.

    Args:
        owned: The fitted program; the posterior owns it.
        history: What happened during the fit.
        config: The routine and its settings, as JSON.
        seed: The fit's seed.
        chains: For the kind that holds draws: values by site, shape ``(chains, draws, *site)``.
        exact: Whether `log_evidence` is a closed form.

    Attributes:
        history: The record of the fit.
        config: The routine and its settings.
        seed: The fit's seed.
        versions: Of Python and the packages that made it.
        exact: Whether `log_evidence` is a closed form.
    """

    def __init__(
        self,
        owned: ProgramInstance,
        *,
        history: History | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        chains: Mapping[str, Tensor] | None = None,
        exact: bool = False,
    ) -> None:
        self._owned = owned
        self.history = history or History()
        self.config = dict(config or {})
        found = owned.structure
        self.seed, self.exact = seed, exact or bool(found.summed and not found.latent)
        self.versions = _versions()
        self._chains = None if chains is None else {n: v.detach().to(owned.device) for n, v in chains.items()}
        owned.program.eval()

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The posterior's own copy of the program."""
        return self._owned.program

    @property
    def structure(self) -> Structure:
        """The program's sites."""
        return self._owned.structure

    @property
    def kind(self) -> str:
        """``"guide"`` or ``"draws"``."""
        return "guide" if self._chains is None else "draws"

    @property
    def latent_sites(self) -> dict[str, str]:
        """``"global"`` or ``"local"`` by latent site."""
        found = dict.fromkeys(self.structure.global_, "global")
        return found | dict.fromkeys(self.structure.local, "local")

    def parameters(self) -> dict[str, Tensor]:
        """A copy of the fitted parameters and buffers, by name."""
        return self._owned.snapshot()

    # -- queries -------------------------------------------------------------------------------------------------

    def sample(self, *data: Any, draws: int = 100, seed: int = 0) -> dict[str, Tensor]:
        """Draw latent sites from the posterior.

        Sites that are summed out of the bound are drawn from their exact posterior given the others and the data.

        Args:
            data: The program's arguments; without them only global sites are drawn, none that is summed out.
            draws: How many, K.
            seed: Of the draws.

        Returns:
            Values by site: ``(K, *site)`` for global sites, a scalar site's being ``(K,)``; ``(K, B, *site)`` for
            local ones.
        """
        _check_draws(draws)
        if data:
            batch = self._batch(data)
            names: tuple[str, ...] = self.structure.latent
        else:
            batch = self._example()
            names = self.structure.latent if self._keeps_rows else self.structure.global_
            if not names:
                hidden = ", ".join(self.structure.local + self.structure.summed)
                raise ValueError(f"every latent site ({hidden}) belongs to rows. Give the rows: posterior.sample(x).")
        layout = self._layout(draws)
        with self._querying(seed):
            if data and self.structure.summed:
                guide_trace, model_trace = self._run(batch, draws)
            else:
                guide_trace = self._run_guide(batch, draws)
            found = {name: layout.draws_first(guide_trace.nodes[name]) for name in names}
            if data:
                found |= {name: layout.draws_first(model_trace.nodes[name]) for name in self.structure.summed}
        if not data and any(bool(v.isnan().any()) for v in found.values() if v.is_floating_point()):
            raise ValueError("the guide looks at the data. Give them: posterior.sample(*data).")
        return found

    def predict(self, *data: Any, draws: int = 100, seed: int = 0, site: str | None = None) -> Prediction:
        """The posterior predictive distribution of the rows given.

        Args:
            data: The program's arguments; what is observed may be left out.
            draws: How many draws from the posterior, K.
            seed: Of the draws.
            site: Which observed site, if there are several.

        Raises:
            ValueError: If the rows are not like the fit's, or the site is not clear.
        """
        _check_draws(draws)
        batch = self._batch(data)
        with self._querying(seed):
            return self._predicted(self._run(batch, draws, predict=True)[1], site, draws)

    def predict_prior(
        self, rows: int = 16, *data: Any, draws: int = 1, seed: int = 0, site: str | None = None
    ) -> Prediction:
        """The prior predictive distribution: what the model says before it sees a row, with the fitted parameters.

        Args:
            rows: How many rows, B.
            data: The program's arguments where the model needs them (inputs of a regression).
            draws: How many draws of everything, K.
            seed: Of the draws.
            site: Which observed site, if there are several.
        """
        return self._predicted(self._prior_trace(rows, data, draws, seed), site, draws)

    def _predicted(self, model_trace: Trace, site: str | None, draws: int) -> Prediction:
        node, layout = self._observed_node(model_trace, site), self._layout(draws)
        return Prediction(node["fn"], layout.draws_first(node), node["name"], unused=layout.unused(node))

    def _observed_node(self, model_trace: Trace, site: str | None) -> Site:
        observed = [n for n, _ in sample_sites(model_trace) if n in self.structure.observed]
        if site is None:
            if len(observed) != 1:
                raise ValueError(f"the program observes {', '.join(observed) or 'nothing'}. Say which: site='...'.")
            site = observed[0]
        elif site not in observed:
            raise ValueError(f"the program observes no site {site!r}. Choose from: {', '.join(observed)}.")
        return model_trace.nodes[site]

    def sample_prior(self, rows: int = 16, *data: Any, draws: int = 1, seed: int = 0) -> dict[str, Tensor]:
        """Ancestral samples of every site from the model alone, with the fitted parameters.

        Args:
            rows: How many rows, B.
            data: The program's arguments where the model needs them (inputs of a regression).
            draws: How many draws of everything, K.
            seed: Of the draws.

        Returns:
            Values by site, ``(K, B, *site)`` for local and observed sites, ``(K, *site)`` for global ones.
        """
        trace, layout = self._prior_trace(rows, data, draws, seed), self._layout(draws)
        return {n: layout.draws_first(s) for n, s in sample_sites(trace) if not is_deterministic(s)}

    def _prior_trace(self, rows: int, data: tuple[Any, ...], draws: int, seed: int) -> Trace:
        _check_draws(draws)
        batch = self._batch(data) if data else ()
        size = num_rows(batch) if batch else rows
        with self._querying(seed):
            run = Run(self.program, self._padded(batch), torch.arange(size), size, draws, self._plates)
            return run_prior(run)

    def log_likelihood(self, *data: Any, draws: int = 100, seed: int = 0) -> Tensor:
        """Log-likelihood of every row under every draw, in nats; what is marked for it is summed out of the model.

        Args:
            data: The program's arguments, observed ones included.
            draws: How many, K.
            seed: Of the draws.

        Returns:
            Shape ``(K, B)``.
        """
        _check_draws(draws)
        batch = self._batch(data)
        parts = []
        for chunk in self.chunks(batch, draws):
            with self._querying(seed):
                parts.append(self._log_likelihood(chunk, draws))
        return torch.cat(parts, dim=1)

    def _log_likelihood(self, batch: Batch, draws: int) -> Tensor:
        if self.structure.summed:
            return summed_log_likelihood(self._layout(draws), self.structure, self._terms(batch, draws))
        return log_likelihood(self._layout(draws), self._run(batch, draws)[1])

    def log_weights(self, *data: Any, particles: int = 100, seed: int = 0) -> Tensor:
        r"""Log importance weights ``log p(x, z_k) - log q(z_k | x)``.

        Args:
            data: The program's arguments, observed ones included.
            particles: How many, K.
            seed: Of the draws.

        Returns:
            Shape ``(K, B)`` where every latent belongs to a row, else ``(K,)`` for the data as a whole.

        Raises:
            ValueError: If the posterior holds draws: their density is not known.
        """
        _check_draws(particles)
        if self._chains is not None:
            raise ValueError(
                "importance weights need a guide's density; this posterior holds draws. Use log_likelihood."
            )
        batch = self._batch(data)
        if not self._amortized():
            with self._querying(seed):
                return self._joint_weights(batch, particles)
        parts = []
        with self._querying(seed):
            for chunk in self.chunks(batch, particles):
                parts.append(self._row_weights(chunk, particles))
        return torch.cat(parts, dim=1)

    def _row_weights(self, batch: Batch, draws: int) -> Tensor:
        if self.structure.summed:
            return summed_row_weights(self._layout(draws), self._terms(batch, draws))
        return row_weights(self._layout(draws), self.structure, *self._run(batch, draws))

    def _joint_weights(self, batch: Batch, draws: int) -> Tensor:
        if self.structure.summed:
            return summed_joint_weights(self._layout(draws), self._terms(batch, draws))
        return joint_weights(self._layout(draws), *self._run(batch, draws))

    def log_evidence(self, *data: Any, particles: int = 100, seed: int = 0) -> Tensor:
        r"""Importance-weighted lower bound on the log evidence, in nats.

        .. math:: \log \hat p(x) = \log \frac1K \sum_k p(x, z_k) / q(z_k \mid x)

        Args:
            data: The program's arguments, observed ones included.
            particles: How many, K; with one it is an ELBO, and it tightens as they grow.
            seed: Of the draws.

        Returns:
            One value per row, shape ``(B,)``, where every latent belongs to a row; one number otherwise.

        References:
            Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
        """
        weights = self.log_weights(*data, particles=particles, seed=seed)
        return weights.logsumexp(0) - math.log(particles)

    def elbo(self, *data: Any, particles: int = 1, seed: int = 0) -> Tensor:
        """Evidence lower bound of every row, in nats, without the KL of global latents.

        Args:
            data: The program's arguments, observed ones included.
            particles: Draws to average over, K.
            seed: Of the draws.

        Returns:
            Shape ``(B,)``.
        """
        _check_draws(particles)
        batch = self._batch(data)
        with self._querying(seed):
            return self.elbo_of(batch, particles)

    def elbo_of(self, batch: Batch, particles: int) -> Tensor:
        """`elbo` of a batch that was accepted already, inside a running program; routines use it for held-out data."""
        chunks = self.chunks(batch, particles)
        return torch.cat([self._elbo(chunk, particles) for chunk in chunks])

    def _elbo(self, batch: Batch, particles: int) -> Tensor:
        if self.program.enumerates:
            found = self._terms(batch, particles, bound=True)
            return summed_local_elbo(self._layout(particles), self.structure, found)
        return local_elbo(self._layout(particles), self.structure, *self._run(batch, particles))

    def trace(self, *data: Any, draws: int = 100, seed: int = 0, predict: bool = False) -> tuple[Trace, Trace]:
        """The guide's and the model's Pyro traces under a leading plate of draws, for diagnostics.

        Args:
            data: The program's arguments.
            draws: How many, K; values have shape ``(K, B, *site)`` for local sites, ``(K, 1, *site)`` for global ones.
            seed: Of the draws.
            predict: Draw the observed sites anew.
        """
        _check_draws(draws)
        batch = self._batch(data)
        with self._querying(seed):
            return self._run(batch, draws, predict=predict)

    # -- handing on ----------------------------------------------------------------------------------------------

    def to_arviz(self, *data: Any, draws: int = 1000, seed: int = 0) -> Any:
        """The posterior as ArviZ keeps it: InferenceData on ArviZ 0.23, a DataTree on 1.x.

        Groups: posterior, and with data posterior_predictive, log_likelihood, observed_data, and (of a guide)
        sample_stats with ``lp`` and ``log_q`` of global latents.

        Args:
            data: The program's arguments, observed ones included.
            draws: How many; the kind that holds draws gives all of its own.
            seed: Of the draws.
        """
        if not data:
            return from_dict({"posterior": self._by_chain(self.sample(draws=self._count(draws), seed=seed))})
        draws = self._count(draws)
        batch = self._batch(data)
        with self._querying(seed):
            guide_trace, model_trace = self._run(batch, draws)
        with self._querying(seed):
            _, predicted = self._run(batch, draws, predict=True)
        with self._querying(seed):
            summed = self._terms(batch, draws) if self.structure.summed else []
        with torch.no_grad():
            return self._to_arviz(guide_trace, model_trace, predicted, draws, summed)

    def _to_arviz(
        self, guide_trace: Trace, model_trace: Trace, predicted: Trace, draws: int, summed: list[Term]
    ) -> Any:
        layout, seen = self._layout(draws), observed_sites(model_trace)
        latents = {n: layout.draws_first(guide_trace.nodes[n]) for n in self.structure.latent}
        latents |= {n: layout.draws_first(model_trace.nodes[n]) for n in self.structure.summed}
        likelihoods = {n: layout.log_prob(s) for n, s in seen.items()}
        if summed:  # of all observed sites together: what is summed out ties them
            likelihoods = {"+".join(seen): summed_log_likelihood(layout, self.structure, summed)}
        groups = {
            "posterior": self._by_chain(latents),
            "posterior_predictive": self._by_chain({n: layout.draws_first(predicted.nodes[n]) for n in seen}),
            "log_likelihood": self._by_chain(likelihoods),
            "observed_data": {n: s["value"].cpu().numpy() for n, s in seen.items()},
        }
        if self._chains is None and self.structure.global_:
            log_q = torch.stack([layout.total(s) for s in drawn_sites(guide_trace).values()]).sum(0)
            weights = (
                summed_joint_weights(layout, summed) if summed else joint_weights(layout, guide_trace, model_trace)
            )
            lp = weights + log_q
            groups["sample_stats"] = self._by_chain({"lp": lp, "log_q": log_q})
        return from_dict(groups)

    def summary(self, draws: int = 1000, seed: int = 0) -> str:
        """A table of the global sites: mean, sd and central 90 % interval of every entry (of large sites, the norm)."""
        lines = [f"{'site':28s} {'mean':>10s} {'sd':>10s} {'5 %':>10s} {'95 %':>10s}"]
        known = self.structure.global_ or self._keeps_rows
        found = self.sample(draws=draws, seed=seed) if known else {}
        for name, value in found.items():
            flat = value.reshape(len(value), -1).float()
            columns = [(f"{name}[{i}]" if flat.shape[1] > 1 else name, flat[:, i]) for i in range(flat.shape[1])]
            if flat.shape[1] > 20:
                columns = [(f"|{name}| {tuple(value.shape[1:])}", flat.norm(dim=1))]
            for title, column in columns:
                low, high = torch.quantile(column, torch.tensor([0.05, 0.95], device=column.device)).tolist()
                sd = column.std(unbiased=False)
                lines.append(f"{title:28s} {column.mean():10.4g} {sd:10.4g} {low:10.4g} {high:10.4g}")
        lines += [
            f"{name:28s} one for every row; give the rows to sample()"
            for name in self.structure.local
            if name not in found
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        kinds = self.latent_sites | dict.fromkeys(self.structure.summed, "summed out")
        sites = ", ".join(f"{n} ({k})" for n, k in kinds.items()) or "no latent site"
        return f"Posterior of {type(self.program).__name__} ({self.kind}): {sites}"

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the posterior to a folder: safetensors and JSON, never a pickle; atomic, the last good one survives.

        Args:
            path: The folder; made if need be.
        """
        write_posterior(
            path,
            Content(self._owned, self.history, self.config, self.seed, self._chains, self.exact, self.versions),
        )

    @classmethod
    def load(cls, path: str | Path, program: Program | None = None, *, device: str | torch.device = "cpu") -> Posterior:
        """Read a posterior that `save` wrote.

        Args:
            path: The folder.
            program: The program that was fitted, if it is not one of the package's own (which are rebuilt from their
                name and configuration). It is copied.
            device: Where to put it.

        Raises:
            StorageError: If the file cannot be trusted, or a program of one's own is needed and was not given.
        """
        content = read_posterior(path, program, device)
        found = cls(
            content.owned,
            history=content.history,
            config=content.config,
            seed=content.seed,
            chains=content.chains,
            exact=content.exact,
        )
        found.versions = content.versions
        return found

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _plates(self) -> int:
        return self.structure.plates

    def _querying(self, seed: int) -> _Query:
        return _Query(self._owned, RandomStream(seed, self._owned.device))

    def _batch(self, data: tuple[Any, ...]) -> Batch:
        """The program's arguments from what the user gave, compared with the fit's, on the device."""
        if not data and self.program.num_required:
            raise ValueError(
                f"the program needs rows of {', '.join(self.program.argument_names)}; got none. "
                "Give them as in the fit; only what is observed may be left out."
            )
        if not data:
            return ()
        batch = self.program.accept(data[0] if len(data) == 1 else tuple(data))
        free = self.program.variable_length
        known = [spec.conform(x, free) for spec, x in zip(self._owned.inputs, batch, strict=False)]
        return tuple(x.to(self._owned.device) for x in (*known, *batch[len(known) :]))

    def _example(self) -> Batch:
        """Rows to run a guide on that does not look at them: one that does would say nan."""
        whole = isinstance(self.program, FunctionProgram) or self._keeps_rows
        rows = self._owned.num_data if whole else 1
        examples = (spec.example(rows).to(self._owned.device) for spec in self._owned.inputs)
        return tuple(x.fill_(math.nan) if x.is_floating_point() else x for x in examples)

    @property
    def _keeps_rows(self) -> bool:
        """Whether the guide has parameters for every row of the fit."""
        return isinstance(self.program.current_guide, AutoGuide) and bool(self.structure.local)

    def _padded(self, batch: Batch) -> Batch:
        return self.program.pad(batch)

    def _layout(self, draws: int) -> Layout:
        return Layout(self.program.data_name, self._plates, draws)

    def _stored(self, draws: int) -> Callable[..., None] | None:
        return None if self._chains is None else replay(self._chains, self.structure, draws, self._plates)

    def _run(self, batch: Batch, draws: int, *, predict: bool = False) -> tuple[Trace, Trace]:
        """Guide and model; what is summed out of the bound is drawn, given the data unless they are to be predicted."""
        run = self._prepared(batch, draws, predict=predict)
        traces = draw_summed(run) if self.structure.summed and not predict else run_program(run)
        check_stacked(self.structure, traces[1], self.program.data_name, draws)
        return traces

    def _terms(self, batch: Batch, draws: int, *, bound: bool = False) -> list[Term]:
        """The terms of the bound under draws, with what is marked summed out.

        Args:
            batch: The program's arguments.
            draws: How many draws of the guide's other sites.
            bound: Whether the guide's marked sites are enumerated too, and closed forms taken.
        """
        run = self._prepared(batch, draws)
        with RandomStream(0, self._owned.device).drawing():  # a look must not cost draws
            _, look = run_program(replace(run, draws=2, guide=self._stored(2)))
        check_stacked(self.structure, look, self.program.data_name, draws)
        check_data(look)
        traces = run_enumerated(run, enumerate_guide=bound)
        pairs = [(g, m, closed_form_kls(g, m) if bound else {}) for g, m in traces]
        return [term for g, m, closed in pairs for term in terms(g, m, self.program.data_name, closed)]

    def _prepared(self, batch: Batch, draws: int, *, predict: bool = False) -> Run:
        batch = self._padded(self.program.prepare(*batch))
        rows = torch.arange(num_rows(batch), device=self._owned.device)
        self._check_rows(len(rows))
        return Run(self.program, batch, rows, len(rows), draws, self._plates, predict, self._stored(draws))

    def _check_rows(self, came: int) -> None:
        if self._chains is None and self._keeps_rows and came != self._owned.num_data:
            raise ValueError(rows_of_the_fit(self.program.data_name, self._owned.num_data, came))

    def _run_guide(self, batch: Batch, draws: int) -> Trace:
        return run_guide(self._prepared(batch, draws))

    def _amortized(self) -> bool:
        """Whether rows are independent of each other given the parameters."""
        found = self.structure
        return bool(found.local + found.summed) and found.all_local(found.latent + found.summed) and found.by_row

    def chunks(self, batch: Batch, draws: int) -> Iterator[Batch]:
        """Pieces of a batch that was accepted, few enough rows each that K draws of them fit in memory."""
        size = num_rows(batch)
        separate = self.structure.all_local(self.structure.observed + self.structure.summed)
        if self.program.data_name and separate and not self._keeps_rows:
            width = max((x[0].numel() for x in batch if len(x)), default=1)
            step = max(1, _CHUNK // max(1, draws * width))
            if step < size and not (self.structure.local and self.structure.global_):
                for start in range(0, size, step):
                    yield tuple(x[start : start + step] for x in batch)
                return
        yield batch

    def _count(self, draws: int) -> int:
        if self._chains is None:
            return draws
        first = next(iter(self._chains.values()))
        return int(first.shape[0] * first.shape[1])

    def _by_chain(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        chains = 1 if self._chains is None else next(iter(self._chains.values())).shape[0]
        return {n: v.reshape(chains, -1, *v.shape[1:]).detach().cpu().numpy() for n, v in values.items()}


@functools.cache
def _versions() -> dict[str, str]:
    return versions()


class _Query:
    """The context of one query: no gradient, the posterior's own store, a random stream of its own."""

    def __init__(self, owned: ProgramInstance, stream: RandomStream) -> None:
        self._parts = (torch.no_grad(), owned.running(), stream.drawing())

    def __enter__(self) -> None:
        for part in self._parts:
            part.__enter__()

    def __exit__(self, *error: Any) -> None:
        for part in reversed(self._parts):
            part.__exit__(*error)


def _check_draws(draws: int) -> None:
    if not hasattr(draws, "__index__") or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws must be a whole number of at least 1; got {draws!r}.")
