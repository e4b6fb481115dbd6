"""A query to a program, or the log-density of its latents, as one graph of tensor operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, biject_to
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from deepprob.engine.deferred_errors import DeferredErrors
from deepprob.engine.machine import ONE_AT_A_TIME
from deepprob.engine.native.build import Run as NativeCode
from deepprob.engine.native.build import compile_module, is_cached
from deepprob.engine.noise import LiftedNoise, NoDraws, NoiseSize, RandomDraw
from deepprob.engine.random import RandomStream
from deepprob.engine.subject import Subject, Untraceable
from deepprob.engine.trace import (
    SkipValueChecks,
    functionalise,
    lift_constants,
    numbers_written,
    reason_of,
    trace_graph,
)
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, is_deterministic, sample_sites


def tensors_of(instance: ProgramInstance) -> list[Tensor]:
    """All tensors of a program: parameters, buffers, its store, averages and weights of rows, each once."""
    program, store = instance.program, [*instance.store["params"].values(), *instance.program.bound_rows.tensors]
    everything = [*program.parameters(), *program.buffers(), *store, *instance.averages.values()]
    return list({id(x): x for x in everything if not is_lazy(x)}.values())


def subject_of(instance: ProgramInstance) -> Subject:
    """A program as the subject of a trace."""
    return Subject(
        instance.program,
        "the program",
        "keep a schedule in a buffer and change it with Anneal",
        "one of its buffers: use register_buffer",
        "its input, or changes a buffer in some steps only",
        (pyro,),
    )


@dataclass(frozen=True)
class QueryGraph:
    """A query to a program: a pure function from (its tensors, a batch, normal noise, uniform noise) to tensors.

    Attributes:
        graph: The function.
        tensors: The program's tensors.
        noise: Size of the noise that one call takes.
        device: The program's device.
        values_read: Whether the graph holds for the known values of the batch alone, because Python read them.
    """

    graph: GraphModule
    tensors: list[Tensor]
    noise: NoiseSize
    device: torch.device
    values_read: bool = False


def trace_query(
    instance: ProgramInstance, ask: Callable[[Batch], list[Tensor]], batch: Batch, *, known: int = 0
) -> QueryGraph:
    """Trace a query to a program, without gradients. Call it inside `ProgramInstance.running`.

    Args:
        instance: The program.
        ask: The query, from a batch to tensors. Where it would raise a deferred error, the graph returns nan in
            floating-point tensors.
        batch: An example batch.
        known: How many tensors, the first of the batch, may steer the program by their values.

    Raises:
        Untraceable: If the query fails, or its answer depends on values other than by tensor operations.
    """
    batch, tensors = tuple(x.clone() for x in batch), tensors_of(instance)
    try:
        with torch.no_grad(), LiftedNoise() as noise:
            ask(batch)
    except Untraceable:
        raise
    except Exception as error:  # an eager query raises it again if the program itself fails
        raise Untraceable(reason_of(error, [pyro])) from error

    reader = SkipValueChecks(["known"] if known else [])

    def run(tensors: list[Tensor], known: Batch, batch: Batch, normal: Tensor, uniform: Tensor) -> list[Tensor]:
        with torch.no_grad(), LiftedNoise(normal, uniform), DeferredErrors() as errors, TraceableSites(), reader:
            answer = ask((*known, *batch))
        return [errors.mark_nan(x) if x.is_floating_point() else x for x in answer]

    size, device = noise.size, instance.device
    drawn = size.draw_once([torch.Generator(device).manual_seed(seed) for seed in (0, 1)], device)
    inputs = (tensors, batch[:known], batch[known:], *drawn)
    graph = trace_graph(run, inputs, tensors, subject=subject_of(instance))

    def joined(tensors: list[Tensor], batch: Batch, *noise: Tensor) -> Any:
        return graph(tensors, batch[:known], batch[known:], *noise)

    functional = functionalise(joined, [x.detach() for x in tensors], batch, *drawn)
    return QueryGraph(functional, tensors, size, device, reader.values_read)


class _Indices(Tensor):
    """The indices of a whole plate; a Python loop over them yields integers.

    Attributes:
        plain: The same indices as a plain tensor, which torch functions are given.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    plain: Tensor

    @staticmethod
    def of(size: int, device: Any) -> _Indices:
        with _disable_current_modes():
            plain = torch.arange(size, device=device)
            found = plain.as_subclass(_Indices)
        found.plain = plain
        return found

    def __iter__(self) -> Any:
        return iter(range(len(self)))


