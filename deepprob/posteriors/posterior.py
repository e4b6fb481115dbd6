"""The noun `Posterior`: the result of every routine, to sample, predict, score, save and export to ArviZ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.errors import whole
from deepprob.posteriors.arviz_export import latents_to_arviz, to_arviz
from deepprob.posteriors.densities import joint_weights, local_elbo, log_likelihood, row_weights
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.prediction import Prediction
from deepprob.posteriors.saving import Content, read_posterior, write_posterior
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.sites import Site, is_deterministic, sample_sites
from deepprob.programs.structure import Structure


class Posterior(Content):
    """The posterior over a program's latent sites, from any routine.

    Two kinds: one holds a guide (a point estimate is a Delta guide), one holds draws with a chain axis. Both answer the
    same questions. Every query takes a ``seed``, leaves the caller's random state alone, and is defined by one run of
    the program per draw.

    Args:
        instance: The fitted program; the posterior owns it.
        history: The record of the fit.
        config: The routine and its settings, as JSON.
        seed: The fit's seed.
        chains: For the kind that holds draws: values by site, shape ``(chains, draws, *site)``.
        exact: Whether `log_evidence` is a closed form.
        versions: Versions of Python and of the packages used in the fit.

    Attributes:
        history: The record of the fit.
        config: The routine and its settings.
        seed: The fit's seed.
        versions: Versions of Python and of the packages used in the fit.
        exact: Whether `log_evidence` is a closed form.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fitted = FittedProgram(self.instance, self.chains)
        self.instance.program.eval()

    # -- properties ----------------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The posterior's own copy of the program."""
        return self.instance.program

    @property
    def structure(self) -> Structure:
        """The program's sites."""
        return self.instance.structure

    @property
    def kind(self) -> str:
        """``"guide"`` or ``"draws"``."""
        return "guide" if self.chains is None else "draws"

    @property
    def latent_sites(self) -> dict[str, str]:
        """The latent sites by name, each ``"global"`` or ``"local"``."""
        found = dict.fromkeys(self.structure.global_, "global")
        return found | dict.fromkeys(self.structure.local, "local")

    def parameters(self) -> dict[str, Tensor]:
        """A copy of the fitted parameters at their constrained values, by the names that the user gave them.

        ``pyro.param("s")`` is called ``s``, and the weight of ``self.net`` is called ``net.weight``. If both kinds have
        the same name, the ``pyro.param`` is called ``store.<name>``. A callback's ``fit.parameters()`` has the same
        names. Buffers are attributes of `program`.

        Examples:
            >>> import pyro, pyro.distributions as dist
            >>> from deepprob.inference import svi
            >>> def model(y):
            ...     scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
            >>> y = torch.tensor([-3.0, 3.0])
            >>> posterior = svi(Program.of(model, lambda y: None), y, epochs=1000, progress=False)
            >>> {name: round(value.item(), 2) for name, value in posterior.parameters().items()}
            {'scale': 3.0}
        """
        return self.instance.constrained()

    # -- queries -------------------------------------------------------------------------------------------------

    def sample(self, *data: Any, draws: int = 100, seed: int = 0) -> dict[str, Tensor]:
        """Draw latent sites from the posterior.

        Sites that are summed out of the bound are drawn from their exact posterior given the other sites and the data.
        With data, sites that the model computes from others (``pyro.deterministic``, reparameterised sites) follow.

        Args:
            data: The program's arguments. Without them only global sites are drawn, except those summed out.
            draws: Number of draws, K.
            seed: Random seed of the draws.

        Returns:
            Values by site: ``(K, *site)`` for global sites (``(K,)`` for a scalar site), ``(K, B, *site)`` for local
            sites.

        Raises:
            ValueError: If no data are given but every latent site is local, or the guide depends on the data; or if the
                data do not match those of the fit.
        """
        draws, fitted = whole("draws", draws), self._fitted
        complete = bool(data) or not self.instance.inputs
        extra = self.structure.summed + self.structure.computed if complete else ()
        if complete:
            batch = fitted.accept(data)
            names: tuple[str, ...] = self.structure.latent
        else:
            batch = fitted.example()
            names = self.structure.latent if fitted.keeps_rows else self.structure.global_
            if not names:
                hidden = ", ".join(self.structure.local + self.structure.summed)
                raise ValueError(f"every latent site ({hidden}) is local. Give the rows: posterior.sample(*data).")
        layout = fitted.layout(draws)
        with fitted.querying(seed):
            if extra:
                guide_trace, model_trace = fitted.run(batch, draws)
            else:
                guide_trace = fitted.run_guide(batch, draws)
            found = {name: layout.draws_first(guide_trace.nodes[name]) for name in names}
            found |= {name: layout.draws_first(model_trace.nodes[name]) for name in extra}
        if not data and any(bool(v.isnan().any()) for v in found.values() if v.is_floating_point()):
            raise ValueError("the guide depends on the data, and none were given. Call posterior.sample(*data).")
        return found

    def predict(self, *data: Any, draws: int = 100, seed: int = 0, site: str | None = None) -> Prediction:
        """The posterior predictive distribution of the given rows.

        Args:
            data: The program's arguments; observed ones may be left out.
            draws: Number of draws from the posterior, K.
            seed: Random seed of the draws.
            site: The observed site to predict, if there are several; or one that the model computes from others.

        Raises:
            ValueError: If the rows do not match those of the fit, or the site is unknown or ambiguous.
        """
        draws = whole("draws", draws)
        batch = self._fitted.accept(data)
        with self._fitted.querying(seed):
            return self._predicted(self._fitted.run(batch, draws, predict=True)[1], site, draws)

    def predict_prior(
        self, rows: int = 16, *data: Any, draws: int = 1, seed: int = 0, site: str | None = None
    ) -> Prediction:
        """The prior predictive distribution, with the fitted parameters.

        Args:
            rows: Number of rows, B.
            data: The program's arguments, if the model needs them (inputs of a regression).
            draws: Number of draws of every site, K.
            seed: Random seed of the draws.
            site: The observed site to predict, if there are several.
        """
        return self._predicted(self._prior_trace(rows, data, draws, seed), site, draws)

    def _predicted(self, model_trace: Trace, site: str | None, draws: int) -> Prediction:
        node, layout = self._observed_node(model_trace, site), self._fitted.layout(draws)
        if node["name"] in self.structure.computed:
            value = layout.draws_first(node)
            return Prediction(Delta(value), value, node["name"])
        return Prediction(node["fn"], layout.draws_first(node), node["name"], unused=layout.unused(node))

    def _observed_node(self, model_trace: Trace, site: str | None) -> Site:
        observed = [n for n, _ in sample_sites(model_trace) if n in self.structure.observed]
        if site is None:
            if len(observed) != 1:
                known = bool(observed or self.structure.computed)
                hint = "Choose one with site='...'" if known else "There is nothing to predict: ask for sample"
                raise ValueError(f"the program observes {', '.join(observed) or 'no site'}. {hint}.")
            site = observed[0]
        elif site not in (*observed, *self.structure.computed):
            raise ValueError(f"the program observes no site {site!r}. Choose from: {', '.join(observed)}.")
        return model_trace.nodes[site]

    def sample_prior(self, rows: int = 16, *data: Any, draws: int = 1, seed: int = 0) -> dict[str, Tensor]:
        """Ancestral samples of every site from the model alone, with the fitted parameters.

        Args:
            rows: Number of rows, B.
            data: The program's arguments, if the model needs them (inputs of a regression).
            draws: Number of draws of every site, K.
            seed: Random seed of the draws.

        Returns:
            Values by site, ``(K, B, *site)`` for local and observed sites, ``(K, *site)`` for global sites.
        """
        trace, layout = self._prior_trace(rows, data, draws, seed), self._fitted.layout(draws)
        return {n: layout.draws_first(s) for n, s in sample_sites(trace) if not is_deterministic(s)}

    def _prior_trace(self, rows: int, data: tuple[Any, ...], draws: int, seed: int) -> Trace:
        draws = whole("draws", draws)
        batch = self._fitted.accept(data) if data else ()
        with self._fitted.querying(seed):
            return self._fitted.run_prior(batch, rows, draws)

    def log_likelihood(self, *data: Any, draws: int = 100, seed: int = 0, site: str | None = None) -> Tensor:
        """Log-likelihood of every row under every draw, in nats; sites marked for enumeration are summed out.

        Without a plate over rows, the independent terms of the one observed site count as rows.

        Args:
            data: The program's arguments, including the observed ones.
            draws: Number of draws, K.
            seed: Random seed of the draws.
            site: One of the observed sites, by its own rows; None for all of them together.

        Returns:
            Shape ``(K, B)``.

        Raises:
            ValueError: If several observed sites do not share a plate over rows.
        """
        draws, fitted = whole("draws", draws), self._fitted
        if site is None:
            self.structure.check_rows()
        parts = []
        for chunk in fitted.chunks(fitted.accept(data), draws):
            with fitted.querying(seed):
                parts.append(log_likelihood(fitted, chunk, draws, site))
        return torch.cat(parts, dim=1)

    def log_weights(self, *data: Any, particles: int = 100, seed: int = 0) -> Tensor:
        r"""Log importance weights ``log p(x, z_k) - log q(z_k | x)``.

        Args:
            data: The program's arguments, including the observed ones.
            particles: Number of particles, K.
            seed: Random seed of the draws.

        Returns:
            Shape ``(K, B)`` if all latents are local, else ``(K,)`` for all rows together.

        Raises:
            ValueError: If the posterior holds draws, whose density is unknown.
        """
        particles, fitted = whole("particles", particles), self._fitted
        if self.chains is not None:
            raise ValueError(
                "importance weights need a guide's density; this posterior holds draws. Use log_likelihood."
            )
        batch = fitted.accept(data)
        with fitted.querying(seed):
            if not fitted.amortized:
                return joint_weights(fitted, batch, particles)
            return torch.cat([row_weights(fitted, x, particles) for x in fitted.chunks(batch, particles)], dim=1)

    def log_evidence(self, *data: Any, particles: int = 100, seed: int = 0) -> Tensor:
        r"""Importance-weighted lower bound on the log evidence, in nats.

        .. math:: \log \hat p(x) = \log \frac1K \sum_k p(x, z_k) / q(z_k \mid x)

        Args:
            data: The program's arguments, including the observed ones.
            particles: Number of particles, K. With one the bound is the ELBO; it tightens in expectation as K grows.
            seed: Random seed of the draws.

        Returns:
            One value per row, shape ``(B,)``, if all latents are local; otherwise one number for all rows.

        Raises:
            ValueError: If the posterior holds draws, whose density is unknown; or if the data do not match those of the
                fit, lack an observed argument, or lie outside of a site's support.

        References:
            Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
        """
        weights = self.log_weights(*data, particles=particles, seed=seed)
        return weights.logsumexp(0) - math.log(particles)

    def elbo(self, *data: Any, particles: int = 1, seed: int = 0) -> Tensor:
        """Evidence lower bound of every row, in nats, without the KL of global latents.

        Args:
            data: The program's arguments, including the observed ones.
            particles: Number of draws to average over, K.
            seed: Random seed of the draws.

        Returns:
            Shape ``(B,)``.
        """
        self.structure.check_rows()
        particles = whole("particles", particles)
        batch = self._fitted.accept(data)
        with self._fitted.querying(seed):
            return self.elbo_of(batch, particles)

    def elbo_of(self, batch: Batch, particles: int) -> Tensor:
        """`elbo` of an accepted batch, inside a running program; routines score held-out data with it."""
        return torch.cat([local_elbo(self._fitted, chunk, particles) for chunk in self.chunks(batch, particles)])

    def chunks(self, batch: Batch, draws: int) -> Iterator[Batch]:
        """Split an accepted batch into chunks of rows that fit in memory with K draws each."""
        return self._fitted.chunks(batch, draws)

    def trace(self, *data: Any, draws: int = 100, seed: int = 0, predict: bool = False) -> tuple[Trace, Trace]:
        """The guide's and the model's Pyro traces under a leading plate of draws, for diagnostics.

        Args:
            data: The program's arguments.
            draws: Number of draws, K. Values have shape ``(K, B, *site)`` (local) or ``(K, 1, *site)`` (global).
            seed: Random seed of the draws.
            predict: Whether to draw the observed sites from the model.
        """
        draws = whole("draws", draws)
        batch = self._fitted.accept(data)
        with self._fitted.querying(seed):
            return self._fitted.run(batch, draws, predict=predict)

    # -- export --------------------------------------------------------------------------------------------------

    def to_arviz(self, *data: Any, draws: int = 1000, seed: int = 0) -> Any:
        """The posterior as an ArviZ container: InferenceData on ArviZ 0.23, a DataTree on 1.x.

        Groups: posterior, and with data posterior_predictive, log_likelihood, observed_data, and (of a guide)
        sample_stats with ``lp`` and ``log_q`` of global latents.

        Args:
            data: The program's arguments, including the observed ones.
            draws: Number of draws; a posterior that holds draws exports all of them.
            seed: Random seed of the draws.
        """
        if self.chains is not None:
            first = next(iter(self.chains.values()))
            draws = first.shape[0] * first.shape[1]
        draws = whole("draws", draws)
        holds_data = not (self.instance.inputs or self.program.num_required) and self.structure.observed
        if not data and not holds_data:
            return latents_to_arviz(self._fitted, self.sample(draws=draws, seed=seed))
        return to_arviz(self._fitted, self._fitted.accept(data), draws, seed)

    def summary(self, draws: int = 1000, seed: int = 0) -> str:
        """A table of the global sites: mean, sd and central 90 % interval of every entry (large sites: the norm)."""
        lines = [f"{'site':28s} {'mean':>10s} {'sd':>10s} {'5 %':>10s} {'95 %':>10s}"]
        known = self.structure.global_ or self._fitted.keeps_rows
        found = self.sample(draws=draws, seed=seed) if known else {}
        for name, value in found.items():
            flat = value.reshape(len(value), -1).double()
            columns = [(f"{name}[{i}]" if flat.shape[1] > 1 else name, flat[:, i]) for i in range(flat.shape[1])]
            if flat.shape[1] > 20:
                columns = [(f"|{name}| {tuple(value.shape[1:])}", flat.norm(dim=1))]
            for title, column in columns:
                low, high = torch.quantile(column, column.new_tensor([0.05, 0.95])).tolist()
                sd = column.std(unbiased=False)
                lines.append(f"{title:28s} {column.mean():10.4g} {sd:10.4g} {low:10.4g} {high:10.4g}")
        lines += [
            f"{name:28s} local, one value per row: call sample(*data)"
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
        """Write the posterior to a folder: safetensors and JSON, never a pickle. The write is atomic.

        Args:
            path: The folder; made if need be.
        """
        write_posterior(path, self)

    @classmethod
    def load(cls, path: str | Path, program: Program | None = None, *, device: str | torch.device = "cpu") -> Posterior:
        """Read a posterior that `save` wrote.

        Args:
            path: The folder.
            program: The program that was fitted; it is copied. A registered program, such as the package's models, can
                be left out: it is rebuilt from its name and configuration.
            device: The device to load the posterior to.

        Raises:
            StorageError: If the save is damaged, or ``program`` is needed and was not given.
        """
        return cls(**vars(read_posterior(path, program, device)))
