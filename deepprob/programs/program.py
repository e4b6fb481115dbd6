"""`Program`: a generative story, its guide, and the plate over the data."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from deepprob.data import DataSet
from deepprob.programs.arguments import Arguments, missing, read_arguments, signature_of
from deepprob.programs.copying import CapturedModules, captured_modules, copy_with_modules, lifted_weight
from deepprob.programs.fields import Fill, read_fields
from deepprob.programs.guide_classes import check_functions, makes_guide
from deepprob.programs.minibatch import Batch, BoundRows, call_sampling, run_bound, sampling_method
from deepprob.programs.missing import MissingValues, checked_missing, explaining_masks
from deepprob.programs.origin import Fields, Origin, in_own_precision
from deepprob.programs.plated import Plated
from deepprob.programs.registry import register
from deepprob.programs.sequences import SequenceArguments


class Program(Plated):
    """A probabilistic program: a generative model of the data, and a guide for its latent sites.

    A subclass writes ``model(*batch)``, the generative story, and ``guide(*batch)``, the amortized or parametric
    posterior over the same latent sites. Both put the sites of a row inside ``with self.data_plate(x):`` and all other
    sites outside of it. Observed arguments may be left out to predict (``model(x, y=None)``).

    Attributes:
        data_name: Name of the data plate.
        registry_name: The name under which a saved posterior finds the class; a subclass that sets it is registered.
        config: The constructor's arguments as JSON, if the program can be rebuilt from them; else None.
        learning_rate: The default learning rate of a routine.
        built: The networks that the program built itself, whose weights a fit draws anew by default; not those that
            the user made.
        origin: Facts that the data of the fit brought along, such as the names of columns, which later data must have.
        call: How a batch makes the arguments of a program made by `Program.of`, in the fit.
        found_plate: The row plate of a program that names no data plate, as a first run showed it. It tells queries
            which sites belong to rows; it never changes the fit.
        enumerates: Whether any site is marked for enumeration; None until a first run has shown it.
        has_baselines: Whether a first run has shown a baseline of a score-function site.
        observes: The sites that a first run has shown to be observed.
        variable_length: Whether the first dimension of a row may differ from fit to prediction (sequences).
        tasks: The values of ``DataSet.task`` that `from_data` accepts; empty for any.
        missing: Whether the program takes missing values (NaN), ``"allow"`` or ``"refuse"``.
        reads_missing: Whether its guide can read rows with missing values, if the program takes them.

    Examples:
        If the guide is exact, the ELBO does not depend on the noise:

        >>> import pyro, torch, pyro.distributions as dist
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

    registry_name: str | None = None
    config: dict[str, Any] | None = None
    learning_rate: float = 1e-2
    built: Sequence[nn.Module] = ()
    origin: Origin = Origin()
    missing: str = "refuse"
    enumerates: bool | None = None
    has_baselines: bool = False
    observes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    reads_missing: bool = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("model", "guide", "forecast"):
            if isinstance(method := cls.__dict__.get(name), types.FunctionType):
                setattr(cls, name, sampling_method(method))
        if registry_name := cls.__dict__.get("registry_name"):
            register(registry_name, cls)

    @classmethod
    def from_data(cls, data: DataSet, **options: Any) -> Program:
        """The program for a data set: sizes and likelihood from its rows, the rest from ``options``.

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
        raise TypeError(
            f"{type(self).__name__} has no guide. Write guide(self, *batch), or fit it with guide='normal'."
        )

    def forecast(self, steps: int, *batch: Any) -> Any:
        """The next values of each row: a program that continues the model, and samples them last.

        `Posterior.forecast` runs it on draws from the posterior: a latent site of the model that is sampled here again,
        under its name, has the value that explains the row's own steps; other sites are drawn.

        Args:
            steps: Number of steps after the end of each row.
            batch: The program's arguments.
        """
        raise TypeError(
            f"{type(self).__name__} has no forecast. Write forecast(self, steps, *batch), a Pyro program that samples "
            "the next values last, or pass Program.of(..., forecast=function)."
        )

    @property
    def has_forecast(self) -> bool:
        """Whether the program brings a `forecast`."""
        return type(self).forecast is not Program.forecast

    @property
    def explains_gaps(self) -> bool:
        """Whether the guide of a fit explains rows with missing values, so that these need not be drawn for it."""
        return self.missing == "allow"

    @property
    def has_guide(self) -> bool:
        """Whether the program brings a guide of its own."""
        return "guide" in self.__dict__ or type(self).guide is not Program.guide

    def attach(self, guide: Callable[..., Any]) -> None:
        """Replace the program's guide. Call it on a copy of the program."""
        if isinstance(guide, nn.Module):
            # Bypass PyroModule.add_module: in a context shared with the model, sites would be drawn only once.
            nn.Module.add_module(self, "attached_guide", guide)
        self.__dict__["guide"] = guide

    @property
    def current_guide(self) -> Any:
        """The guide: an attached object such as an ``AutoGuide``, or the method that runs it."""
        return self.guide

    def start(self, site: str) -> Tensor | None:
        """Where a named guide starts a latent site: at a weight of the program; None for where the guide chooses."""
        return lifted_weight(self.children(), site)

    def bound_model(self) -> Callable[..., Any]:
        """The model for an AutoGuide: its data plate takes the bound rows even if outer handlers are blocked."""
        return functools.partial(run_bound, self.bound_rows, self.model)

    @in_own_precision
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
        form = self.argument_names, self.num_required, self.takes_any
        allowed, columns = fill is not None or self.missing == "allow", self.origin.columns
        rows = read_fields(self.origin.read(data), *form, what, allowed, columns, self.variable_length)
        return Fields(self.validate(*(fill(rows) if fill else rows)), rows.origin)

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
        """Set constants of the whole training data (means and scales) before a fit; the default sets none.

        Of data that a fit reads while it runs, the batch is a sample. `deepprob.networks.inputs.moments` then returns
        the mean and sd of all rows of a memory-mapped array; of other data, those of the sample.
        """

    def restore(self) -> None:
        """After a load, make what `adapt` made for layers whose sizes it found; the default makes nothing."""

    def prepare(self, *batch: Any) -> Batch:
        """The batch with parts drawn anew at every use (dynamic binarization); the default returns it unchanged."""
        return batch

    def lengths(self, *batch: Any) -> Tensor | None:
        """Number of time steps of each row, shape ``(B,)``; None if rows are not sequences or all have one length.

        A program of ``variable_length`` that returns lengths is fitted on batches of similar sequences, cut where they
        end: steps beyond a row's length must have no influence. Arguments of shape ``(B, T, ...)`` are cut if they have
        as many steps T as the first of them. Arguments of shape ``(B, T)`` are not, unless `is_sequence` says so: write
        a mask as ``(B, T, 1)``.
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
        variable_length: bool | Sequence[str] = False,
        lengths: str = "lengths",
        forecast: Callable[..., Any] | None = None,
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
            variable_length: Whether arguments of shape ``(N, T, ...)`` are sequences, which may have another T at
                prediction; or the names of the arguments that are, such as tokens or masks of shape ``(N, T)``. The
                program then takes lists of series, too, padded: one-dimensional ones to ``(N, T)`` if named.
            lengths: Name of the argument that holds the number of steps of each row. If the model has it, batches of
                similar sequences are cut where they end, so steps beyond a length must have no influence.
            forecast: A Pyro program ``forecast(steps, *arguments)`` that continues the model; see `forecast`.

        Examples:
            >>> import pyro.distributions as dist
            >>> def model(y):
            ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
            >>> Program.of(model, "normal", data_plate="data").data_name
            'data'
        """
        return FunctionProgram(model, guide, data_plate, missing, variable_length, lengths, forecast)


