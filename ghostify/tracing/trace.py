"""The facts of a model: one recorded run of the real model, and its FX graph where FX can trace it.

Shapes, calls and MACs come from the run, so they are true of whatever runs. What follows a
convolution comes from the graph; where there is none, the facts say so and nothing is guessed.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ghostify.errors import PlanError, TraceError, first_line
from ghostify.nn.ghost import GhostConv
from ghostify.spec import Call, Site, TraceWay
from ghostify.tracing.counting import MacCount, counting
from ghostify.tracing.example import Example, ExampleInputs, unwrapped
from ghostify.tracing.execution import parted_answers, parted_in_training, run_graph
from ghostify.tracing.graph import calls_per_module, chain_after
from ghostify.tracing.lifting import FunctionalConvolutions, lift_functions
from ghostify.tracing.modes import in_both_modes
from ghostify.tracing.sites import is_separable, obstacle_to_replacing, own_facts, parameter_owners
from ghostify.tracing.streams import Streams, find_streams
from ghostify.tracing.symbolic import trace_graph


@dataclass(frozen=True)
class Trace:
    """A model and the facts about it.

    Attributes:
        model: The model itself, untouched.
        example: The example inputs.
        outputs: What the model made of them, in evaluation mode.
        sites: Every convolution, in order of first execution; those never called come last.
        graph: The FX graph, or ``None`` where FX cannot trace the model.
        note: Why there is no graph; empty if there is one.
        count: Multiply-accumulates of the model, batch 1.
        functional: Names of modules whose weights the model gives to convolutions that it calls as functions.
        lifted: Names of convolutions that the model called as functions; if there are any, ``model``
            is a ``torch.fx.GraphModule`` in which they are modules.
        unlifted: In this case the facts of the model as it is, if it holds convolutions that are modules.
        arguments: Names of the arguments of the model's forward that the example gives.
        streams: Which layers share an order of channels; nothing is known of that without a graph.
    """

    model: nn.Module
    example: Example
    outputs: Any
    sites: tuple[Site, ...]
    graph: fx.Graph | None
    note: str
    count: MacCount
    functional: tuple[str, ...] = ()
    lifted: tuple[str, ...] = ()
    unlifted: Trace | None = None
    arguments: tuple[str, ...] = ()
    streams: Streams = field(default_factory=Streams)

    @property
    def way(self) -> TraceWay:
        """``fx`` or ``recorded``."""
        return "recorded" if self.graph is None else "fx"

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def trace(model: nn.Module, example_inputs: ExampleInputs | Example | None, *, lift: bool = True) -> Trace:
    """Collect the facts about every convolution of a model.

    The model is run once on the example inputs, in evaluation mode and without gradients, and is
    left exactly as it was.

    Args:
        model: Any module that runs; torch's wrappers around it are taken off, see
            [unwrapped][ghostify.tracing.example.unwrapped].
        example_inputs: One batch; see [Example.of][ghostify.tracing.example.Example.of].
        lift: Whether convolutions that are called as functions are made modules, see
            [lift_functions][ghostify.tracing.lifting.lift_functions].

    Raises:
        InputsError: The example inputs are missing or hold no tensor.
        TraceError: The model does not run on them, or is a kind that has no Python modules to replace.
        PlanError: The model has no convolution at all.
    """
    example = Example.of(example_inputs)
    model = unwrapped(model)
    _check_kind(model)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    owners = parameter_owners(model)
    with FunctionalConvolutions(model, owners) as functional:
        calls, unusual, outputs, count = _record(model, convolutions, example, functional)
    arguments = example.names(model)
    graph, note = _graph_or_reason(model, arguments, convolutions, calls, example, outputs)
    inside = functional.owners - convolutions.keys()
    stays = ""  # why what is called as a function does
    if lift:
        facts, reason = _facts_of_lifted(model, graph, note, arguments, inside, example, outputs)
        computed = f"weights are computed (calls: {functional.computed})" if functional.computed else ""
        stays = "; ".join(filter(None, (reason, computed)))
        if facts is not None:
            if facts.functional or stays:
                some = ", ".join(name or "its own" for name in facts.functional)
                warnings.warn(
                    f"some convolutions that {type(model).__name__} calls as functions stay as they are: "
                    + (f"{some} ({stays})" if some and stays else some or stays),
                    stacklevel=2,
                )
            return replace(facts, unlifted=trace(model, example, lift=False) if convolutions else None)
    if not convolutions:
        raise PlanError(
            f"{type(model).__name__} has no convolution module, so there is nothing to replace. "
            "ghostify converts networks that hold torch.nn.Conv1d, Conv2d or Conv3d modules, transposed or not."
            + (f" What it calls as functions cannot be made modules: {stays}." if stays else "")
        )
    if stays:
        warnings.warn(
            f"convolutions that {type(model).__name__} calls as functions stay as they are: {stays}", stacklevel=2
        )
    nodes = _nodes_by_module(graph)
    units = [f"{name}." for name, module in model.named_modules() if isinstance(module, GhostConv)]
    sites = [
        _site(
            name,
            module,
            calls[name],
            "inside a Ghost unit"
            if name.startswith(tuple(units))
            else obstacle_to_replacing(name, module, owners) or unusual.get(name, ""),
            nodes.get(name),
            model,
            owners,
        )
        for name, module in convolutions.items()
    ]
    sites.sort(key=lambda site: (site.order < 0, site.order))
    streams = Streams() if graph is None else in_both_modes(find_streams(graph, model), model, arguments)
    return Trace(
        model,
        example,
        outputs,
        tuple(sites),
        graph,
        note,
        count,
        functional=tuple(sorted(inside)),
        arguments=arguments,
        streams=streams,
    )


def _facts_of_lifted(
    model: nn.Module,
    graph: fx.Graph | None,
    note: str,
    arguments: tuple[str, ...],
    owners: Collection[str],
    example: Example,
    outputs: Any,
) -> tuple[Trace | None, str]:
    """The facts of the model with modules in the place of functional convolutions, or why those that it has stay."""
    if graph is None:
        return None, f"there is no graph ({note})" if owners else ""
    try:
        lifted = lift_functions(model, graph, arguments, owners)
        if lifted is None:
            return None, "a weight is used more than once, or a bias or an option is computed" if owners else ""
        facts = trace(lifted.model, example, lift=False)
        parted = parted_answers(facts.outputs, outputs) or parted_in_training(model, lifted.model, example)
    except TraceError as error:
        return None, str(error)
    if parted:
        return None, parted
    return replace(facts, lifted=lifted.names, arguments=arguments), lifted.left


def lifted_as(model: nn.Module, arguments: Collection[str], names: Collection[str]) -> nn.Module:
    """The model in which functional convolutions are modules, without a run.

    Args:
        model: The model as it is; left untouched.
        arguments: What the example had given when the model was traced.
        names: Those that the convolutions had then.

    Raises:
        TraceError: There is no such model.
    """
    try:
        owners = {*names, *(name.rpartition(".")[0] for name in names)}
        lifted = lift_functions(model, trace_graph(model, arguments), arguments, owners)
    except TraceError as error:
        raise TraceError(
            f"convolutions that {type(model).__name__} calls as functions cannot be made modules: {error}. "
            "Pass the model that was planned."
        ) from error
    except Exception as error:  # whatever FX or the model's own code raises
        raise TraceError(
            f"FX cannot trace {type(model).__name__}: {first_line(error)}. Pass the model that was planned."
        ) from error
    if lifted is None:
        raise TraceError(
            f"{type(model).__name__} calls no convolution as a function, and the plan replaces some. "
            "Pass the model that was planned."
        )
    return lifted.model


def _check_kind(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"model is a {type(model).__name__}: its modules are compiled and cannot be replaced. "
            "Pass the Python model that it was made from."
        )
    for name, module in model.named_modules():
        quantised = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        # A FloatFunctional only marks an addition of a float model that could be quantised.
        if quantised and not isinstance(module, torch.ao.nn.quantized.FloatFunctional):
            raise TraceError(
                f"module {name!r} is a quantised {type(module).__name__}, whose weights cannot be split. "
                "Convert the float model that it was made from, then quantise the result."
            )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise TraceError(
                f"{name!r} is lazy and has no shape yet. Run the model once on real inputs, then convert it."
            )


def _record(
    model: nn.Module, convolutions: dict[str, _ConvNd], example: Example, functional: FunctionalConvolutions
) -> tuple[dict[str, list[tuple[int, Call]]], dict[str, str], Any, MacCount]:
    """Run the model once: every call of every convolution with its position, unusual calls, the outputs, the MACs."""
    calls: dict[str, list[tuple[int, Call]]] = defaultdict(list)
    unusual: dict[str, str] = {}
    position = 0
    handles = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        functional.inside += 1

    for name, module in convolutions.items():
        handles.append(module.register_forward_pre_hook(enter))

        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
        ) -> None:
            nonlocal position
            functional.inside -= 1
            read = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if len(args) != 1 or kwargs or read is None or not isinstance(output, Tensor):
                unusual[name] = "it is called in another way than conv(x)"
            if read is not None and isinstance(output, Tensor):
                batched = output.dim() == len(module.kernel_size) + 2  # type: ignore[arg-type]
                start = 1 if batched else 0
                # A single map is one row, as when a model goes through its batch image by image.
                rows = (output.shape[0] if batched else 1) / example.batch
                calls[name].append((position, Call(tuple(read.shape[start:]), tuple(output.shape[start:]), rows)))
                position += 1

        # First in line, so that a hook of the user's that changes the output is not what is recorded.
        handles.append(module.register_forward_hook(record, prepend=True, with_kwargs=True))
    try:
        with counting(model, example) as count:
            outputs = example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls, unusual, outputs, count


def _graph_or_reason(
    model: nn.Module,
    arguments: Collection[str],
    convolutions: dict[str, _ConvNd],
    calls: dict[str, list[tuple[int, Call]]],
    example: Example,
    outputs: Any,
) -> tuple[fx.Graph | None, str]:
    """The FX graph if FX can trace, and calls and outputs are those that were recorded; else why not."""
    try:
        graph = trace_graph(model, arguments)
    except Exception as error:
        return None, first_line(error)
    in_graph = calls_per_module(graph)
    for name in convolutions:
        if in_graph[name] != len(calls[name]):
            return None, f"its graph calls {name} {in_graph[name]} times, the run {len(calls[name])} times"
    parted = run_graph(graph, model, example, outputs)
    return (None, parted) if parted else (graph, "")


def _site(
    name: str,
    module: _ConvNd,
    calls: list[tuple[int, Call]],
    obstacle: str,
    nodes: _Nodes | None,
    model: nn.Module,
    owners: dict[int, list[str]],
) -> Site:
    if nodes is not None and nodes.read_directly:
        obstacle = obstacle or "its weight is read directly, not only by calling it"
    if not obstacle and any(call.output_shape[0] != module.out_channels for _, call in calls):
        obstacle = f"its forward makes other than its {module.out_channels} channels"
    if not obstacle and calls and not is_separable(module, calls[0][1]):
        obstacle = "some of its filters alone give other maps than they give together"
    return Site(
        name=name,
        **own_facts(module),
        calls=tuple(call for _, call in calls),
        order=min((position for position, _ in calls), default=-1),
        obstacle=obstacle,
        chain=chain_after(nodes.calls[0], model, nodes.calls_per_module, owners)
        if nodes is not None and len(nodes.calls) == 1
        else None,
    )


@dataclass
class _Nodes:
    """What the graph holds of one convolution."""

    calls_per_module: Counter[str]
    calls: list[fx.Node] = field(default_factory=list)
    read_directly: bool = False


def _nodes_by_module(graph: fx.Graph | None) -> dict[str, _Nodes]:
    if graph is None:
        return {}
    calls = calls_per_module(graph)
    found: dict[str, _Nodes] = defaultdict(lambda: _Nodes(calls))
    for node in graph.nodes:
        if node.op == "call_module":
            found[str(node.target)].calls.append(node)
        elif node.op == "get_attr":
            found[str(node.target).rpartition(".")[0]].read_directly = True
    return found