class _PlainIndices(TorchFunctionMode):
    """Gives torch functions plain tensors as indices: the tracer knows no others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_plain, args), **{name: _plain(value) for name, value in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    if type(value) in (tuple, list):  # several indices
        return type(value)(map(_plain, value))
    return value.plain if isinstance(value, _Indices) else value


class TraceableSites(Messenger):
    """Skips code that reads tensor values although the result is known: plate indices, argument validation."""

    def __enter__(self) -> Any:
        self._mode = _PlainIndices()
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        return super().__exit__(*error)

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn).__name__ == "_Subsample":
            # `for i in pyro.plate("p", 3)` reads its indices as numbers: they are made outside of the trace.
            if msg["value"] is None and fn.subsample_size in (None, fn.size):
                msg["value"] = _Indices.of(fn.size, fn.device or None)
        elif isinstance(fn, Distribution):
            msg["fn"] = _unchecked(fn)


def _unchecked(fn: Distribution) -> Distribution:
    """The distribution without checks of its values, which one made before the run may still have."""
    parts = {k: v for k, v in vars(fn).items() if isinstance(v, Distribution)}
    changed = {k: new for k, v in parts.items() if (new := _unchecked(v)) is not v}
    if not changed and not fn.__dict__.get("_validate_args"):
        return fn
    new = copy.copy(fn)
    new.__dict__.update(changed, _validate_args=False)
    return new


class FlatQuery:
    """A query to a program as one graph from tensors to one tensor, run operation by operation or compiled.

    Args:
        query: The traced query.
        batch: An example batch.

    Attributes:
        operations: Number of operations of the graph.
        numbers: How many numbers they write.
        is_compiled: Whether calls run native code.
    """

    def __init__(self, query: QueryGraph, batch: Batch) -> None:
        self.query, self.is_compiled = query, False
        generators = [torch.Generator(query.device).manual_seed(seed) for seed in (0, 1)]
        inputs = [*query.tensors, *batch, *query.noise.draw_once(generators, query.device)]
        split = len(query.tensors), len(query.tensors) + len(batch)

        def flat(*given: Tensor) -> tuple[Tensor]:
            tensors, rows, noise = given[: split[0]], given[split[0] : split[1]], given[split[1] :]
            (answer,) = query.graph(list(tensors), tuple(rows), *noise)
            return (answer,)

        with ONE_AT_A_TIME, torch.no_grad():
            self._graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*(x.detach() for x in inputs))
            self._constants = [x.detach().clone() for x in lift_constants(self._graph)]
        self._inputs = [*(x.detach() for x in inputs), *self._constants]
        self._run: NativeCode = lambda inputs: list(self._graph(*inputs))
        self.operations = sum(node.op == "call_function" for node in self._graph.graph.nodes)
        self.numbers = numbers_written(self._graph)

    def is_cached(self) -> bool:
        """Whether the cache holds native code for the query."""
        return is_cached(self._graph, self._inputs)

    def compile(self) -> None:
        """Compile the query to native code, or load it from the cache.

        Raises:
            NoCompiler: If there is no C++ compiler.
        """
        with ONE_AT_A_TIME:
            self._run, self.is_compiled = compile_module(self._graph, self._inputs), True

    def __call__(self, batch: Batch, normal: Tensor, uniform: Tensor) -> Tensor:
        """The answer for a batch and noise."""
        with torch.no_grad():
            tensors = [x.detach() for x in self.query.tensors]
            return self._run([*tensors, *batch, normal, uniform, *self._constants])[0]


@dataclass(frozen=True)
class LogDensity:
    r"""The log-density of a program's latents, in unconstrained coordinates, of several chains at once.

    .. math:: \log \pi(q) = \log p\big(x, z\big) + \log \Big| \frac{\partial z}{\partial q} \Big|, \qquad z = T(q)

    with :math:`T` the map from the reals to the support of every site. Support and map may depend on other latents.
    It is a pure function of ``q``: the program runs in evaluation mode, so dropout is off.

    Attributes:
        function: From ``q`` of shape ``(C, D)``, ``tensors`` and ``batch`` to the log-densities ``(C,)`` and their
            gradient ``(C, D)``: a graph of tensor operations.
        tensors: The program's tensors, which it reads.
        batch: The program's arguments.
        shapes: Shape of the unconstrained value of every latent site, ``(*plates, *event)``, in the order of ``q``.
        size: Number of coordinates, D.
        values: The latent sites' values at ``q``, each ``(C, *site)``.
    """

    function: Callable[[Tensor, list[Tensor], Batch], tuple[Tensor, Tensor]]
    tensors: list[Tensor]
    batch: Batch
    shapes: dict[str, torch.Size]
    size: int
    values: Callable[[Tensor], dict[str, Tensor]]

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities ``(C,)`` and gradients ``(C, D)`` at points ``(C, D)``."""
        return self.function(q, [x.detach() for x in self.tensors], self.batch)


