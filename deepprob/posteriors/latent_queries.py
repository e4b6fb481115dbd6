"""The queries of a posterior about the local latent sites: encode, decode, reconstruct, forecast, impute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepprob.errors import whole
from deepprob.posteriors.decoding import decoded, reconstructed
from deepprob.posteriors.encoding import Encoding, encode
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.forecasting import forecasted
from deepprob.posteriors.imputation import imputed
from deepprob.posteriors.latent_draws import latent_draws
from deepprob.posteriors.prediction import Prediction
from deepprob.posteriors.saving import Content


class LatentQueries(Content):
    """A posterior's queries about the latent sites of rows, and about rows given these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fitted = FittedProgram(self.instance, self.chains)

    def encode(self, *data: Any, draws: int = 100, seed: int = 0) -> Encoding:
        r"""Mean and standard deviation of the local latent sites given the data.

        .. math:: \mathbb E_q[z_i \mid x_i], \qquad \mathrm{sd}_q[z_i \mid x_i]

        They are those of the guide's distribution, such as an encoder's outputs, where it has a mean and a variance.
        If it depends on draws of other sites (a second layer of latents, weights) or on data that the program draws
        anew (dynamic binarization), they are averaged over draws: the mean of the conditional means, and the law of
        total variance. Otherwise they are those of the draws.

        Args:
            data: The program's arguments.
            draws: Number of draws, K, at least 2.
            seed: Random seed of the draws.

        Returns:
            An `Encoding`: ``mean`` and ``sd``, each ``(B, *site)`` (a dict by site if there are several local sites),
            and ``estimated``, the sites whose numbers are estimated from draws.

        Raises:
            ValueError: If no latent site is local, or the data do not match those of the fit.

        Examples:
            The codes of an autoencoder are its encoder's outputs:

            >>> import torch
            >>> from deepprob.inference import svi
            >>> from deepprob.models import VAE
            >>> x = torch.randn(20, 3)
            >>> posterior = svi(VAE((3,), 2, likelihood="normal"), x, steps=3, progress=False)
            >>> codes = posterior.encode(x)
            >>> codes
            Encoding(mean and sd (20, 2); in closed form)
            >>> torch.allclose(codes.mean, posterior.program.encode(x).mean)
            True
        """
        draws = whole("draws", draws, least=2)
        self._check_local("encode", "posterior.sample() or posterior.summary()")
        batch = self._fitted.accept(data)
        with self._fitted.querying(seed):
            return encode(self._fitted, batch, draws)

    def decode(self, z: Any, *data: Any, draws: int = 100, seed: int = 0, site: str | None = None) -> Prediction:
        r"""The distribution of rows given values of their local latent sites.

        .. math:: p(x_i \mid z_i) = \frac1K \sum_k p(x_i \mid z_i, \theta_k), \qquad \theta_k \sim q(\theta)

        Latent sites without a given value are drawn: global ones from the posterior, local ones from the model.

        Args:
            z: Values of the local latent site, ``(B, *site)``, as an array or a tensor; or a dict of values by site.
            data: The program's arguments, if the model needs them (inputs); observed ones are drawn anew.
            draws: Number of draws, K.
            seed: Random seed of the draws.
            site: The observed site, if there are several; or one that the model computes from others.

        Raises:
            TypeError: If ``z`` is not numbers.
            ValueError: If no latent site is local; or a site of ``z`` is unknown, or its value has another shape than
                the site or lies outside of its support; or if the model needs inputs and none are given.

        Examples:
            The decoder's mean of two codes, and of the codes of rows:

            >>> import torch
            >>> from deepprob.inference import svi
            >>> from deepprob.models import VAE
            >>> example = VAE.example()
            >>> posterior = svi(example.program, example.data, epochs=3)
            >>> posterior.decode([[0.0, 0.0], [3.0, 3.0]]).mean.shape
            torch.Size([2, 3, 2])
            >>> posterior.decode(posterior.encode(*example.data).mean).mean.shape
            torch.Size([24, 3, 2])
        """
        draws, fitted = whole("draws", draws), self._fitted
        self._check_local("decode", "posterior.predict(*data)")
        batch = fitted.accept(data) if data else ()
        found = fitted.structure
        drawn = latent_draws(fitted, (), draws, seed) if found.global_ else {}
        with fitted.querying(seed):
            trace = decoded(fitted, z, batch, {name: drawn[name] for name in found.global_}, draws)
            rows = fitted.prediction(trace, site, draws)
        if not data and rows.draws.is_floating_point() and bool(rows.draws.isnan().any()):
            raise ValueError(
                "the rows depend on inputs too, and none were given. Call posterior.decode(z, *data); the values of "
                "observed sites in the data have no influence."
            )
        return rows

    def reconstruct(self, *data: Any, draws: int = 100, seed: int = 0, site: str | None = None) -> Prediction:
        r"""The distribution of rows given the latent sites that explain the observed rows.

        .. math:: p(x_i' \mid x_i) = \frac1K \sum_k p(x_i' \mid z_{ik}, \theta_k), \qquad
            z_{ik} \sim q(z_i \mid x_i, \theta_k)

        Args:
            data: The program's arguments, including the observed ones.
            draws: Number of draws, K.
            seed: Random seed of the draws.
            site: The observed site, if there are several; or one that the model computes from others.

        Raises:
            ValueError: If no latent site is local, or the data do not match those of the fit.

        Examples:
            A reconstruction is a mixture over codes of the row, and so wider than the decoder at their mean:

            >>> import torch
            >>> from deepprob.inference import svi
            >>> from deepprob.models import VAE
            >>> x = torch.randn(20, 3)
            >>> posterior = svi(VAE((3,), 2, likelihood="normal"), x, steps=3, progress=False)
            >>> bool((posterior.reconstruct(x).sd > posterior.decode(posterior.encode(x).mean).sd).all())
            True
        """
        draws = whole("draws", draws)
        self._check_local("reconstruct", "posterior.predict(*data)")
        batch = self._fitted.accept(data)
        with self._fitted.querying(seed):
            return self._fitted.prediction(reconstructed(self._fitted, batch, draws), site, draws)

    def forecast(
        self, *data: Any, steps: int | None = None, draws: int = 100, seed: int = 0, site: str | None = None
    ) -> Prediction:
        r"""The distribution of the steps after the end of each row, given the row.

        .. math:: p(x_{T_i+1 : T_i+H} \mid x_{1:T_i}) = \frac1K \sum_k p(x_{T_i+1 : T_i+H} \mid z_{ik}, \theta_k),
            \qquad z_{ik} \sim q(z_{1:T_i} \mid x_{1:T_i})

        Each draw takes the latent sites that explain the row, moves them H steps ahead from the row's own end, whatever
        the lengths of the others, and draws the values there. The steps of a draw belong together: ``draws`` are
        paths, of which ``draws.sum(2)`` is a forecast of the total.

        A program has a forecast if it has a method, or was made with a function, ``forecast(steps, *arguments)``: a
        Pyro program in which latent sites of the model have the values that explain the row, and which samples the
        next values last.

        Args:
            data: The program's arguments, as in the fit.
            steps: Number of steps ahead, H; it may also stand last, ``forecast(x, 4)``.
            draws: Number of draws, K.
            seed: Random seed of the draws.
            site: The site that the forecast samples; None for the last one.

        Returns:
            A `Prediction` with ``draws`` of shape ``(K, B, H, D)``, and ``mean`` of shape ``(B, H, D)``.

        Raises:
            TypeError: If the program has no forecast.
            ValueError: If the data do not match those of the fit, or the forecast samples no such site.

        Examples:
            Each of two rows, of 3 and 5 steps, is continued from its own end:

            >>> import torch
            >>> from deepprob.inference import svi
            >>> from deepprob.models import DeepMarkovModel
            >>> program = DeepMarkovModel(2, latent_dim=2, hidden_dim=8, recurrent_dim=8, likelihood="normal")
            >>> x, lengths = torch.randn(2, 5, 2), torch.tensor([3, 5])
            >>> posterior = svi(program, (x, lengths), steps=2, progress=False)
            >>> ahead = posterior.forecast(x, lengths, steps=4, draws=20)
            >>> alone = posterior.forecast(x[:1, :3], lengths[:1], steps=4, draws=20)
            >>> ahead.draws.shape, alone.mean.shape
            (torch.Size([20, 2, 4, 2]), torch.Size([1, 4, 2]))
        """
        if steps is None and data and isinstance(data[-1], int):
            *data, steps = data  # type: ignore[assignment]
        steps, draws = whole("steps", steps), whole("draws", draws)
        batch = self._fitted.accept(tuple(data))
        with self._fitted.querying(seed):
            return forecasted(self._fitted, batch, steps, draws, site)

    def impute(
        self,
        *data: Any,
        missing: Any = None,
        draws: int = 100,
        sweeps: int = 20,
        seed: int = 0,
        site: str | None = None,
    ) -> Prediction:
        r"""Draw the missing values of rows given their observed ones; the observed ones stay.

        If the program takes missing values itself (``Program.of(..., missing="allow")``), or no latent site is local,
        the latents are drawn given the observed values, and the missing ones given the latents. The encoder of another
        program needs complete rows: each draw is then the last state of a Markov chain (pseudo-Gibbs) that starts at
        a draw from the prior and repeats

        .. math:: z \sim q(z \mid x_o, x_m), \qquad x_m \sim p(x_m \mid z).

        If the guide is the exact posterior, the chain's limit is :math:`p(x_m \mid x_o)`. It converges the more slowly
        the more is missing. With global latents, such as Bayesian weights, each draw has its own, and the chains run
        one after the other, which takes longer.

        Args:
            data: The program's arguments, with NaN where a value is missing.
            missing: Where values are missing, True, of the shape of the argument that has them; or a dict of such
                arrays by argument. It is needed for whole numbers and bools, which have no NaN, and adds to the NaN.
            draws: Number of draws, K.
            sweeps: Number of steps of every Markov chain.
            seed: Random seed of the draws.
            site: The observed site, if several have missing values.

        Returns:
            A prediction of the complete rows, of sd 0 where a value is observed: ``mean`` fills the gaps by one value,
            ``draws`` by K values. For classes, ``mean`` and ``probs`` are probabilities.

        Raises:
            ValueError: If missing values belong to an input, which the program does not model, to a site whose values
                depend on each other given the latents, or to rows of a guide that was fitted to complete ones; or if
                ``missing`` has another shape than the data.

        References:
            Rezende, Mohamed, Wierstra (2014), Stochastic Backpropagation, appendix F.

        Examples:
            Two noisy readings of one quantity: given one, the mean of the other is half of it.

            >>> import pyro, torch, pyro.distributions as dist
            >>> from deepprob.inference import svi
            >>> from deepprob.programs import Program
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([len(x), 2]).to_event(1), obs=x)
            >>> def guide(x):
            ...     weight = pyro.param("weight", torch.tensor(1 / 3))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("z", dist.Normal(weight * x.sum(-1), 3**-0.5))
            >>> posterior = svi(Program.of(model, guide), torch.ones(8, 2), steps=1, progress=False)
            >>> filled = posterior.impute(torch.tensor([[4.0, torch.nan]]), draws=1000)
            >>> filled.mean.round().tolist(), filled.sd.round().tolist()
            ([[4.0, 2.0]], [[0.0, 1.0]])
        """
        return imputed(self._fitted, data, missing, whole("draws", draws), whole("sweeps", sweeps), seed, site)

    def _check_local(self, query: str, instead: str) -> None:
        """Refuse a question about local latents where there are none."""
        found = self.instance.structure
        if found.local or any(found.sites[name].local for name in found.summed):
            return
        names = [*found.latent, *found.summed]
        has = f"all rows share the latent sites ({_first_few(names)})" if names else "there are none"
        raise ValueError(f"{query} is about the latent sites of rows, but in this program {has}. Ask for {instead}.")


def _first_few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
