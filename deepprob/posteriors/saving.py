"""Saving posteriors to disk and loading them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepprob.engine.machine import pick_device
from deepprob.engine.random import RandomStream
from deepprob.errors import StorageError
from deepprob.posteriors.guide_accuracy import GuideAccuracy
from deepprob.posteriors.history import History
from deepprob.posteriors.training_rows import TrainingRows
from deepprob.programs.arguments import Arguments, call_from_json, call_to_json
from deepprob.programs.guides import GuideSpec, with_prior_guide
from deepprob.programs.inputs import columns_of, specs_from_json, specs_to_json
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.late import check_saved
from deepprob.programs.origin import origin_from_json, origin_to_json
from deepprob.programs.program import FunctionProgram, Program
from deepprob.programs.registry import program_named
from deepprob.storage import read, versions, write


@functools.cache
def _versions() -> dict[str, str]:
    return versions()


@dataclass(frozen=True, eq=False)
class Training:
    """The rest of what a routine needs to train on from the last step of a fit.

    Attributes:
        tensors: The optimizer's memory, the positions of the random streams, and parameters that differ from those of
            the posterior.
        facts: The number of steps and other settings, as JSON.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(eq=False, kw_only=True)
class Content:
    """The parts of a posterior, and those that are saved.

    Attributes:
        instance: The fitted program.
        history: The record of the fit.
        config: The routine and its settings, as JSON.
        seed: The fit's seed.
        chains: Draws by site, shape ``(chains, draws, *site)``; None if the posterior holds a guide.
        exact: Whether the evidence is a closed form.
        versions: Versions of Python and of the packages used in the fit.
        training: What `deepprob.extend` continues from; None if the fit cannot be extended.
        accuracy: How far the guide is from the posterior given the training data; None if it was not judged, or if
            every row has latents of its own, so that any rows can tell.
        training_rows: What is kept of the rows of the fit; None if it is not known.
    """

    instance: ProgramInstance = field(kw_only=False)
    history: History = field(default_factory=History)
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    chains: Mapping[str, Tensor] | None = None
    exact: bool = False
    versions: dict[str, str] = field(default_factory=lambda: dict(_versions()))
    training: Training | None = None
    accuracy: GuideAccuracy | None = None
    training_rows: TrainingRows | None = None

    def __post_init__(self) -> None:
        found = self.instance.structure
        self.exact = self.exact or bool(found.summed and not found.latent)
        if self.chains is not None:
            self.chains = {n: v.detach().to(self.instance.device) for n, v in self.chains.items()}


def write_posterior(path: str | Path, content: Content) -> None:
    """Write a posterior to a folder, atomically.

    Raises:
        ValueError: If a later run than the first made a network of the program.
    """
    instance, chains = content.instance, content.chains
    check_saved(instance)
    program = instance.program
    tensors = {f"state.{n}": t for n, t in {**instance.waiting, **instance.tensors()}.items()}
    tensors |= {f"history.{n}": t for n, t in content.history.to_tensors().items()}
    tensors |= {f"chains.{n}": t for n, t in (chains or {}).items()}
    training, accuracy = content.training, content.accuracy
    tensors |= {f"training.{n}": t for n, t in (training.tensors if training else {}).items()}
    tensors |= {f"accuracy.{n}": t for n, t in (accuracy.to_tensors() if accuracy else {}).items()}
    rows = content.training_rows
    tensors |= {f"rows.{n}": t for n, t in (rows.to_tensors() if rows else {}).items()}
    # A subclass inherits its parent's registry_name but is another program, so only its own name counts.
    name = type(program).__dict__.get("registry_name") if program.config is not None else None
    manifest = {
        "program": name,
        "program_class": type(program).__name__,
        "program_config": program.config,
        "guide": instance.guide_name,
        "num_data": instance.num_data,
        "inputs": specs_to_json(instance.inputs),
        "origin": origin_to_json(program.origin),
        "call": call_to_json(program.call),
        "setup": instance.setup(),
        "active_dropout": program.active_dropout,
        "history": content.history.facts(),
        "config": content.config,
        "seed": content.seed,
        "exact": content.exact,
        "training": dict(training.facts) if training else None,
        "accuracy": accuracy.facts() if accuracy else None,
        "posterior_kind": "guide" if chains is None else "draws",
        "made_with": content.versions,
    }
    write(path, tensors, manifest, kind="posterior")