def log_density(instance: ProgramInstance, batch: Batch, *, chains: int) -> LogDensity:
    """The log-density of a program's latents given data, in evaluation mode.

    Args:
        instance: The program; its parameters are constants.
        batch: Its arguments, observed ones included, on its device.
        chains: Number of points at which it is evaluated, C.

    Raises:
        ValueError: If a latent site is discrete or is summed out, or the model draws random numbers outside of its
            sample sites.
        Untraceable: If the program is not one sequence of tensor operations.

    References:
        Neal (2011), MCMC Using Hamiltonian Dynamics.

    Examples:
        A scale is positive; its logarithm is the coordinate:

        >>> import pyro.distributions as dist
        >>> from deepprob.programs.program import Program
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", 1):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> y = torch.zeros(1)
        >>> density = log_density(ProgramInstance(Program.of(model, "normal"), (y,), 1), (y,), chains=2)
        >>> value, gradient = density(torch.tensor([[0.0], [1.0]]))
        >>> round(float(value[1] - value[0]), 4)  # of log N(q | 0, 1) + log N(0 | 0, exp(q))
        -1.5
        >>> gradient.flatten().round(decimals=4).tolist()
        [-1.0, -2.0]
    """
    batch = tuple(x.clone() for x in batch)  # one tensor given twice would become one input
    rows, plates = torch.arange(num_rows(batch), device=instance.device), instance.structure.plates
    with torch.no_grad(), RandomStream(0, instance.device).drawing(), instance.evaluating():
        batch = instance.program.pad(instance.program.prepare(*batch))
        shapes = _shapes(Run(instance.program, batch, rows, len(rows), plates=plates))
    size = sum(shape.numel() for shape in shapes.values())
    layout = Layout(instance.program.row_plate, plates, chains)

    def run_at(q: Tensor, batch: Batch) -> tuple[_Unconstrained, Any]:
        handler = _Unconstrained(_slices(q, shapes), chains)
        run = Run(instance.program, batch, rows, len(rows), draws=chains, plates=plates)
        with run.bound(), run.stacked(), handler:
            return handler, poutine.trace(instance.program.model).get_trace(*batch)

    def evaluate(q: Tensor, tensors: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        q = q.detach().requires_grad_()
        with DeferredErrors() as errors, TraceableSites(), SkipValueChecks():
            handler, trace = run_at(q, batch)
            terms = [layout.total(site) for _, site in sample_sites(trace) if not is_deterministic(site)]
            density = errors.mark_nan(torch.stack([*terms, *handler.jacobians]).sum(0))
            (gradient,) = torch.autograd.grad(density.sum(), q)
        return density.detach(), gradient

    def values(q: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), instance.evaluating():
            _, trace = run_at(q, batch)
            return {name: layout.draws_first(trace.nodes[name]) for name in shapes}

    tensors = tensors_of(instance)
    example = torch.zeros(chains, size, device=instance.device)
    with instance.evaluating():
        try:
            with torch.no_grad(), NoDraws():  # type: ignore[no-untyped-call]
                run_at(example, batch)
        except RandomDraw as error:
            raise ValueError(
                f"the model draws random numbers outside of its sample sites, so its log-density is not a function of "
                f"its latents: {reason_of(error, [pyro])}. Draw them at pyro.sample, or give them as data."
            ) from error
        graph = trace_graph(evaluate, (example, tensors, batch), tensors, subject=subject_of(instance))
    return LogDensity(graph, tensors, batch, shapes, size, values)


class _Unconstrained(Messenger):
    """Sets latent sites from unconstrained values, and records the Jacobians.

    Args:
        given: Unconstrained values by site, chains first.
        chains: Number of chains.
    """

    def __init__(self, given: dict[str, Tensor], chains: int) -> None:
        super().__init__()
        self.given, self.chains = given, chains
        self.jacobians: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.given or msg["is_observed"]:
            return
        q, fn = self.given[msg["name"]], msg["fn"]
        transform = biject_to(fn.support)
        msg["value"] = value = transform(q)
        jacobian = transform.log_abs_det_jacobian(q, value)
        jacobian = sum_rightmost(jacobian, fn.event_dim - transform.codomain.event_dim)
        if msg["mask"] is not None:
            jacobian = torch.where(torch.as_tensor(msg["mask"]), jacobian, 0.0)
        self.jacobians.append(jacobian.reshape(self.chains, -1).sum(1))


def _shapes(run: Run) -> dict[str, torch.Size]:
    """Shapes of the latent sites' unconstrained values, from one run of the model."""
    with run.bound():
        trace = poutine.trace(run.program.model).get_trace(*run.batch)
    latent = {name: site for name, site in sample_sites(trace) if not site["is_observed"]}
    return {name: _shape(name, site, run.plates) for name, site in latent.items()}


def _shape(name: str, site: Site, plates: int) -> torch.Size:
    fn = site["fn"]
    if site["infer"].get("enumerate"):
        raise ValueError(f"site {name!r} is marked to be summed out, so it has no coordinate. Remove the mark.")
    if fn.support.is_discrete:
        raise ValueError(f"site {name!r} is discrete, so the log-density has no gradient. Use a continuous site.")
    missing = (1,) * (plates - len(fn.batch_shape))
    return torch.Size(missing + tuple(biject_to(fn.support).inverse_shape(fn.batch_shape + fn.event_shape)))


def _slices(q: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The unconstrained value of each site, ``(C, *plates, *event)``."""
    parts = q.split([shape.numel() for shape in shapes.values()], dim=1)
    return {name: part.reshape(len(q), *shapes[name]) for name, part in zip(shapes, parts, strict=True)}
