"""Which arguments of a minibatch fit have a row for each datum, and which are as long as the data by chance."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.programs.arguments import Arguments
from deepprob.programs.copying import copy_with_modules
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.sites import Site, is_local, sample_sites
from deepprob.programs.store import StoreState, private_store

_MOST_ROWS, _MOST_GROUPS = 64, 64
_ERRORS = (RuntimeError, TypeError, IndexError, ValueError, KeyError, AttributeError)


def cut_by_row(program: Program, batch: Batch, size: int, device: torch.device) -> Batch:
    """Find the arguments that minibatches are to get whole, though they are as long as the data.

    The log-probabilities of a row may depend neither on its place in the batch nor on the other rows. If they do while
    every argument is cut to the rows of the batch, and do not while some arguments are passed whole, these are.

    Args:
        program: The caller's program; it is not changed.
        batch: All rows.
        size: Rows in a minibatch.
        device: The device to run on.

    Returns:
        The batch, without the tensors that are passed whole.

    Raises:
        ValueError: If the program itself indexes its arguments by the data plate, or log-probabilities depend on the
            place of a row whatever is passed whole.
    """
    if not isinstance(batch, Arguments) or not batch or size >= len(batch[0]):
        return batch
    runs, names = _Runs(program, batch, size, device), ", ".join(batch.call.names)
    cut = runs.agreement(())
    if cut in ("any rows", "nothing"):
        return batch
    for count in range(1, len(batch)):
        groups = itertools.islice(itertools.combinations(range(len(batch)), count), _MOST_GROUPS)
        good = [group for group in groups if runs.agreement(group) == "any rows"]
        if len(good) == 1:
            return batch.whole(good[0])
    if cut in ("none", "error") and runs.agreement(range(len(batch))) == "any rows":
        raise ValueError(
            f"the program indexes {names} by plate {program.data_name!r}, but on minibatches they hold the rows of the "
            "batch already. Leave out the index, x in the place of x[i]; or leave out data_plate, and the plate draws "
            "its rows as in Pyro."
        )
    if cut == "none":
        raise ValueError(
            f"the log-probability of a row depends on its place in the minibatch: {names} are cut to the rows of the "
            f"batch, because each has {len(batch[0])} entries. Bind what does not belong to rows to the model, "
            "Program.of(functools.partial(model, name=value), ...), or use batch_size=None."
        )
    return batch  # rows that depend on each other, as in a mean over the batch; or an error, which the first run tells


class _Runs:
    """Runs of a copy of a model on few rows, at the same latent values."""

    def __init__(self, program: Program, batch: Arguments, size: int, device: torch.device) -> None:
        self.program, self.batch, self.device = copy_with_modules(program).to(device).eval(), batch, device
        self.num_data, count = len(batch[0]), min(max(size, 2), _MOST_ROWS)
        order = torch.randperm(self.num_data, generator=torch.Generator().manual_seed(0))
        shift = min(count // 2, self.num_data - count)
        self.rows, self.others = order[:count], order[shift : shift + count]
        state: StoreState = pyro.get_param_store().get_state()
        self.store = {kind: dict(values) for kind, values in state.items()}

    def agreement(self, whole: Collection[int]) -> str:
        """In which batches a row has the same log-probabilities, if some arguments are passed whole.

        Returns:
            ``"any rows"``; ``"same rows"`` in another order; ``"none"``; ``"error"`` if the program fails;
            ``"nothing"`` if no site of the data plate can be compared.
        """
        batch, latents = self.batch.whole(whole), dict[str, Any]()
        try:
            first = self._log_probs(batch, self.rows, latents)
            noise = self._log_probs(batch, self.rows, latents, seed=1)
            fixed = [name for name in first if name in noise and _close(first[name], noise[name])]
            if not fixed:
                return "nothing"
            for rows, otherwise in ((self.rows.roll(1), "none"), (self.others, "same rows")):
                here, there = (self.rows[:, None] == rows).nonzero(as_tuple=True)
                found = self._log_probs(batch, rows, latents)
                if not all(_close(first[name][here], found[name][there]) for name in fixed if name in found):
                    return otherwise
        except _ERRORS:
            return "error"
        return "any rows"

    def _log_probs(self, batch: Arguments, rows: Tensor, latents: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
        """The log-probabilities of the sites in the data plate, with the rows first."""
        plate, call = self.program.data_name, batch.call.to(self.device)
        given = [x[rows].to(self.device) for x in batch]
        with contextlib.ExitStack() as stack:
            stack.enter_context(private_store(self.store, device=self.device))
            stack.enter_context(RandomStream(seed, self.device).drawing())
            stack.enter_context(self.program.bound(rows.to(self.device), self.num_data, call=call))
            stack.enter_context(_SameLatents(plate, rows.tolist(), latents))
            with torch.no_grad():
                trace = poutine.trace(self.program.model).get_trace(*given)
        found = {}
        for name, site in sample_sites(trace):
            if is_local(site, plate):
                log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
                found[name] = log_prob.expand(site["fn"].batch_shape).movedim(_dim(site, plate), 0)
        return found


class _SameLatents(Messenger):
    """Gives latent sites the values that they had before, in the plate over rows those of the same rows."""

    def __init__(self, plate: str, rows: list[int], latents: dict[str, Any]) -> None:
        super().__init__()
        self.plate, self.rows, self.latents = plate, rows, latents

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        if not is_local(msg, self.plate):
            msg["value"] = self.latents.setdefault(msg["name"], msg["value"])
            return
        known = self.latents.setdefault(msg["name"], {})
        dim = _dim(msg, self.plate) - msg["fn"].event_dim
        values = zip(self.rows, msg["value"].unbind(dim), strict=True)
        msg["value"] = torch.stack([known.setdefault(row, value) for row, value in values], dim)


def _dim(site: Site, plate: str) -> int:
    """The dimension of a plate around a site."""
    return next(int(frame.dim) for frame in site["cond_indep_stack"] if frame.name == plate)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether log-probabilities agree, but for rounding; those of other shapes cannot be compared."""
    return a.shape != b.shape or torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
