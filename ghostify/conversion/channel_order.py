"""Channel order at no cost: what reads a Ghost unit's channels takes them as they come.

The chosen intrinsic channels are not the first ones, so a unit makes its channels in an order of
its own, and would have to put them back by an index each time it runs. Where the plan says
``folded`` or ``shared``, the norms, depthwise convolutions and readers that follow are permuted instead, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghostify.errors import ConversionError, PlanMismatchError
from ghostify.nn.ghost import GhostConv
from ghostify.planning.choice import Choice, choose_layout
from ghostify.spec import Decision, Plan
from ghostify.tracing import Streams, Trace, tensors_in

# Sums in another order differ by rounding, and a deep network carries that on.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE = 0.1


@torch.no_grad()
def fold_orders(student: nn.Module, plan: Plan, facts: Trace) -> None:
    """Permute what follows the folded sites, so that these need no index; checked by running both forms.

    Args:
        student: The converted model, started, in evaluation mode; changed in place.
        plan: Says which sites are folded.
        facts: Of the original: who reads whose channels.

    Raises:
        PlanMismatchError: This model's graph does not show that a site can be folded.
        ConversionError: The outputs are not the same afterwards.
    """
    streams = facts.streams
    orders: dict[int, Tensor] = {}
    for decision in plan.replaced:
        if decision.order in ("folded", "shared"):
            name = decision.site.name
            stream = streams.made_by.get(name)
            if stream is None or stream in streams.fixed:
                raise PlanMismatchError(
                    f"site={name!r} is to have its channel order folded into the layers after it, and in this model's "
                    "graph these are not all known. Make a new plan for it."
                )
            # Units that share an order have one layout; if a start gave them others, those keep an index.
            orders.setdefault(stream, _unit(student, name).layout())
    orders = {stream: order for stream, order in orders.items() if not torch.equal(order, torch.arange(len(order)))}
    if not orders:
        return
    before = facts.example.run(student)
    _permute(student, streams, orders)
    _compare(before, facts.example.run(student))


def shared_choices(
    decisions: Mapping[str, Decision], streams: Streams, explained: Mapping[str, Tensor]
) -> dict[str, Choice]:
    """One choice of channels for all units that share an order: the one that keeps most of what they make together.

    Args:
        decisions: By site.
        streams: From the graph.
        explained: By site, how much of each channel a cheap filter on each other one explains, ``(n, n)``,
            weighted by the norm after the layer, so that it counts as it does in the sum.
    """
    together: dict[int, list[str]] = {}
    for name, decision in decisions.items():
        if decision.order == "shared" and name in streams.made_by and name in explained:
            together.setdefault(streams.made_by[name], []).append(name)
    choices: dict[str, Choice] = {}
    for names in together.values():
        spec = decisions[names[0]].spec
        assert spec is not None  # of a Ghost unit
        layout = choose_layout(torch.stack([explained[name] for name in names]).sum(0), spec)
        choices |= {name: Choice(explained[name], layout) for name in names}
    return choices


def _permute(student: nn.Module, streams: Streams, orders: dict[int, Tensor]) -> None:
    for name, stream in streams.made_by.items():
        if stream in orders:
            module = student.get_submodule(name)
            if isinstance(module, GhostConv):
                module.emit(orders[stream])
            else:
                _permute_outputs(module, orders[stream])
    for name, carried in streams.carried_by.items():
        if orders.keys() & set(carried):
            _permute_outputs(student.get_submodule(name), _in_a_row(carried, streams, orders))
    for name, read in streams.read_by.items():
        if orders.keys() & set(read):
            module = student.get_submodule(name)
            reader = module.primary_conv if isinstance(module, GhostConv) else module
            _permute_inputs(reader, _in_a_row(read, streams, orders))


def _in_a_row(row: tuple[int, ...], streams: Streams, orders: dict[int, Tensor]) -> Tensor:
    """The order of several streams in a row."""
    parts, start = [], 0
    for stream in row:
        size = streams.sizes[stream]
        parts.append(start + orders.get(stream, torch.arange(size)))
        start += size
    return torch.cat(parts)


def _permute_outputs(module: nn.Module, order: Tensor) -> None:
    """Reorder all that a module holds for every channel."""
    transposed = isinstance(module, _ConvNd) and module.transposed and module.groups == 1
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        dim = 1 if transposed and name == "weight" else 0
        if tensor.numel() > 1:
            tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _permute_inputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the weight's columns; of a linear layer behind a flattened map, several in a row for every channel."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # a convolution's or linear layer's
    dim = 0 if isinstance(module, _ConvNd) and module.transposed else 1
    run = weight.shape[dim] // len(order)
    columns = (order[:, None] * run + torch.arange(run)).flatten()
    weight.copy_(weight.index_select(dim, columns.to(weight.device)))


def _compare(before: Any, after: Any) -> None:
    for old, new in zip(tensors_in(before), tensors_in(after), strict=True):
        if not old.is_floating_point() or old.is_meta:
            continue
        known = torch.isfinite(old)
        largest = float(old[known].abs().max()) if known.any() else 0.0
        apart = float((new - old)[known].abs().max()) if known.any() else 0.0
        if not apart <= _TOLERANCES.get(old.dtype, _COARSE) * max(largest, 1e-6):
            raise ConversionError(
                f"Folding the channel order into the layers that follow changed the outputs by {apart:.3g}, of "
                f"{largest:.3g} at most. Please report the model; a plan with order='index' at every site converts it."
            )


def _unit(student: nn.Module, name: str) -> GhostConv:
    unit = student.get_submodule(name)
    assert isinstance(unit, GhostConv)  # what the plan put there
    return unit
