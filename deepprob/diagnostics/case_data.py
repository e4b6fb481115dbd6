"""`CaseData`, the data that checks examine: their rows, the training rows among them, and random samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepprob.data.streams import looked_at
from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.observed import labels_of
from deepprob.diagnostics.overlap import Overlap, overlap_of
from deepprob.programs.arguments import Arguments, rows_of
from deepprob.programs.minibatch import Batch, num_rows

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior

# Largest number of elements of one (particles, rows, ...) tensor; keeps memory at a few times 80 MB.
MAX_ELEMENTS = 20_000_000


class CaseData:
    """The data of a case; see `deepprob.diagnostics.case.Case`."""

    def __init__(
        self,
        posterior: Posterior,
        data: Any,
        *,
        train: Any = None,
        ood: Any = None,
        draws: int = 200,
        particles: int = 200,
        max_rows: int = 2000,
        max_sample: int = 256,
        seed: int = 0,
        site: str | None = None,
    ) -> None:
        self.posterior, self.program = posterior, posterior.program
        self.draws, self.particles, self.seed = draws, particles, seed
        self.max_sample = max_sample
        self.sites = _chosen(posterior, site)
        data, train, ood = looked_at(data), looked_at(train, "train"), looked_at(ood, "ood")
        # Without a named data plate rows cannot be selected: every step of the fit saw all of the data.
        self.needs_all_rows = not self.program.data_name
        data = self.program.origin.read(data)
        accepted = () if data is None else self.program.accept(data)
        self.rows = num_rows(accepted) if accepted else posterior.instance.num_data
        chosen = self._random_rows(accepted, max_rows)
        self.batch = accepted if chosen is None else rows_of(accepted, chosen)
        self.row_numbers = np.arange(self.rows) if chosen is None else chosen.numpy()
        self.labels = labels_of(data, accepted, chosen)
        self.train = self.program.accept(train) if train is not None else accepted
        self.given_train = train is not None
        self.ood = ood
        self._shared: dict[str, Any] = {"accepted": None if data is None else accepted}
        self._check_train()

    # -- the data ------------------------------------------------------------------------------------------------

    @property
    def overlap(self) -> Overlap:
        """The rows that the data share with those of the fit."""
        record, accepted = self.posterior.training_rows, self._shared["accepted"]
        found: Overlap = self._shared_by("overlap", lambda: overlap_of(record, accepted, self.rows))
        return found

    @property
    def knows_train(self) -> bool:
        """Whether `train` holds the training data."""
        fits = self.rows == self.posterior.instance.num_data
        unknown = self.overlap.relation == "unknown" and self.needs_all_rows and fits
        return self.given_train or self.overlap.relation == "training" or unknown

    def _check_train(self) -> None:
        record = self.posterior.training_rows
        if not self.given_train or record is None or not self.train:
            return
        digests = record.digests_like(self.train)
        if not record.equals(digests):
            known = int(record.has(digests).sum())
            raise ValueError(
                f"train must hold the {record.count} rows of the fit; got {len(digests)} rows, {known} of them from "
                "the fit. Give the data of the fit."
            )

    @property
    def ragged(self) -> bool:
        """Whether rows are padded sequences of unequal length."""
        return self.program.variable_length or "lengths" in self._names

    @property
    def lengths(self) -> Array | None:
        """The length of each sequence before its padding; None for rows of one length."""
        if not self.ragged or not self.batch:
            return None
        named = [x for name, x in zip(self._names, self.batch, strict=False) if name == "lengths"]
        found = self.program.lengths(*self.batch) if self.program.variable_length else (named or [None])[0]
        return None if found is None else array(found)

    @property
    def per_row(self) -> bool:
        """Whether all latents are local and rows are independent, so that each row can be checked on its own."""
        return self.has_latents("local") and not self.has_latents("global") and not self.needs_all_rows

    def has_latents(self, kind: str) -> bool:
        """Whether some latent site is of a kind: ``"local"`` (one per row) or ``"global"``."""
        return kind in self.posterior.latent_sites.values()

    @cached_property
    def sample_batch(self) -> Batch:
        """Random rows, few enough for checks that are expensive per row."""
        chosen = self._sample_rows
        return self.batch if chosen is None else rows_of(self.batch, chosen)

    @property
    def sample_labels(self) -> tuple[str, Array] | None:
        """Name and values of a field that the program does not take, for the rows of `sample_batch`."""
        if self.labels is None:
            return None
        name, values = self.labels
        return name, array(values if self._sample_rows is None else values[self._sample_rows])

    @cached_property
    def _sample_rows(self) -> Tensor | None:
        if not self.batch:
            return None
        affordable = int(MAX_ELEMENTS / (self.particles * max(1, self.batch[0][0].numel())))
        return self._random_rows(self.batch, min(self.max_sample, max(affordable, 16)))

    def _random_rows(self, batch: Batch, most: int) -> Tensor | None:
        """Indices of random rows; None for all of them."""
        if not batch or self.needs_all_rows or num_rows(batch) <= most:
            return None
        order = np.random.default_rng(self.seed).permutation(num_rows(batch))[:most]
        return torch.from_numpy(np.sort(order))

    @property
    def _names(self) -> Sequence[str]:
        """Names of the tensors of the batch."""
        return self.batch.call.names if isinstance(self.batch, Arguments) else self.program.argument_names

    def _shared_by(self, name: str, make: Callable[[], Any]) -> Any:
        """A quantity that the cases of all sites share."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]


def given(batch: Batch) -> tuple[Any, ...]:
    """A batch as the arguments of a query."""
    return (batch,) if isinstance(batch, Arguments) else batch


def _chosen(posterior: Posterior, site: str | None) -> tuple[str, ...]:
    observed = posterior.structure.observed
    if site is not None and site not in observed:
        raise ValueError(f"the program observes no site {site!r}. Choose from: {', '.join(observed) or 'none'}.")
    return observed if site is None else (site,)
