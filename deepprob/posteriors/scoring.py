"""A posterior's scores of left-out rows."""

from __future__ import annotations

from typing import Any

from deepprob.errors import whole
from deepprob.posteriors.latent_queries import LatentQueries
from deepprob.posteriors.loo import LOO, leave_one_out


class Scoring(LatentQueries):
    """A posterior's scores of left-out rows."""

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
