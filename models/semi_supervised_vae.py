"""The semi-supervised variational autoencoder: a class and a code for every row, few classes observed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from deepprob.data import DataSet, as_split
from deepprob.distributions.common_noise import CommonNormal
from deepprob.errors import MissingValueError, positive, unknown, whole
from deepprob.models.vae import NORMAL_POSTERIORS, VAE
from deepprob.networks.by_class import MLPByClass
from deepprob.networks.conditional import Conditional
from deepprob.networks.dense import MLP
from deepprob.networks.inputs import check_outputs, moments, run_by_row
from deepprob.networks.likelihood import Likelihood
from deepprob.networks.network import whole_sizes
from deepprob.networks.values import likelihood_of
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.example import Example
from deepprob.programs.fields import Fill
from deepprob.programs.minibatch import Batch
from deepprob.programs.penalties import penalize
from deepprob.programs.program import Program

UNLABELED = -1
_IMPOSSIBLE = -1e4  # a logit whose probability rounds to 0, with a finite logarithm
_LABELED_AT_ONCE = 200  # labeled rows of one step's penalty


class SemiSupervisedVAE(Program):
    r"""A variational autoencoder with a class for every row, of which few are observed (M2).

    .. code-block:: text

        y_i ~ Categorical(1 / C)               class, observed for some rows
        z_i ~ N(0, I)                          code, (Z,)
        x_i ~ p(x | decoder(z_i, y_i))         row, of any shape               i = 1..N
        q(y_i | x_i) = Categorical(classifier(x_i)), or the label where there is one
        q(z_i | x_i, y_i) = posterior(encoder(x_i, y_i))

    Missing classes are summed out of the bound: the guide's class takes all values, weighted by the classifier. A
    label of ``-1`` is missing. The classifier also learns from the labels alone, by a penalty on the loss:

    .. math:: -\frac{\alpha}{|L|} \sum_{i \in L} \log q(y_i \mid x_i)

    where L are the labeled rows of the data; a step uses up to 200 of them at random, whatever its batch. The penalty
    is no part of the bound, see `deepprob.programs.penalties.penalize`. `Posterior.encode` gives the probabilities of
    the classes, `classify` those of the classifier.

    Args:
        shape: Shape of one row, (28, 28) for an image.
        num_classes: Number of classes, C.
        latent_dim: Size of the code, Z.
        hidden_dims: Sizes of the hidden layers of classifier and encoder, reversed in the decoder.
        likelihood: As of `VAE`, for rows of one kind.
        posterior: ``"normal"``, ``"multivariate_normal"`` or ``"low_rank"``, as of `VAE`.
        label_weight: Weight of the penalty, alpha, in nats per datum.
        activation: Activation of the hidden layers.
        classifier: A custom network from rows ``(rows, *shape)`` to ``num_classes`` logits.
        encoder: A custom network ``(rows, classes) -> outputs``, from rows ``(rows, *shape)`` and one-hot classes
            ``(rows, num_classes)`` to ``Conditional.size(posterior, (latent_dim,))`` outputs.
        decoder: A custom network ``(codes, classes) -> outputs``, from codes ``(rows, latent_dim)`` and one-hot classes
            to ``Likelihood(likelihood, shape).size`` outputs.

    Raises:
        ValueError: If a name is unknown or a size is out of range.

    References:
        Kingma, Rezende, Mohamed, Welling (2014), Semi-supervised Learning with Deep Generative Models.

    Examples:
        Rows without a label have the probabilities of the classifier, the others their label:

        >>> program = SemiSupervisedVAE((4,), num_classes=3, latent_dim=2, hidden_dims=(8,), likelihood="normal")
        >>> x, y = torch.randn(5, 4), torch.tensor([2, -1, 0, -1, -1])
        >>> program.classify(x, y).probs[[0, 2]].tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """

    registry_name = "semi_supervised_vae"
    tasks = ("images", "binary", "classification")
    learning_rate = 1e-3
    base: VAE | None  # whose codes are the rows, see `on_codes`

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        latent_dim: int = 50,
        hidden_dims: Sequence[int] = (500,),
        likelihood: str = "bernoulli",
        posterior: str = "normal",
        label_weight: float = 10.0,
        activation: str = "relu",
        classifier: nn.Module | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if posterior not in NORMAL_POSTERIORS:
            raise unknown("posterior", posterior, NORMAL_POSTERIORS)
        self.shape = tuple(whole_sizes("shape", shape))
        self.num_classes = whole("num_classes", num_classes, least=2)
        self.latent_dim = whole("latent_dim", latent_dim)
        weight = positive("label_weight", label_weight, zero=True)
        self.register_buffer("label_weight", torch.tensor(weight))  # a buffer, so that `Anneal` can move it
        self.observation = Likelihood(likelihood, self.shape, grey=likelihood == "bernoulli")
        hidden = whole_sizes("hidden_dims", hidden_dims)
        size, code = math.prod(self.shape), (self.latent_dim,)
        outputs = Conditional.size(posterior, code)
        given = [network for network in (classifier, encoder, decoder) if network is not None]
        flat = nn.Flatten(-len(self.shape))
        self.classifier = classifier or nn.Sequential(flat, MLP(size, self.num_classes, hidden, activation))
        self.encoder = Conditional(
            encoder or MLPByClass(size, self.num_classes, outputs, hidden, activation), posterior, code
        )
        self.decoder = decoder or MLPByClass(
            self.latent_dim, self.num_classes, self.observation.size, tuple(reversed(hidden)), activation
        )
        networks = (self.classifier, self.encoder.network, self.decoder)
        self.built = [network for network in networks if network not in given]
        self.register_module("base", None)
        self.register_buffer("centre", torch.zeros(self.shape))
        self.register_buffer("labeled", torch.zeros(0, *self.shape))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))
        if self.observation.dispersion:
            columns = self.shape if self.observation.dispersion == "total_count" else ()
            self.raw_noise = nn.Parameter(self.observation.raw_dispersion(columns))
        if not given:
            self.config = {
                "shape": list(self.shape),
                "num_classes": self.num_classes,
                "latent_dim": self.latent_dim,
                "hidden_dims": hidden,
                "likelihood": likelihood,
                "posterior": posterior,
                "label_weight": weight,
                "activation": activation,
            }

    @classmethod
    def from_data(cls, data: Any, **options: Any) -> SemiSupervisedVAE:
        """Create an autoencoder for rows and labels; the values of the rows choose the likelihood, as in `VAE`.

        Args:
            data: A data set or a split of rows and labels, or a tuple of both. Labels of -1 are missing.
            options: Arguments of the constructor; they go before those that the data ask for.

        Raises:
            ValueError: If there are no labels.
        """
        split = data.train if isinstance(data, DataSet) else as_split(data)
        if len(split.tensors) < 2:
            raise ValueError("a semi-supervised autoencoder needs rows and labels; got one field. Give (x, y).")
        x, y = split.tensors[0], split.tensors[-1]
        options.setdefault("likelihood", likelihood_of(x))
        options.setdefault("num_classes", int(y.max()) + 1)
        return cls(x.shape[1:], **options)

    @classmethod
    def on_codes(cls, posterior: Posterior, num_classes: int, **options: Any) -> SemiSupervisedVAE:
        """A semi-supervised autoencoder of the codes of a fitted `VAE` (M1+M2).

        Its rows are still those of the `VAE`. Every use draws a code for each row from the encoder of the `VAE`, which
        stays as it is; classifier, encoder and decoder read codes, and site ``x`` is the code.

        Args:
            posterior: A fitted `VAE`.
            num_classes: Number of classes.
            options: Other arguments of the constructor.

        Raises:
            TypeError: If the posterior is not that of a `VAE`.
        """
        base = posterior.program
        if not isinstance(base, VAE):
            raise TypeError(
                f"on_codes needs the posterior of a VAE; got that of {type(base).__name__}. Fit a VAE to the rows."
            )
        program = cls((base.latent_dim,), num_classes, **{"likelihood": "normal", **options})
        if program.observation.family != "normal":
            raise ValueError("codes are real numbers. Leave likelihood out.")
        program.raw_noise = nn.Parameter(program.observation.raw_dispersion(program.shape))
        program.base = copy.deepcopy(base).requires_grad_(False)
        program.register_buffer("labeled", torch.zeros(0, *base.shape))
        program.config = None
        return program

    @classmethod
    def example(cls) -> Example:
        """Grey images of 3 x 2 pixels in two classes, half of them without a label."""
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(24) % 2
        x = torch.rand(24, 3, 2, generator=generator) * (0.5 + 0.5 * y.reshape(-1, 1, 1))
        program = cls((3, 2), 2, latent_dim=2, hidden_dims=(8,))
        return Example(program, (x, torch.where(torch.arange(24) < 12, y, UNLABELED)))

    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Draw classes and codes from the prior and rows from the decoder; returns the rows."""
        with self.data_plate(x):
            prior = dist.Categorical(logits=self.centre.new_zeros(self.num_classes))
            label = pyro.sample("y", prior, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.centre.new_zeros(self.latent_dim), 1.0).to_event(1))
            value: Tensor = pyro.sample("x", self.decode(z, label), obs=x)
        return value

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw classes given rows, and codes given rows and classes; returns the codes."""
        self._penalize()
        with self.data_plate(x):
            label = pyro.sample("y", self.classify(x, y), infer={"enumerate": "parallel"})
            z: Tensor = pyro.sample("z", self.encode(x, label))
        return z

    def classify(self, x: Tensor, y: Tensor | None = None) -> Any:
        """Distribution of the class given a row and, where there is one, its label."""
        logits = run_by_row("classifier", self.classifier, self._features(x), len(self.shape), *self._classes)
        if y is None:
            return dist.Categorical(logits=logits)
        known = one_hot(y.clamp_min(0), self.num_classes).bool()
        certain = torch.where(known, 0.0, _IMPOSSIBLE).to(logits)
        return dist.Categorical(logits=torch.where((y == UNLABELED).unsqueeze(-1), logits, certain))

    def encode(self, x: Tensor, y: Tensor) -> Any:
        """Distribution of the code given a row and its class."""
        size = self.encoder.in_size, f"a code of {self.latent_dim} dimensions"
        code = self.encoder.distribution(self._run("encoder", self._features(x), len(self.shape), y, *size))
        # The steps of a fit enumerate the classes; in queries, the first dimension of drawn ones may be that of draws.
        if not self.training or self.encoder.family != "normal" or y.dim() < 2 or len(y) != y.numel():
            return code
        # All classes at once: with the same noise, the differences between them tell the classifier more.
        common = CommonNormal(code.base_dist.loc, code.base_dist.scale, validate_args=False)
        common.along = -y.dim() - 1
        return common.to_event(1)  # type: ignore[no-untyped-call]

    def decode(self, z: Tensor, y: Tensor) -> Any:
        """Distribution of a row given its code and its class, event shape ``shape``."""
        needed_by = f"likelihood={self.observation.family!r} over rows of shape {self.shape}"
        out = self._run("decoder", z, 1, y, self.observation.size, needed_by)
        dispersion = self.observation.bounded(self.raw_noise) if self.observation.dispersion else None
        return self.observation.distribution(out, dispersion=dispersion, **self.observation.around(self.centre))

    @property
    def _classes(self) -> tuple[int, str]:
        return self.num_classes, f"num_classes={self.num_classes}"

    def _features(self, x: Tensor) -> Tensor:
        return self.observation.features(x) - self.observation.features(self.centre)

    def _run(self, name: str, x: Tensor, event_dim: int, y: Tensor, size: int, needed_by: str) -> Tensor:
        """Run encoder or decoder on rows and classes, which broadcast."""
        net: Any = self.encoder.network if name == "encoder" else self.decoder
        classes = one_hot(y.long(), self.num_classes).to(x)
        if isinstance(net, MLPByClass):
            out: Tensor = net(x.flatten(x.dim() - event_dim), classes)
            return out
        event = x.shape[x.dim() - event_dim :]
        leading = torch.broadcast_shapes(x.shape[: x.dim() - event_dim], y.shape)
        rows = x.expand(*leading, *event).reshape(-1, *event)
        out = net(rows, classes.expand(*leading, self.num_classes).reshape(-1, self.num_classes))
        check_outputs(name, out[:1].numel(), size, needed_by)
        return out.reshape(*leading, size)

    def _penalize(self) -> None:
        """Add the cross-entropy of the classifier on labeled rows to the loss."""
        count = len(self.labels)
        if not (self.training and count):
            return
        x, y = self.labeled, self.labels
        if count > _LABELED_AT_ONCE:
            chosen = (torch.rand(_LABELED_AT_ONCE, device=x.device) * count).long().clamp_max(count - 1)
            x, y = x[chosen], y[chosen]
        logits = self.classify(self.prepare(x)[0]).logits
        penalize("label_loss", self.label_weight * cross_entropy(logits, y))

    def adapt(self, *batch: Any) -> None:
        """Center the encoder's input on the training mean, and keep the labeled rows."""
        x, y = batch if len(batch) == 2 else (batch[0], None)
        if y is not None:
            self.labeled, self.labels = x[y != UNLABELED].clone(), y[y != UNLABELED].clone()
        if self.base is not None:
            with torch.no_grad():
                x = torch.cat([self.base.encode(self.base.prepare(part)[0]).mean for part in x.split(1000)])
        self.centre.copy_(moments(x, 0)[0])

    def prepare(self, *batch: Any) -> Batch:
        """Draw binary pixels from grey ones, or codes from the encoder of the `VAE` beneath."""
        if not batch:
            return batch
        x, *others = batch
        if self.base is None:
            return (self.observation.prepare(x), *others)
        with torch.no_grad():
            return (self.base.encode(self.base.prepare(x)[0]).sample(), *others)

    def accept(self, data: Any, *, what: str = "data", fill: Fill | None = None) -> Batch:
        """Read rows and labels; see `Program.accept`.

        Raises:
            MissingValueError: If a value is NaN.
        """
        try:
            return super().accept(data, what=what, fill=fill)
        except MissingValueError as error:
            raise MissingValueError(f"{error} A missing label is -1: np.nan_to_num(y, nan=-1).") from error

    def validate(self, *batch: Any) -> Batch:
        """Check rows and labels.

        Raises:
            ValueError: If rows have the wrong shape or values, or a label is not a class.
        """
        if not batch:
            return batch
        x, *others = batch
        if self.base is not None:
            (x,) = self.base.validate(x)
        else:
            if tuple(x.shape[1:]) != self.shape:
                raise ValueError(f"rows must have shape {self.shape}; got {tuple(x.shape[1:])}. Reshape them.")
            x = self.observation.validate("images" if self.observation.grey else "values", x)
        return (x, *(self._labels(y) for y in others))

    def _labels(self, y: Tensor) -> Tensor:
        """Labels as whole numbers, -1 where there is none."""
        y = y.reshape(len(y)) if y.dim() == 2 and y.shape[1] == 1 else y
        missing = y == UNLABELED
        values = torch.where(missing, torch.zeros_like(y), y)
        known = Likelihood("categorical", (), num_classes=self.num_classes).validate("y", values)
        return torch.where(missing, UNLABELED, known)

    def units(self, *batch: Any) -> Tensor:
        """Number of values in each row."""
        return self.observation.units(batch[0])
