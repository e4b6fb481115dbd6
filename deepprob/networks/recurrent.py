"""Recurrent networks over sequences of unequal length."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import cast

import torch
from torch import Generator, Tensor, nn

from deepprob.engine.scan.operator import Tensors
from deepprob.engine.scan.recur import is_tracing, recur
from deepprob.errors import unknown, whole
from deepprob.networks.initialisation import fill_orthogonal, fill_uniform, is_pretrained
from deepprob.networks.network import Network, check_trailing

_CELLS: dict[str, type[nn.GRU] | type[nn.LSTM] | type[nn.RNN]] = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "rnn": nn.RNN,
}


class Recurrent(Network):
    r"""A recurrent network over padded sequences of unequal length.

    .. math:: h_t = f(x_t, h_{t-1}), \quad\text{reversed: } h_t = f(x_t, h_{t+1}),
              \quad h_0 = h_{T_i + 1} = 0

    In reverse, each sequence ``i`` is read backwards from its own last step ``T_i``, not from the end of the padding,
    so that ``h_t`` summarizes ``x_t, ..., x_{T_i}``. Values beyond a sequence's end have no influence, and the output
    is zero there.

    Args:
        in_features: Size of an input vector ``x_t``.
        hidden_dim: Size of the state ``h_t``.
        kind: The cell ``f``: "gru", "lstm" or "rnn" (tanh).
        reverse: Whether to run backwards in time.
        bidirectional: Whether to run in both directions; the output is then twice as wide, forward states first.

    Raises:
        ValueError: If a size is not a whole number of at least 1, the kind is unknown, ``reverse`` and
            ``bidirectional`` are both set, or an input has the wrong shape.

    Examples:
        Padding does not change the states:

        >>> net = Recurrent(3, 4, reverse=True)
        >>> x, lengths = torch.randn(1, 5, 3), torch.tensor([2])
        >>> short, padded = net(x[:, :2]), net(x, lengths)
        >>> torch.allclose(short, padded[:, :2], atol=1e-6), bool((padded[:, 2:] == 0).all())
        (True, True)
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        kind: str = "gru",
        reverse: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        if kind not in _CELLS:
            raise unknown("kind of recurrent network", kind, _CELLS)
        if reverse and bidirectional:
            raise ValueError(
                "reverse and bidirectional are both set, but a bidirectional network "
                "already runs backwards. Choose one."
            )
        self.in_features = whole("in_features", in_features)
        self.hidden_dim = whole("hidden_dim", hidden_dim)
        self.out_features = self.hidden_dim * (2 if bidirectional else 1)
        self.config = {
            "network": "recurrent",
            "in_features": self.in_features,
            "hidden_dim": self.hidden_dim,
            "kind": kind,
            "reverse": reverse,
            "bidirectional": bidirectional,
        }
        directions = {"forwards": not reverse, "backwards": reverse or bidirectional}
        self.cells = nn.ModuleDict(
            {
                name: _CELLS[kind](self.in_features, self.hidden_dim, batch_first=True)
                for name, wanted in directions.items()
                if wanted
            }
        )
        self.draw_weights()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map ``(*batch, T, in_features)`` to ``(*batch, T, out_features)``.

        Args:
            x: Padded sequences.
            lengths: Length of each sequence, shape ``batch``, from 0 to ``T``; None if all have ``T`` steps.

        Returns:
            The states, zero beyond each sequence's end.
        """
        check_trailing("Recurrent", x, (None, self.in_features))
        *batch, steps, _ = x.shape
        if lengths is None:
            lengths = torch.full(batch, steps, device=x.device)
        if lengths.shape != x.shape[:-2]:
            raise ValueError(
                f"lengths must hold one number per sequence, shape {tuple(batch)}; got shape "
                f"{tuple(lengths.shape)}. Give one length for each row of x."
            )
        x = x.reshape(math.prod(batch), steps, self.in_features)  # (B, T, D)
        ends = lengths.reshape(-1, 1)  # (B, 1)
        times = torch.arange(steps, device=x.device)  # (T,)
        inside = (times < ends).unsqueeze(-1)  # (B, T, 1)
        x = torch.where(inside, x, 0.0)  # padding may be nan: it must not reach a gradient
        states = []
        for direction, cell in self.cells.items():
            if direction == "forwards":
                states.append(_states(cast(nn.RNNBase, cell), x))
            else:
                mirror = (ends - 1 - times).clamp(min=0).unsqueeze(-1)  # (B, T, 1); its own inverse
                backwards = _states(cast(nn.RNNBase, cell), x.gather(1, mirror.expand_as(x)))  # (B, T, H)
                states.append(backwards.gather(1, mirror.expand_as(backwards)))
        y = torch.where(inside, torch.cat(states, -1), 0.0)
        return y.reshape(*batch, steps, self.out_features)

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Redraw weights per gate, Glorot for inputs and orthogonal for states; an LSTM's forget bias starts at 1."""
        record: dict[str, str] = {}
        for name, parameter in self.named_parameters():
            if is_pretrained(self.get_submodule(name.rpartition(".")[0])):
                continue
            gates = parameter.detach().split(self.hidden_dim)  # each (H, D), (H, H) or (H,)
            if ".weight_ih" in name:
                record[name] = "glorot_uniform"
                bound = math.sqrt(6 / (self.in_features + self.hidden_dim))
                fill_uniform(parameter, bound, generator)
            elif ".weight_hh" in name:
                record[name] = "orthogonal"
                for gate in gates:
                    fill_orthogonal(gate, generator)
            else:
                record[name] = "zeros"
                nn.init.zeros_(parameter)
                if self.config["kind"] == "lstm" and ".bias_ih" in name:
                    record[name] = "zeros, forget gate ones"
                    gates[1].fill_(1.0)
        return record


def _states(cell: nn.RNNBase, x: Tensor) -> Tensor:
    """All states of a recurrent torch layer, ``(B, T, D)`` to ``(B, T, H)``."""
    if not is_tracing():
        with warnings.catch_warnings() if x.is_cuda else contextlib.nullcontext():
            if x.is_cuda:  # cuDNN copies weights stored among a fit's other parameters, and warns at every call
                warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
            y: Tensor = cell(x)[0]
        return y
    step = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _rnn}[cell.mode]
    weight_in, weight, bias_in, bias = cell.all_weights[0]
    projected = nn.functional.linear(x.transpose(0, 1), weight_in, bias_in)  # (T, B, gates H)
    start = x.new_zeros(len(x), cell.hidden_size)
    state = (start, start.clone()) if cell.mode == "LSTM" else (start,)
    _, (states,) = recur(step, state, [projected], [weight, bias])
    return states.transpose(0, 1)


def _lstm(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    h, c = state
    gates = slices[0] + nn.functional.linear(h, *params)  # (B, 4 H)
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, -1)
    c = torch.sigmoid(forget_gate) * c + torch.sigmoid(input_gate) * torch.tanh(candidate)
    h = torch.sigmoid(output_gate) * torch.tanh(c)
    return (h, c), (h,)


def _gru(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    (h,) = state
    reset_x, update_x, new_x = slices[0].chunk(3, -1)
    reset_h, update_h, new_h = nn.functional.linear(h, *params).chunk(3, -1)
    reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
    h = torch.lerp(torch.tanh(new_x + reset * new_h), h, update)
    return (h,), (h,)


def _rnn(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    h = torch.tanh(slices[0] + nn.functional.linear(state[0], *params))
    return (h,), (h,)
