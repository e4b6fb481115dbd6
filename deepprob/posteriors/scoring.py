"""A posterior's scores of rows: their evidence, and their densities if each is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepprob.errors import whole
from deepprob.posteriors.evidence import Evidence, evidence_of, weight_parts
from deepprob.posteriors.latent_queries import LatentQueries
from deepprob.posteriors.loo import LOO, leave_one_out


class Scoring(LatentQueries):
    """A posterior's scores of rows."""

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
        self._check_guide()
        batch = fitted.accept(data)
        with fitted.querying(seed):
            return torch.cat([torch.cat([*parts]) for parts in weight_parts(fitted, batch, particles)], dim=-1)

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
        found = self.evidence(*data, particles=particles, seed=seed).value
        return found.to(torch.get_default_dtype())

    def evidence(self, *data: Any, particles: int = 100, annealing: int = 0, seed: int = 0) -> Evidence:
        """`log_evidence` with its standard error and effective sample size, by row.

        Memory does not grow with the particles. With ``annealing``, every particle is a chain that moves from the guide
        to the posterior by Hamiltonian transitions of seven gradients each: annealed importance sampling. Where the
        guide is poor, ten chains with a hundred steps tell more than millions of particles.

        Args:
            data: The program's arguments, including the observed ones.
            particles: Number of particles, K.
            annealing: Number of steps from the guide to the posterior; 0 for plain importance sampling.
            seed: Random seed of the draws.

        Returns:
            An `Evidence` with ``value``, ``se`` and ``ess`` by row, and ``mean`` with ``mean_se``; it prints as a line.

        Raises:
            ValueError: As of `log_evidence`; with annealing, also if some latents are shared by rows or discrete.

        References:
            Neal (2001), Annealed importance sampling. Wu, Burda, Salakhutdinov, Grosse (2017), On the quantitative
            analysis of decoder-based generative models.

        Examples:
            Three particles of a weak guide tell little, and say so:

            >>> from deepprob.inference import svi
            >>> from deepprob.models import VAE
            >>> example = VAE.example()
            >>> posterior = svi(example.program, example.data, steps=1, progress=False)
            >>> few, many = (posterior.evidence(*example.data, particles=k) for k in (3, 3000))
            >>> bool(few.se.mean() > 5 * many.se.mean()), many.value.shape, bool((few.ess <= 3).all())
            (True, torch.Size([24]), True)
        """
        particles, fitted = whole("particles", particles), self._fitted
        annealing = whole("annealing", annealing, least=0)
        self._check_guide()
        if annealing and not fitted.amortized:
            raise ValueError(
                "annealing moves the latents of each row on their own, but in this program rows share latents. Leave "
                "out annealing=."
            )
        batch = fitted.accept(data)
        with fitted.querying(seed):
            return evidence_of(fitted, batch, particles, annealing)

    def _check_guide(self) -> None:
        if self.chains is not None:
            raise ValueError(
                "importance weights need a guide's density; this posterior holds draws. Use log_likelihood."
            )

    def loo(self, *data: Any, draws: int = 1000, seed: int = 0, site: str | None = None, corrected: bool = True) -> LOO:
        r"""Leave-one-out cross-validation of the training data, by Pareto-smoothed importance sampling.

        .. math:: \log p(y_i \mid y_{-i}) \approx \log \frac{\sum_k r_{ik} \, p(y_i \mid \theta_k)}{\sum_k r_{ik}},
            \qquad r_{ik} = \frac{p(\theta_k, y)}{q(\theta_k)} \Big/ p(y_i \mid \theta_k)

        The first factor of the weights turns draws from the guide into draws from the posterior; stored draws need
        none. Every row gets a Pareto k-hat, which says whether its weights can be relied on.

        A row of weight :math:`w_i` leaves with its weight: the divisor of :math:`r_{ik}` is
        :math:`p(y_i \mid \theta_k)^{w_i}`, and ``elpd`` is the weighted sum of ``pointwise``.

        A row's local latents are left out with it: they are integrated out by the guide's importance weights, where
        the guide draws them row by row. If all latents are local, the other rows tell nothing about the row that is
        left out, and its density is its evidence ``p(y_i)``. Fitted parameters, such as network weights without a
        prior, count as known in any case: they have seen every row.

        Args:
            data: The program's arguments, those of the fit.
            draws: Number of draws, K, at least 25; a posterior that holds draws uses all of them.
            seed: Random seed of the draws.
            site: The observed site whose rows to leave out, if several share no rows.
            corrected: Whether to correct the guide. In hundreds of dimensions its weights are unreliable for every
                inexact guide; without them the result is that of the guide as if it were the posterior.

        Returns:
            A `LOO` with ``elpd``, ``se``, ``p_loo``, ``pointwise`` and ``khat`` by row, and ``influential`` rows.

        Raises:
            ValueError: If the rows are not as many as in the fit, the posterior is one point, or the likelihood does
                not split into rows.

        References:
            Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
            WAIC. Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian leave-one-out cross-validation for large data.

        Examples:
            A mean that is known to 0.5 from four values predicts a fifth with the variance 1 + 1/3 of three:

            >>> import pyro, pyro.distributions as dist, torch
            >>> from deepprob.inference import svi
            >>> from deepprob.programs.program import Program
            >>> def model(y):
            ...     loc = pyro.sample("loc", dist.Normal(0.0, 100.0))
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
            >>> y = torch.tensor([-1.0, 0.0, 0.0, 1.0])
            >>> found = svi(Program.of(model, "normal"), y, seed=0, progress=False).loo(y, draws=4000)
            >>> exact = dist.Normal((y.sum() - y) / 3, (1 + 1 / 3) ** 0.5).log_prob(y).sum()
            >>> abs(found.elpd - float(exact)) < 0.1, found.influential.tolist()
            (True, [])
        """
        fitted, draws = self._fitted, self._fitted.num_stored or whole("draws", draws, least=25)
        if site is None:
            self.instance.structure.check_rows()
        return leave_one_out(fitted, fitted.accept(data), draws, seed, site=site, corrected=corrected)
