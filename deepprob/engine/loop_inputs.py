"""The inputs of a loop, and their checks: compiled code does not check its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from deepprob.engine.noise import NoiseSize

_Kind = tuple[torch.Size, torch.dtype, torch.device]


class StepData(NamedTuple):
    """The data of one step.

    Attributes:
        fixed: The captured tensors, whole.
        rows: The step's row indices, shape ``(B,)``.
        number: The step's number, a scalar.
    """

    fixed: Any
    rows: Tensor
    number: Tensor


class Noise(NamedTuple):
    """Random numbers of one step, or of ``n`` steps with a leading dimension.

    Attributes:
        normal: Standard normal numbers.
        uniform: Uniform numbers in [0, 1).
    """

    normal: Tensor
    uniform: Tensor


class PerStep(NamedTuple):
    """The inputs that differ from step to step.

    Attributes:
        rows: Row indices of each step, shape ``(n, B)``; ``(1, B)`` if all steps use the same rows.
        knobs: Real numbers of each step, shape ``(n, k)``.
    """

    rows: Tensor
    knobs: Tensor


class Example:
    """Example tensors in lists, tuples and dicts. A loop accepts tensors like these.

    Args:
        name: The name of the argument.
        tree: The tensors.

    Attributes:
        tensors: The tensors, each an object of its own: a tensor given twice would become one input.

    Raises:
        TypeError: If anything else than a tensor is among them.
    """

    def __init__(self, name: str, tree: Any) -> None:
        leaves, self._spec = tree_flatten_with_path(tree)
        self._name, self._names = name, [f"{name}{keystr(path)}" for path, _ in leaves]
        for path, (_, x) in zip(self._names, leaves, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"{path} must be a tensor; got {type(x).__name__}. Give torch.tensor({x!r}).")
        found = [x.detach() for _, x in leaves]
        self.tensors: list[Tensor] = [x.contiguous() if _overlaps(x) else x for x in found]
        self._layouts = [(_kind(x), x.stride()) for x in self.tensors]
        self._lengths: dict[int, tuple[int, int]] = {}

    def tree(self) -> Any:
        """The tensors in their lists, tuples and dicts."""
        return tree_unflatten(self.tensors, self._spec)

    def serve_lengths(self, lengths: dict[int, tuple[int, int]]) -> None:
        """Accept sequences ``(N, T, ...)`` of any length in a range.

        Args:
            lengths: The shortest and the longest T of each tensor that holds sequences, by the tensor's index.
        """
        self._lengths = lengths

    def match(self, tree: Any) -> list[Tensor]:
        """The tensors of a tree, laid out in memory as the example's.

        Raises:
            ValueError: If their structure, shapes, dtypes or devices differ from the example's.
        """
        given, spec = tree_flatten(tree)
        if spec != self._spec:
            raise ValueError(
                f"{self._name} must have the structure that the loop was made with, {_line(self._spec)}; got "
                f"{_line(spec)}. Give the same lists, tuples and dict keys, in the same order."
            )
        for i, (kind, stride) in enumerate(self._layouts):
            x = given[i]
            if i in self._lengths:
                kind = self._with_length(i, kind, given)
            if not isinstance(x, Tensor) or _kind(x) != kind:
                raise ValueError(
                    f"{self._names[i]} must be {_words(kind)}, as the loop was made with; got {_described(x)}. "
                    "Convert it, or make another loop."
                )
            if x.stride() != stride:
                given[i] = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
        return given

    def _with_length(self, i: int, kind: _Kind, given: Sequence[Tensor]) -> _Kind:
        """The shape, dtype and device of sequences as long as the first ones among the given tensors."""
        shape, dtype, device = kind
        length = given[min(self._lengths)].shape[1:2]
        shortest, longest = self._lengths[i]
        if not length or not shortest <= length[0] <= longest:
            raise ValueError(
                f"{self._names[i]} must hold sequences of {shortest} to {longest} steps; got shape "
                f"{tuple(given[i].shape)}. Cut or pad them, or make another loop."
            )
        return torch.Size((shape[0], *length, *shape[2:])), dtype, device

    def check_new(self, tree: Any) -> None:
        """Check that a step returned tensors like those it was given.

        Raises:
            ValueError: If their structure, a shape, a dtype or a device differs.
        """
        given, spec = tree_flatten(tree)
        if spec != self._spec:
            raise ValueError(
                f"a step must return a {self._name} of the structure it was given, {_line(self._spec)}; got "
                f"{_line(spec)}. Return the same lists, tuples and dict keys, in the same order."
            )
        for name, (kind, _), x in zip(self._names, self._layouts, given, strict=True):
            if not isinstance(x, Tensor) or _kind(x) != kind:
                raise ValueError(
                    f"a step must return {name} with the shape, dtype and device it was given, {_words(kind)}; got "
                    f"{_described(x)}. Convert it in the step, or begin with a carry of that kind."
                )


def checked_result(result: Any) -> tuple[Any, dict[str, Tensor]]:
    """The carry and the record that a step returned.

    Raises:
        TypeError: If the result is anything else.
    """
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        got = f"({', '.join(type(x).__name__ for x in result)})" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"a step must return (carry, record), with a dict of tensors as record; got {got}.")
    for name, x in result[1].items():
        if not isinstance(x, Tensor):
            raise TypeError(f"record[{name!r}] must be a tensor; got {type(x).__name__}. Return torch.tensor({x!r}).")
    return result


def check_example(per_step: PerStep) -> None:
    """Check the number of steps of an example.

    Raises:
        ValueError: If it has no step.
    """
    if not len(per_step.rows) or not len(per_step.knobs):
        raise ValueError(
            f"per_step must be an example of one step or more; got rows {tuple(per_step.rows.shape)} and knobs "
            f"{tuple(per_step.knobs.shape)}. Give the rows and knobs of at least one step."
        )


def check_call(per_step: PerStep, like: PerStep, capacity: int) -> None:
    """Check the rows and knobs of a call.

    Args:
        per_step: Rows and knobs of each step.
        like: The loop's memory for them.
        capacity: The largest number of steps.

    Raises:
        ValueError: If there are too many steps, or shapes or dtypes differ.
    """
    count = len(per_step.knobs)
    if count > capacity:
        raise ValueError(
            f"a call takes at most {capacity} steps, the loop's capacity; got {count}. Take them in several calls, or "
            "make the loop with a larger capacity."
        )
    _check_series("per_step.knobs", per_step.knobs, like.knobs, (count,), like.knobs.shape[1])
    # Each step has its own rows, or all steps use one set; expanded rows are one set.
    counts = (1, count) if len(like.rows) > 1 or per_step.rows.stride()[:1] == (0,) else (1,)
    _check_series("per_step.rows", per_step.rows, like.rows, counts, like.rows.shape[1])


def check_noise(noise: Noise | None, like: Noise, count: int, size: NoiseSize) -> None:
    """Check the noise of a call.

    Args:
        noise: Noise of each step.
        like: The loop's memory for it.
        count: The number of steps.
        size: How much noise a step takes.

    Raises:
        ValueError: If a step takes noise and there is none, or its shapes or dtypes differ.
    """
    if noise is not None:
        _check_series("noise.normal", noise.normal, like.normal, (count,), size.normal)
        _check_series("noise.uniform", noise.uniform, like.uniform, (count,), size.uniform)
    elif size.normal or size.uniform:
        raise ValueError(
            f"a step takes {size.normal} normal and {size.uniform} uniform numbers; the call gives no noise. Give "
            "noise=Noise(*loop.noise.draw(n, generators, device))."
        )


def _check_series(name: str, x: Tensor, like: Tensor, counts: Sequence[int], least: int) -> None:
    """Check the numbers that several steps take, shape ``(n, k)``.

    Args:
        name: The name of the argument.
        x: The numbers.
        like: The loop's memory for them, ``(capacity, k)``.
        counts: The numbers of steps, n, that are accepted.
        least: The smallest k that is accepted.

    Raises:
        ValueError: If the shape or the dtype is another.
    """
    most = like.shape[1]
    if x.dim() != 2 or len(x) not in counts or not least <= x.shape[1] <= most or x.dtype != like.dtype:
        shape = f"({' or '.join(map(str, dict.fromkeys(counts)))}, {most if least == most else f'{least} to {most}'})"
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (like.dtype, x.dtype)]
        raise ValueError(
            f"{name} must be {shape} {dtypes[0]}, as the loop was made with; got {tuple(x.shape)} {dtypes[1]}. "
            "Convert it, or make another loop."
        )


def _overlaps(x: Tensor) -> bool:
    """Whether entries of a tensor may share memory, as those of an expanded one do."""
    reached = 0  # by the dimensions with smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return True
            reached += (size - 1) * stride
    return False


def _kind(x: Tensor) -> _Kind:
    return x.shape, x.dtype, x.device


def _line(spec: TreeSpec) -> str:
    """A structure, written in one line."""
    return " ".join(str(spec).split())


def _described(x: object) -> str:
    return _words(_kind(x)) if isinstance(x, Tensor) else type(x).__name__


def _words(kind: _Kind) -> str:
    shape, dtype, device = kind
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"
