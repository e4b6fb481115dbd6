"""Bayesian network with a hidden layer of 50 on the standard UCI splits: test RMSE and log-likelihood.

    DEEPPROB_DATA=... python benchmarks/bnn_uci.py [--sets yacht energy] [--splits 5]

One configuration for every set; both scores in the target's own units. Prints every split and writes
``benchmarks/results/bnn_uci_<set>.json``. The log-likelihood is that of the mixture over draws, the log of the mean
density.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import write_result

from deepprob.data import load_data
from deepprob.fitting.callbacks import KLWarmUp
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks.dense import MLP


def run(name: str, split: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fit one split and score its test rows."""
    data = load_data(f"uci/{name}", split=split)
    wall, cpu = time.perf_counter(), time.process_time()
    posterior = svi(
        BayesianNeuralNetwork(MLP(data.shape[0], 1, (50,), options.activation)),
        data.train,
        epochs=options.epochs,
        batch_size=None,
        objective=ELBO(particles=options.particles),
        callbacks=[KLWarmUp(options.warm_up)],
        seed=split,
        device=options.device,
        progress=False,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    x, y = data.test
    prediction = posterior.predict(x, draws=options.draws)
    y = y.to(prediction.mean.device)
    return {
        "set": name,
        "split": split,
        "rmse": float((prediction.mean - y).square().mean().sqrt()),
        "log_likelihood": float(prediction.log_prob(y).mean()),
        "elbo": statistics.fmean(posterior.history.epochs["elbo"][-100:]),
        "wall_s": wall,
        "cpu_s": cpu,
    }


def mean_and_error(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean over splits and its standard error."""
    values = [row[key] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    """Fit every split, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["yacht", "energy"])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8000)
    parser.add_argument("--warm-up", type=float, default=4000)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'set':12s} {'split':>5s} {'RMSE':>8s} {'log-lik':>8s} {'ELBO':>8s} {'wall s':>7s} {'CPU s':>7s}")
    for name in options.sets:
        rows = []
        for split in range(options.splits):
            row = run(name, split, options)
            rows.append(row)
            scores = f"{row['rmse']:8.3f} {row['log_likelihood']:8.3f} {row['elbo']:8.3f}"
            print(f"{name:12s} {split:5d} {scores} {row['wall_s']:7.1f} {row['cpu_s']:7.1f}", flush=True)
        (rmse, rmse_se), (ll, ll_se) = mean_and_error(rows, "rmse"), mean_and_error(rows, "log_likelihood")
        print(f"{name:12s} {'mean':>5s} {rmse:8.3f} {ll:8.3f}   standard errors {rmse_se:.3f}, {ll_se:.3f}", flush=True)
        scores = {"rmse": rmse, "rmse_se": rmse_se, "log_likelihood": ll, "log_likelihood_se": ll_se}
        content = {"options": vars(options), "set": name, **scores, "rows": rows}
        print(f"written to {write_result(f'bnn_uci_{name}', content, options.device)}", flush=True)


if __name__ == "__main__":
    main()