class FunctionProgram(Program):
    """A program whose model and guide were written elsewhere; made by `Program.of`."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | type[AutoGuide] | str | None,
        data_plate: str | None,
        missing: str = "refuse",
        variable_length: bool | Sequence[str] = False,
        lengths: str = "lengths",
        forecast: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        check_functions(model, guide, data_plate)
        if not (forecast is None or callable(forecast)):
            raise TypeError(f"forecast must be a callable Pyro program; got {type(forecast).__name__}.")
        self.data_name, self.missing = data_plate or "", checked_missing(missing)
        self.__dict__["_bound_rows"] = BoundRows(self.data_name)
        self.__dict__["_forecast"] = forecast
        self._hold(model, guide)
        self.sequences = SequenceArguments.of(variable_length, lengths, self._signature())
        self.variable_length = self.sequences is not None

    def _hold(self, model: Any, guide: Any, resting: tuple[nn.Module, ...] | None = None) -> None:
        self.__dict__["_model"], self.__dict__["_guide"] = model, guide  # PyroModule would prefix the sites' names
        self.parts = CapturedModules((model, guide), resting)

    def gather(self) -> None:
        """Take on the networks that a run of the functions made."""
        found = captured_modules((self.__dict__["_model"], self.__dict__["_guide"]))
        self.parts.extend([module for module in found if all(module is not part for part in self.parts)])

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionProgram:
        own = [self.__dict__[name] for name in ("_model", "_guide", "_forecast")]
        model, guide, forecast, bound_rows, resting = copy_with_modules(
            (*own, self.bound_rows, self.parts.resting), memo
        )
        twin = FunctionProgram(model, guide, self.data_name or None, self.missing, forecast=forecast)
        twin.sequences, twin.variable_length = self.sequences, self.variable_length
        twin.parts.resting = resting
        twin.__dict__.update(_bound_rows=bound_rows, origin=self.origin, call=self.call, found_plate=self.found_plate)
        memo[id(self)] = twin
        return twin

    def attach(self, guide: Callable[..., Any]) -> None:
        self._hold(self.__dict__["_model"], guide, None if self.training else self.parts.resting)

    def bound_model(self) -> Callable[..., Any]:
        return functools.partial(run_bound, self.bound_rows, self._handled())

    def model(self, *batch: Any) -> Any:
        args, kwargs = self.call_arguments(batch)
        return call_sampling(self._handled(), *args, **kwargs)

    def _handled(self) -> Any:
        return MissingValues()(self.__dict__["_model"]) if self.missing == "allow" else self.__dict__["_model"]

    def guide(self, *batch: Any) -> Any:
        args, kwargs = self.call_arguments(batch)
        return call_sampling(self.__dict__["_guide"], *args, **kwargs)

    @property
    def has_forecast(self) -> bool:
        return self.__dict__["_forecast"] is not None

    def forecast(self, steps: int, *batch: Any) -> Any:
        args, kwargs = self.call_arguments(batch)
        return call_sampling(self.__dict__["_forecast"], steps, *args, **kwargs)

    def lengths(self, *batch: Any) -> Tensor | None:
        names = zip(self.row_names, batch, strict=False)
        return None if self.sequences is None else dict(names).get(self.sequences.lengths)

    def is_sequence(self, name: str, row: Sequence[int]) -> bool:
        return self.sequences is not None and self.sequences.has(name, row)

    @in_own_precision
    def accept(self, data: Any, *, what: str = "data", fill: Fill | None = None) -> Batch:
        """Read data as the arguments of the model; see `read_arguments`."""
        if isinstance(data, Arguments):
            return data
        data = self.origin.read(data)
        fitted, missing = self.call.names if self.call else (), self.missing == "allow" or fill is not None
        data = (data,) if self.call and self.call.takes_as_one(data) else data
        options: dict[str, Any] = {"what": what, "fitted": fitted, "missing": missing, "origin": self.origin}
        with explaining_masks():
            if self.sequences is not None:
                data = self.sequences.read(data, self.argument_names, what, missing)
            found = read_arguments(data, self._signature(), **options)
        found = found if self.sequences is None else self.sequences.checked(found)
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
        return signature_of(self.__dict__["_model"])
