"""`Program`: a generative story, its guide, and the plate over the data."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from deepprob.data import DataSet
from deepprob.programs.arguments import Arguments, Call, missing, read_arguments
from deepprob.programs.copying import CapturedModules, captured_modules, copy_with_modules, lifted_weight
from deepprob.programs.fields import Fill, read_fields
from deepprob.programs.guide_classes import makes_guide
from deepprob.programs.minibatch import Batch, BoundRows, Minibatch, call_sampling, num_rows, run_bound, sampling_method
from deepprob.programs.missing import MissingValues, checked_missing
from deepprob.programs.registry import register


class Program(PyroModule):
    """A probabilistic program: a generative model of the data, and a guide for its latent sites.

    A subclass writes ``model(*batch)``, the generative story, and ``guide(*batch)``, the amortized or parametric
    posterior over the same latent sites. Both put the sites of a row inside ``with self.data_plate(x):`` and all other
    sites outside of it. Observed arguments may be left out to predict (``model(x, y=None)``).

    `Program.of` makes a program from any existing Pyro model.

    Attributes:
        data_name: Name of the data plate.
        registry_name: The name under which a saved posterior finds the class; a subclass that sets it is registered.
        config: The constructor's arguments as JSON, if the program can be rebuilt from them; else None.
        learning_rate: The default learning rate of a routine.
        built: The networks that the program built itself, whose weights a fit draws anew by default; not those that
            the user made.
        call: How a batch makes the arguments of a program made by `Program.of`, in the fit.
        found_plate: The row plate of a program that names no data plate, as a first run showed it. It tells queries
            which sites belong to rows; it never changes the fit.
        enumerates: Whether any site is marked for enumeration; None until a first run has shown it.
        has_baselines: Whether a first run has shown a baseline of a score-function site.
        observes: The sites that a first run has shown to be observed.
        variable_length: Whether the first dimension of a row may differ from fit to prediction (sequences).
        tasks: The values of ``DataSet.task`` that `from_data` accepts; empty for any.

    Examples:
        If the guide is exact, the ELBO does not depend on the noise:

        >>> import torch, pyro.distributions as dist
        >>> class Coin(Program):
        ...     def model(self, y=None):
        ...         p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...         with self.data_plate(y):
        ...             pyro.sample("y", dist.Bernoulli(p), obs=y)
        ...     def guide(self, y=None):
        ...         pyro.sample("p", dist.Beta(3.0, 2.0))
        >>> from deepprob.fitting.objectives import ELBO
        >>> from deepprob.programs.run import Run
        >>> run = Run(Coin(), (torch.tensor([1.0, 1.0, 0.0]),), torch.arange(3), 3)
        >>> _, terms = ELBO(analytic_kl=False)(run)
        >>> round(3 * float(terms["elbo"]), 4)  # the log evidence, log B(3, 2)
        -2.4849
    """

    data_name: str = "data"
    registry_name: str | None = None
    config: dict[str, Any] | None = None
    learning_rate: float = 1e-2
    built: Sequence[nn.Module] = ()
    variable_length: bool = False
    call: Call | None = None
    found_plate: str = ""
    enumerates: bool | None = None
    has_baselines: bool = False
    observes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("model", "guide"):
            if isinstance(method := cls.__dict__.get(name), types.FunctionType):
                setattr(cls, name, sampling_method(method))
        if registry_name := cls.__dict__.get("registry_name"):
            register(registry_name, cls)

    @classmethod
    def from_data(cls, data: DataSet, **options: Any) -> Program:
        """The program for a data set: sizes and likelihood from its rows, the rest from ``options``.

        The command ``deepprob fit`` builds a model by this method.

        Args:
            data: The data set to fit.
            options: Arguments of the constructor that the data do not determine.

        Raises:
            TypeError: If the class does not implement it.
        """
        raise TypeError(f"{cls.__name__} has no from_data. Write it, or call the constructor: {cls.__name__}(...).")

    def model(self, *batch: Any) -> Any:
        """The generative story: samples every site, with the data observed where they are given."""
        raise TypeError(f"{type(self).__name__} has no model. Write model(self, *batch), a Pyro program.")

    def guide(self, *batch: Any) -> Any:
        """The posterior's program: samples every latent site of the model."""
        name = type(self).__name__
        raise TypeError(f"{name} has no guide. Write guide(self, *batch), or fit it with guide='normal'.")

    @property
    def has_guide(self) -> bool:
        """Whether the program brings a guide of its own."""
        return "guide" in self.__dict__ or type(self).guide is not Program.guide

    def attach(self, guide: Callable[..., Any]) -> None:
        """Replace the program's guide. Call it on a copy of the program."""
        if isinstance(guide, nn.Module):
            # Bypass PyroModule.add_module: in a context shared with the model, sites would be drawn only once.
            nn.Module.add_module(self, "attached_guide", guide)
        # The instance's entry hides the class's method.
        self.__dict__["guide"] = guide

    @property
    def current_guide(self) -> Any:
        """The guide: an attached object such as an ``AutoGuide``, or the method that runs it."""
        return self.guide

    def start(self, site: str) -> Tensor | None:
        """Where a named guide starts a latent site: at a weight of the program; None for where the guide chooses."""
        return None

    def data_plate(self, *batch: Any) -> pyro.plate:
        """The plate over rows: ``pyro.plate("data", num_data)``, with the rows of the current batch.

        Args:
            batch: The program's arguments; outside of a routine the first tensor gives the number of rows.
        """
        size = self.bound_rows.num_data if self.bound_rows.num_data is not None else num_rows(batch)
        return pyro.plate(self.data_name, size, dim=-1)

    @contextmanager
    def bound(self, rows: Tensor, num_data: int, query: str | None = None, call: Call | None = None) -> Iterator[None]:
        """Within this context the data plate has ``num_data`` rows, of which the batch holds ``rows``.

        Args:
            rows: Indices of the batch's rows, shape ``(B,)``.
            num_data: Number of rows of the whole data, N.
            query: In a query, the plate that holds the rows, empty for none; every plate then has all of its rows.
            call: How the batch makes the arguments; None for the call of the fit.
        """
        bound = self.bound_rows
        before, fitted = vars(bound).copy(), self.call
        plate, whole = (self.data_name, False) if query is None else (query, True)
        vars(bound).update(plate=plate, rows=rows, num_data=num_data if plate else None, whole=whole)
        self.__dict__["call"] = call or fitted
        try:
            with Minibatch(plate, rows, num_data, whole, bound.gradients):
                yield
        finally:
            vars(bound).update(before)
            self.__dict__["call"] = fitted

    @property
    def bound_rows(self) -> BoundRows:
        """The rows that the data plate currently holds."""
        found: BoundRows = self.__dict__.setdefault("_bound_rows", BoundRows(self.data_name))
        return found

    @property
    def row_plate(self) -> str:
        """The plate over rows: the data plate, or the one that a first run showed; empty if there is none."""
        return self.data_name or self.found_plate

    def bound_model(self) -> Callable[..., Any]:
        """The model for an AutoGuide: its data plate takes the bound rows even if outer handlers are blocked."""
        return functools.partial(run_bound, self.bound_rows, self.model)

    @property
    def argument_names(self) -> list[str]:
        """Names of the model's arguments, in order."""
        parameters = self._signature().parameters.values()
        return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    @property
    def num_required(self) -> int:
        """How many of the model's arguments have no default."""
        return len(missing((), {}, self._signature()))

    @property
    def takes_any(self) -> bool:
        """Whether the model takes any number of arguments."""
        return any(p.kind is p.VAR_POSITIONAL for p in self._signature().parameters.values())

    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.model)

    def accept(self, data: Any, *, what: str = "data", fill: Fill | None = None) -> Batch:
        """Select the tensors for the model's arguments, in their order, and check them.

        Fields of a `Split` for which the model has no argument are ignored, such as the labels of images for a model
        of images alone. Other data must not have more parts than the model has arguments.

        Args:
            data: Anything that `as_split` reads, or None for a program without data.
            what: The name of the data in error messages.
            fill: Replaces missing values (NaN) in a query that draws them; None to refuse them.

        Raises:
            ValueError: If there are too many parts, or the values cannot be data of this program.
        """
        if data is None:
            return ()
        rows = read_fields(data, self.argument_names, self.num_required, self.takes_any, what, fill is not None)
        return self.validate(*(fill(rows) if fill else rows))

    def missing_arguments(self, batch: Batch) -> list[str]:
        """Names of the arguments without a default that a batch does not give."""
        return self.argument_names[len(batch) : self.num_required]

    def call_arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of a call, for a batch."""
        return batch, {}

    def pad(self, batch: Batch) -> Batch:
        """The batch with None for arguments that were left out and have no default, to predict them."""
        return batch + (None,) * (self.num_required - len(batch))

    def validate(self, *batch: Any) -> Batch:
        """Check a batch and convert it to the types that the model expects; the default returns it unchanged."""
        return batch

    def adapt(self, *batch: Any) -> None:
        """Set constants of the whole training data (means and scales) before a fit; the default sets none."""

    def restore(self) -> None:
        """After a load, make what `adapt` made for layers whose sizes it found; the default makes nothing."""

    def prepare(self, *batch: Any) -> Batch:
        """The batch with parts drawn anew at every use (dynamic binarization); the default returns it unchanged."""
        return batch

    def lengths(self, *batch: Any) -> Tensor | None:
        """Number of time steps of each row, shape ``(B,)``; None if rows are not sequences or all have one length.

        A program of ``variable_length`` that returns lengths is fitted on batches of similar sequences, cut where they
        end: steps beyond a row's length must have no influence. Arguments of shape ``(B, T, ...)`` are cut if they have
        as many steps T as the first of them. Arguments of shape ``(B, T)`` are not: write a mask as ``(B, T, 1)``.
        """
        return None

    def units(self, *batch: Any) -> Tensor | None:
        """Number of customary units of each row (time steps, words, dimensions), shape ``(B,)``; None for one each."""
        return None

    @staticmethod
    def of(
        model: Callable[..., Any],
        guide: Callable[..., Any] | type[AutoGuide] | str | None = None,
        *,
        data_plate: str | None = None,
        missing: str = "refuse",
    ) -> Program:
        """Make a program from an existing Pyro model and guide.

        Plates, masks, scales and ``pyro.param`` statements mean the same as in Pyro. The program is fitted on the full
        batch unless ``data_plate`` is given. Minibatches are then weighted by ``N / B``, whether the plate is written
        ``pyro.plate("data", N)`` or ``pyro.plate("data", len(x))``.

        Args:
            model: A Pyro model: a function, a method, a module.
            guide: A callable, an ``AutoGuide`` or its class, a name such as ``"normal"``, or None: see the routine.
            data_plate: Name of the plate over rows.
            missing: ``"refuse"`` for data without missing values (NaN); ``"allow"`` for a model that masks them. An
                observed site whose mask does not cover a missing value is an error.

        Examples:
            >>> import pyro.distributions as dist
            >>> def model(y):
            ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
            >>> Program.of(model, "normal", data_plate="data").data_name
            'data'
        """
        return FunctionProgram(model, guide, data_plate, missing)


class FunctionProgram(Program):
    """A program whose model and guide were written elsewhere; made by `Program.of`."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | type[AutoGuide] | str | None,
        data_plate: str | None,
        missing: str = "refuse",
    ) -> None:
        super().__init__()
        for name, value in (("model", model), ("guide", guide)):
            if not (callable(value) or (name == "guide" and (value is None or isinstance(value, str)))):
                raise TypeError(f"{name} must be a callable Pyro program; got {type(value).__name__}.")
        if not isinstance(data_plate, str | None):
            raise TypeError(f"data_plate must be the name of a plate; got {data_plate!r}. Write data_plate='data'.")
        self.data_name, self.missing = data_plate or "", checked_missing(missing)
        self.__dict__["_bound_rows"] = BoundRows(self.data_name)
        self._hold(model, guide)

    def _hold(self, model: Any, guide: Any, resting: tuple[nn.Module, ...] | None = None) -> None:
        # Bypass PyroModule.__setattr__, which would prefix the user's site names.
        self.__dict__["_model"], self.__dict__["_guide"] = model, guide
        self.parts = CapturedModules((model, guide), resting)

    def gather(self) -> None:
        """Take on the networks that a run of the functions made."""
        found = captured_modules((self.__dict__["_model"], self.__dict__["_guide"]))
        self.parts.extend([module for module in found if all(module is not part for part in self.parts)])

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionProgram:
        parts = self.__dict__["_model"], self.__dict__["_guide"], self.bound_rows, self.parts.resting
        model, guide, bound_rows, resting = copy_with_modules(parts, memo)
        twin = FunctionProgram(model, guide, self.data_name or None, self.missing)
        twin.parts.resting = resting
        twin.__dict__.update(_bound_rows=bound_rows, call=self.call, found_plate=self.found_plate)
        memo[id(self)] = twin
        return twin

    def attach(self, guide: Callable[..., Any]) -> None:
        self._hold(self.__dict__["_model"], guide, None if self.training else self.parts.resting)

    def bound_model(self) -> Callable[..., Any]:
        return functools.partial(run_bound, self.bound_rows, self._handled())

    def model(self, *batch: Any) -> Any:
        args, kwargs = self.call_arguments(batch)
        return call_sampling(self._handled(), *args, **kwargs)

    def _handled(self) -> Callable[..., Any]:
        model: Callable[..., Any] = self.__dict__["_model"]
        return MissingValues()(model) if self.missing == "allow" else model

    def guide(self, *batch: Any) -> Any:
        args, kwargs = self.call_arguments(batch)
        return call_sampling(self.__dict__["_guide"], *args, **kwargs)

    def accept(self, data: Any, *, what: str = "data", fill: Fill | None = None) -> Batch:
        """Read data as the arguments of the model; see `read_arguments`."""
        if isinstance(data, Arguments):
            return data
        fitted, missing = self.call.names if self.call else (), self.missing == "allow" or fill is not None
        data = (data,) if self.call and self.call.takes_as_one(data) else data
        found = read_arguments(data, self._signature(), what=what, fitted=fitted, missing=missing)
        return fill(found) if fill else found

    def missing_arguments(self, batch: Batch) -> list[str]:
        call = batch.call if isinstance(batch, Arguments) else self.call
        return missing(call.args, call.kwargs, self._signature()) if call else super().missing_arguments(batch)

    def call_arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        signature = self._signature()
        if self.call is None:  # rows in the order of the parameters
            names = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
            count = len(batch) if self.takes_any else min(len(batch), len(self.argument_names))
            args, kwargs = tuple(batch[:count]), dict(zip(names, batch[count:], strict=False))
        else:
            args, kwargs = self.call.fill(batch)
        # An argument that was left out is to be predicted.
        return args, kwargs | dict.fromkeys(missing(args, kwargs, signature))

    def pad(self, batch: Batch) -> Batch:
        return batch

    def start(self, site: str) -> Tensor | None:
        return lifted_weight(self.parts, site)

    @property
    def current_guide(self) -> Any:
        """The guide as it was given: a callable, a class, a name or None."""
        return self.__dict__["_guide"]

    @property
    def has_guide(self) -> bool:
        return callable(self.current_guide) and not makes_guide(self.current_guide)

    def _signature(self) -> inspect.Signature:
        model = self.__dict__["_model"]
        while isinstance(model, functools.partial) and model.args and isinstance(model.args[0], Messenger):
            model = model.args[1]  # Pyro's handlers wrap a model so that its signature is lost
        return inspect.signature(model)