def read_posterior(
    path: str | Path, program: Program | None, device: str | torch.device, guide: GuideSpec = None
) -> Content:
    """Read a posterior that `write_posterior` wrote.

    Raises:
        StorageError: If the save is damaged, or does not fit the program.
    """
    if program is not None and not isinstance(program, Program):
        raise TypeError(
            f"program must be a Program; got {type(program).__name__}. "
            "Make one from a Pyro model: Program.of(model, guide)."
        )
    tensors, manifest = read(path, kind="posterior")
    if guide is None:
        guide = manifest["guide"]
    stream = RandomStream(0, pick_device(device))
    if program is None:
        with stream.drawing():
            program = _rebuild(path, manifest)
    names = ("state", "history", "chains", "training", "accuracy", "rows")
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in tensors.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    chains = groups["chains"] if manifest["posterior_kind"] == "draws" else None
    unknown_guide = isinstance(program, FunctionProgram) and program.current_guide is None
    unknown_guide |= any(name.startswith("program.attached_guide.") for name in groups["state"])
    if unknown_guide and guide is None and chains is None:
        raise StorageError(
            f"{path} was fitted with a guide of the user, which no file can hold. Give this guide, as svi got it: "
            "Posterior.load(path, program, guide=...)."
        )
    try:
        with stream.drawing():
            instance = _instance(program, guide, manifest, groups["state"], chains, device)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise StorageError(f"{path} does not fit the program {type(program).__name__}: {error}") from error
    return Content(
        instance,
        history=History.restore(groups["history"], manifest["history"]),
        config=manifest["config"],
        seed=manifest["seed"],
        chains=chains,
        exact=manifest["exact"],
        versions=manifest["made_with"],
        training=Training(groups["training"], manifest["training"]) if manifest.get("training") else None,
        accuracy=GuideAccuracy.restore(groups["accuracy"], facts) if (facts := manifest.get("accuracy")) else None,
        training_rows=TrainingRows.restore(groups["rows"]),
    )


def _instance(
    program: Program,
    guide: GuideSpec,
    manifest: Mapping[str, Any],
    state: Mapping[str, Tensor],
    chains: Mapping[str, Tensor] | None,
    device: str | torch.device,
) -> ProgramInstance:
    """The program with its saved state. Only a folder of an earlier version, without a set-up, needs a run for that."""
    specs, num_data = specs_from_json(manifest["inputs"]), manifest["num_data"]
    call, setup = manifest.get("call"), manifest.get("setup")
    rows = num_data if isinstance(program, FunctionProgram) else min(num_data, 4)
    examples = tuple(spec.example(rows) for spec in specs) if setup is None else ()
    instance = ProgramInstance(
        program if chains is None else with_prior_guide(program, chains),
        examples if call is None else Arguments(examples, call_from_json(call)),
        num_data,
        guide=guide if chains is None else None,
        device=device,
        full_batch=isinstance(program, FunctionProgram) or not specs,
        check=False,
        saved=None if setup is None else (setup, state),
    )
    instance.inputs = specs
    instance.program.active_dropout = manifest.get("active_dropout", False)
    instance.program.__dict__["origin"] = origin_from_json(manifest.get("origin"), columns_of(specs))
    if setup is None:
        instance.load(state)
    return instance


def _rebuild(path: str | Path, manifest: Mapping[str, Any]) -> Program:
    name = manifest["program"]
    if name is None:
        raise StorageError(
            f"{path} holds a posterior of {manifest['program_class']}, which its name and settings cannot rebuild. "
            "Give the program: Posterior.load(path, program=...)."
        )
    try:
        model: Callable[..., Program] = program_named(name)
    except ValueError as error:
        raise StorageError(
            f"{path} holds a posterior of {name!r}, which is not registered. Import the module that defines it "
            "(deepprob.models for deepprob's models), or give the program: Posterior.load(path, program=...)."
        ) from error
    try:
        return model(**manifest["program_config"])
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"{path} cannot rebuild its program {name!r}: {error}. Its constructor has changed since the save; build "
            "the program and give it: Posterior.load(path, program=...)."
        ) from error
