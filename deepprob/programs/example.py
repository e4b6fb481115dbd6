"""Example: a small program with data that it can be fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deepprob.programs.program import Program


@dataclass(frozen=True)
class Example:
    """A small program with data, which demonstrates a model and tests it.

    A model's ``example()`` returns a new program at every call, with the same data: about 24 rows, so that a fit takes
    a second.

    Attributes:
        program: The program, not yet fitted.
        data: Its arguments, including the observed ones.
        inputs: Number of arguments that `predict` needs.

    Examples:
        >>> from deepprob.models import VAE
        >>> example = VAE.example()
        >>> [x.shape for x in example.data], example.inputs
        ([torch.Size([24, 3, 2])], 1)
    """

    program: Program
    data: tuple[Tensor, ...]
    inputs: int = 1
