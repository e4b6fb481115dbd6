"""The noun `Posterior`: the result of every routine, to sample, predict, score, save and export to ArviZ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.errors import whole
from deepprob.posteriors.arviz_export import argument_names, latents_to_arviz, to_arviz
from deepprob.posteriors.conditioning import predicted_trace
from deepprob.posteriors.densities import local_elbo, log_likelihood
from deepprob.posteriors.export_labels import labels_of
from deepprob.posteriors.latent_draws import latent_draws
from deepprob.posteriors.prediction import Prediction
from deepprob.posteriors.prediction_names import index_of
from deepprob.posteriors.saving import read_posterior, write_posterior
from deepprob.posteriors.scoring import Scoring
from deepprob.posteriors.table import table
from deepprob.programs.guides import GuideSpec
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.origin import origin_of
from deepprob.programs.program import Program
from deepprob.programs.structure import Structure


class Posterior(Scoring):
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

    ``history``, ``config``, ``seed``, ``versions`` and ``exact`` are attributes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.instance.waiting.keys() - self.instance.tensors().keys():
            self._fitted.check_complete()
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
        return latent_draws(self._fitted, data, whole("draws", draws), seed)

    def predict(
        self,
        *data: Any,
        draws: int = 100,
        seed: int = 0,
        site: str | None = None,
        given: Mapping[str, Any] | None = None,
        do: Mapping[str, Any] | None = None,
    ) -> Prediction:
        r"""The posterior predictive distribution of the given rows.

        .. math:: p(y \mid v) = \sum_k \bar w_k \, p(y \mid \theta_k, v), \quad \bar w_k \propto p(v \mid \theta_k);
            \qquad p(y \mid do(v)) = \frac1K \sum_k p(y \mid \theta_k, v)

        Args:
            data: The program's arguments; observed ones may be left out.
            draws: Number of draws from the posterior, K.
            seed: Random seed of the draws.
            site: The observed site to predict, if there are several; or one that the model computes from others.
            given: Known values by site, of the shape that `sample` gives without draws: the draws are resampled by the
                density of these values, the model's for observed sites and the guide's for latent ones.
            do: Values by site that the model uses in the place of the sites' own. Nothing is learned from them: the
                guide's sites keep their draws, as under ``pyro.poutine.do``. Computed sites can be set too.

        Raises:
            ValueError: If the rows do not match those of the fit, the site is unknown or ambiguous, or a value does not
                fit its site.

        Examples:
            A new reading tells about the temperature, and so about the other one; a display set by hand does not:

            >>> import pyro, pyro.distributions as dist
            >>> from deepprob.inference import svi
            >>> def model(a=None, b=None):
            ...     temperature = pyro.sample("temperature", dist.Normal(20.0, 3.0))
            ...     pyro.sample("a", dist.Normal(temperature, 1.0), obs=a)
            ...     pyro.sample("b", dist.Normal(temperature, 1.0), obs=b)
            >>> posterior = svi(Program.of(model, "normal"), (torch.tensor(21.0), torch.tensor(21.0)), steps=2000)
            >>> def mean(**how):
            ...     return round(float(posterior.predict(site="b", draws=4000, **how).mean))
            >>> mean(), mean(given={"a": 23.5}), mean(do={"a": 23.5})
            (21, 22, 21)
        """
        draws, data = whole("draws", draws), self._fitted.inputs_of(data)
        batch = self._fitted.accept(data)
        with self._fitted.querying(seed):
            trace = predicted_trace(self._fitted, batch, draws, site, given or {}, do or {})
            found = self._fitted.prediction(trace, site, draws)
        found.names = replace(found.names, index=index_of(data, num_rows(batch)))
        return found

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
        draws = whole("draws", draws)
        batch = self._fitted.accept(self._fitted.inputs_of(data)) if data else ()
        with self._fitted.querying(seed):
            trace = self._fitted.run_prior(batch, rows, draws)
        return self._fitted.prediction(trace, site, draws)

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
        draws = whole("draws", draws)
        batch = self._fitted.accept(self._fitted.inputs_of(data)) if data else ()
        with self._fitted.querying(seed):
            found = self._fitted.prior_draws(batch, rows, draws)
        return {name: value for name, value in found.items() if name not in self.structure.computed}

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

        With data the groups are: ``posterior``, ``posterior_predictive``, ``log_likelihood`` by observed site and row,
        ``sample_stats`` with the log joint density ``lp`` and, of a guide, ``log_q``; ``prior`` and
        ``prior_predictive`` from the model alone; ``observed_data``, and ``constant_data`` with the other arguments.
        Axes are named after plates; the index and the columns of a frame are their coordinates.

        Memory does not grow with the draws: an array of more than 128 MiB lies in a temporary file (``TMPDIR``).

        Args:
            data: The program's arguments, including the observed ones. Without them only global sites are exported.
            draws: Number of draws; a posterior that holds draws exports all of them.
            seed: Random seed of the draws.
        """
        fitted, draws = self._fitted, self._fitted.num_stored or whole("draws", draws)
        version = self.versions.get("deepprob", "unknown")
        attrs = {"inference_library": "deepprob", "inference_library_version": version, "seed": self.seed}
        holds_data = not (self.instance.inputs or self.program.num_required) and self.structure.observed
        if not data and not holds_data:
            return latents_to_arviz(fitted, self.sample(draws=draws, seed=seed), attrs)
        batch = fitted.accept(data)
        return to_arviz(
            fitted, batch, draws, seed, labels_of(data, argument_names(fitted, batch), origin_of(batch).columns), attrs
        )

    def summary(self, draws: int = 1000, seed: int = 0) -> str:
        """A table of the global sites: mean, sd and central 90 % interval of every entry (large sites: the norm)."""
        known = self.structure.global_ or self._fitted.keeps_rows
        return table(self.sample(draws=draws, seed=seed) if known else {}, self.structure.local)

    def __repr__(self) -> str:
        kinds = self.latent_sites | dict.fromkeys(self.structure.summed, "summed out")
        sites = ", ".join(f"{n} ({k})" for n, k in kinds.items()) or "no latent site"
        return f"Posterior of {type(self.program).__name__} ({self.kind}): {sites}"

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the posterior to a folder, made if need be, atomically: safetensors and JSON, never a pickle."""
        write_posterior(path, self)

    @classmethod
    def load(
        cls,
        path: str | Path,
        program: Program | None = None,
        *,
        guide: GuideSpec = None,
        device: str | torch.device = "cpu",
    ) -> Posterior:
        """Read a posterior that `save` wrote.

        Args:
            path: The folder.
            program: The program that was fitted; it is copied. One of the package's models may be left out.
            guide: The guide of the fit, if ``svi(guide=...)`` got neither a name nor a class of Pyro.
            device: The device to load the posterior to.

        Raises:
            StorageError: If the save is damaged, or ``program`` or ``guide`` is needed and was not given.
        """
        return cls(**vars(read_posterior(path, program, device, guide)))
