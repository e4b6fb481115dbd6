"""The network of LeCun et al. (1989) on USPS digits: errors, probabilities, rejection and letters, by routine.

    DEEPPROB_DATA=... python benchmarks/usps.py [--routines ensemble laplace]
    DEEPPROB_DATA=... python benchmarks/usps.py --validate                # choose settings on training rows
    python benchmarks/usps.py --markdown                                  # the table, as it stands in the README

The network of 1989, with a softmax, is fitted to its 7 291 images as they are. The prior and the length of
``map_estimate`` are chosen by the negative log-likelihood (NLL) of the last 1 000 training rows after a fit to the
others (`--validate`); ``laplace``, ``swag`` and ``ensemble`` take them over, and ``svi`` has one setting. All training
rows are then fitted once, with seed 0, and the 2 007 test rows are scored once.

The expected calibration error (ECE) is that in excess of perfect calibration. For the error among the rows that are
not rejected, rows are ranked by their largest probability. AUROC is how often one of 2 000 letters of notMNIST, shrunk
to 16 by 16 pixels, has a higher predictive entropy than a test digit. Writes ``benchmarks/results/usps.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
from common import RESULTS, shown, write_result
from torch import Tensor, nn
from torch.nn import functional

import deepprob as dp
from deepprob.data import load_data
from deepprob.diagnostics.checks.calibration import check_calibration
from deepprob.diagnostics.metrics import auroc
from deepprob.diagnostics.proper_scores import aurc, risk_coverage
from deepprob.inference import ROUTINES
from deepprob.models import BayesianNeuralNetwork

HELD_OUT, REJECTED = 1000, 0.09
Rows = tuple[Tensor, Tensor]


class LeNet1989(nn.Module):
    """Two layers of 5 by 5 kernels with a bias for every unit, and 30 hidden units: 9 760 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 5, stride=2, bias=False)
        self.first_bias = nn.Parameter(torch.zeros(12, 8, 8))
        self.second = nn.Conv2d(24, 12, 5, stride=2, groups=3, bias=False)
        self.second_bias = nn.Parameter(torch.zeros(12, 4, 4))
        self.hidden, self.out = nn.Linear(192, 30), nn.Linear(30, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits for images in [0, 1], ``(B, 16, 16)``."""
        x = functional.pad(2 * images.unsqueeze(-3) - 1, (2, 2, 2, 2), value=-1.0)
        x = torch.tanh(self.first(x) + self.first_bias)  # (B, 12, 8, 8)
        x = functional.pad(x, (2, 2, 2, 2), value=-1.0)
        x = torch.cat([x[:, :8], x[:, 4:], x[:, :4], x[:, 8:]], 1)  # each group of four planes sees eight of twelve
        x = torch.tanh(self.second(x) + self.second_bias)  # (B, 12, 4, 4)
        out: Tensor = self.out(torch.tanh(self.hidden(x.flatten(1))))
        return out


def rate(value: float, **options: Any) -> dict[str, Any]:
    """Options of a fit with a learning rate."""
    return {"optimizer": dp.Optimizer(learning_rate=value), **options}


Setting = tuple[dict[str, Any], dict[str, Any], int]  # options of the program and of the fit, draws of a prediction


def normal(scale: float, options: dict[str, Any], draws: int = 1) -> Setting:
    """A setting with a normal prior."""
    return {"prior": "normal", "prior_scale": scale}, options, draws


# Settings of each routine by name; the first is the one in use.
FRESH: dict[str, Any] = {"epochs": 20, "weights": "fresh"}
SETTINGS: dict[str, dict[str, Setting]] = {
    "map_estimate": {
        "prior N(0, 0.3^2), 20 epochs": normal(0.3, rate(1e-2, **FRESH)),
        "prior N(0, 0.2^2), 25 epochs": normal(0.2, rate(1e-2, **FRESH | {"epochs": 25})),
    },
    "laplace": {
        "last layer, prior N(0, 0.3^2), 20 epochs": normal(
            0.3, rate(1e-2, **FRESH, subset="last", structure="full"), 50
        ),
    },
    "swag": {
        "prior N(0, 0.3^2), 20 epochs, 20 iterates": normal(0.3, rate(1e-2, epochs=20, iterates=20), 50),
    },
    "ensemble": {
        "5 members, prior N(0, 0.3^2), 20 epochs": normal(0.3, rate(1e-2, **FRESH, members=5), 5),
    },
    "svi": {
        "hierarchical prior, flipout, 40 epochs": (
            {"gradients": "flipout"},
            rate(2e-2, **FRESH | {"epochs": 40}),
            50,
        ),
    },
}


def scores(posterior: dp.Posterior, rows: Rows, letters: Tensor, draws: int) -> dict[str, float]:
    """The scores of a posterior on labeled rows, and on letters."""
    started = time.process_time()
    prediction = posterior.predict(rows[0], draws=draws)
    seconds = time.process_time() - started
    probs, labels = prediction.probs.double(), rows[1]
    top = probs.max(1)
    wrong = (top.indices != labels).double()
    replicates = torch.multinomial(probs, 200, replacement=True, generator=torch.Generator().manual_seed(0)).T
    calibration = check_calibration(probs, labels, replicates)
    _, risk = risk_coverage(top.values, wrong)
    doubt = [entropy(probs), entropy(posterior.predict(letters, draws=draws).probs.double())]
    return {
        "error": float(wrong.mean()),
        "nll": float(-prediction.log_prob(labels).mean()),
        "ece": float(calibration.value),
        "error_at_9": float(risk[math.ceil((1 - REJECTED) * len(labels)) - 1]),
        "aurc": aurc(top.values, wrong),
        "auroc": auroc(torch.cat(doubt), torch.repeat_interleave(torch.arange(2), torch.tensor([*map(len, doubt)]))),
        "predict_s": seconds,
    }


def entropy(probs: Tensor) -> Tensor:
    """The entropy of each row's probabilities, in nats."""
    return torch.special.entr(probs).sum(1)


def run(routine: str, setting: Setting, rows: tuple[Rows, Rows], letters: Tensor) -> dict[str, float]:
    """Fit some rows and score others."""
    program, options, draws = setting
    torch.manual_seed(0)  # swag starts at the network's own weights
    wall, cpu = time.perf_counter(), time.process_time()
    network = BayesianNeuralNetwork(LeNet1989(), "categorical", 10, standardize=False, **program)
    posterior = ROUTINES[routine](network, rows[0], seed=0, progress=False, **options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {**scores(posterior, rows[1], letters, draws), "wall_s": wall, "cpu_s": cpu}


def parts(validate: bool) -> tuple[Rows, Rows]:
    """Training and test rows; for validation the training rows without the last ones, and these."""
    digits = load_data("usps")
    images, labels = digits.train.tensors
    if not validate:
        return (images, labels), digits.test.tensors
    return (images[:-HELD_OUT], labels[:-HELD_OUT]), (images[-HELD_OUT:], labels[-HELD_OUT:])


def shrunk_letters() -> Tensor:
    """Every fifth letter of notMNIST, in 16 by 16 pixels by the mean of each area."""
    letters = load_data("notmnist").test["images"][::5]
    return functional.interpolate(letters.unsqueeze(1), size=(16, 16), mode="area").squeeze(1)


HEAD = ["routine", "error %", "NLL", "ECE %", "error % at 9 % rejected", "AURC %", "AUROC", "processor s"]
# The error of 1989 and the reject rate of the same group; NLL and ECE of an ensemble of five that was trained by hand.
AIM = ["*aim*", "≤ 5.0", "≤ 0.177", "≤ 1.0", "≤ 1.0", "", "≥ 0.95", ""]


def table(markdown: bool) -> str:
    """The table of all results."""
    found = json.loads((RESULTS / "usps.json").read_text())["result"]["routines"]
    lines = [HEAD, AIM]
    for routine in [name for name in SETTINGS if name in found]:
        row = found[routine]
        error, ece, rejected, area = (f"{100 * row[key]:.2f}" for key in ("error", "ece", "error_at_9", "aurc"))
        nll, auroc_, seconds = f"{row['nll']:.3f}", f"{row['auroc']:.3f}", f"{row['cpu_s']:.0f}"
        lines.append([routine, error, nll, ece, rejected, area, auroc_, seconds])
    return shown(lines, markdown)


def main() -> None:
    """Fit by every routine, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routines", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--validate", action="store_true", help="score all settings on held-out training rows")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.markdown:
        print(table(True))
        return
    rows, letters = parts(options.validate), shrunk_letters()
    file = RESULTS / "usps.json"
    found = json.loads(file.read_text())["result"] if file.exists() else {"routines": {}, "settings": {}}
    for routine in options.routines:
        for label, setting in list(SETTINGS[routine].items())[: None if options.validate else 1]:
            row = run(routine, setting, rows, letters)
            print(f"{routine}, {label}: {row}", flush=True)
            if not options.validate:
                found["routines"][routine], found["settings"][routine] = row, label
                write_result("usps", found)
    if not options.validate:
        print(table(False))


if __name__ == "__main__":
    main()
