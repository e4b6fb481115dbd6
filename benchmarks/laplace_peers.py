"""The Laplace approximation beside laplace-torch: one network at the same weights, no fit.

    pip install --no-deps --target peers laplace-torch==0.3 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 \
        asdfghjkl einops einconv opt_einsum torchmetrics lightning-utilities unfoldNd linear_operator jaxtyping \
        wadler-lindig
    PYTHONPATH=peers python benchmarks/laplace_peers.py

``--no-deps`` keeps the installed torch; laplace-torch's own dependencies replace it. Prints the largest relative
difference of the posterior precision, the log marginal likelihood, and mean and variance of predictions, and writes
``benchmarks/results/laplace_peers.json``. The Kronecker product is compared on a network without biases, because
laplace-torch takes weights and biases of a layer as independent, and deepprob takes them together.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import shown, write_result
from laplace import Laplace as TheirLaplace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deepprob.fitting.at_mode import AtMode
from deepprob.fitting.laplace import Choice, Laplace
from deepprob.inference.laplace import init
from deepprob.models import BayesianNeuralNetwork

SCALE, NOISE, TOLERANCE = 0.7, 0.4, 1e-3
STRUCTURES = {"full": "full", "diagonal": "diag", "kronecker": "kron"}
CASES = [("full", "all"), ("diagonal", "all"), ("kronecker", "all"), ("full", "last"), ("diagonal", "last")]


def problem(task: str, bias: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with its random weights, and data."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    x = torch.randn(150, 4, generator=generator)
    if task == "regression":
        y = x[:, :2].sin() + NOISE * torch.randn(150, 2, generator=generator)
    else:
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    outputs = 2 if task == "regression" else 3
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, outputs, bias=bias)), x, y


def ours(net: nn.Module, task: str, x: Tensor, y: Tensor, structure: str, subset: str) -> dict[str, Tensor]:
    """Precision, evidence and predictions of deepprob."""
    options: dict[str, Any] = {"likelihood": "categorical", "num_classes": 3}
    options = {"noise": NOISE} if task == "regression" else options
    program = BayesianNeuralNetwork(net, prior="normal", prior_scale=SCALE, standardize=False, **options)
    state = init(program, (x, y), steps=1, batch_size=None, weights="keep", device="cpu")
    mode = AtMode(state.instance, state.data)
    found = Laplace(mode, Choice(structure, subset, "linearised", tune=False, rank=1))
    parts = found.parts()
    blocks = found.blocks(parts)
    loc = mode.guide.loc.detach()
    root = torch.zeros(len(loc), len(loc), dtype=torch.float64)
    for block in blocks:
        own = block.deviation(torch.eye(block.index.numel(), dtype=torch.float64)).T
        root[block.index.flatten()[:, None], block.index.flatten()] = own
    chosen = [
        i for name, place in mode.guide.sites.items() if name in found.names for i in range(place.start, place.stop)
    ]
    precision = (root @ root.T)[chosen][:, chosen].inverse()
    model: Any = state.instance.program
    model.linearise(mode.values(loc))
    with torch.no_grad():
        mean = model.outputs(mode.values(loc), x)
        moved = [model.outputs(mode.values(loc + column.float()), x) - mean for column in root.T[chosen]]
    variance = torch.einsum("kbo,kbp->bop", torch.stack(moved), torch.stack(moved))
    evidence = torch.tensor(found.log_marginal_likelihood(parts, blocks))
    return {"precision": precision, "log marginal likelihood": evidence, "mean": mean, "variance": variance}


def theirs(net: nn.Module, task: str, x: Tensor, y: Tensor, structure: str, subset: str) -> dict[str, Tensor]:
    """The same of laplace-torch."""
    made = TheirLaplace(
        net,
        "regression" if task == "regression" else "classification",
        subset_of_weights="all" if subset == "all" else "last_layer",
        hessian_structure=STRUCTURES[structure],
        prior_precision=SCALE**-2,
        sigma_noise=NOISE if task == "regression" else 1.0,
    )
    made.fit(DataLoader(TensorDataset(x, y), batch_size=50))
    precision = made.posterior_precision
    precision = precision.to_matrix() if hasattr(precision, "to_matrix") else precision
    precision = precision.diag() if precision.dim() == 1 else precision
    evidence = made.log_marginal_likelihood()
    mean, variance = made._glm_predictive_distribution(x)
    found = {"precision": precision, "log marginal likelihood": evidence, "mean": mean, "variance": variance}
    return {name: value.detach() for name, value in found.items()}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def main() -> None:
    """Compare, print a table, write JSON; fail if a number differs by more than a thousandth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    for task in ("regression", "classification"):
        for structure, subset in CASES:
            net, x, y = problem(task, bias=structure != "kronecker")
            mine, other = (run(net, task, x, y, structure, subset) for run in (ours, theirs))
            rows[f"{task}, {structure}, {subset}"] = {name: difference(mine[name], other[name]) for name in mine}
    columns = list(next(iter(rows.values())))
    table = [["difference", *columns], *([name, *(f"{row[c]:.1e}" for c in columns)] for name, row in rows.items())]
    print(shown(table, arguments.markdown))
    print(f"\nwritten to {write_result('laplace_peers', rows)}")
    if worst := [f"{name}: {c}" for name, row in rows.items() for c in columns if not row[c] < TOLERANCE]:
        raise SystemExit(f"more than {TOLERANCE} apart: {'; '.join(worst)}")


if __name__ == "__main__":
    main()
