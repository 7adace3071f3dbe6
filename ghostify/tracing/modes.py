"""What a model does in training alone: heads for the loss, outputs for another loss. They read channels, too."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from ghostify.tracing.streams import Streams, find_streams
from ghostify.tracing.symbolic import trace_graph


def in_both_modes(streams: Streams, model: nn.Module, arguments: Collection[str]) -> Streams:
    """Fix the order of every stream that other layers make, carry or read in training, or that is fixed there.

    Args:
        streams: As they are in evaluation mode.
        model: The model; left as it was.
        arguments: As in [trace_graph][ghostify.tracing.symbolic.trace_graph].
    """
    try:
        trained = find_streams(trace_graph(model, arguments, training=True), model)
    except Exception:  # whatever FX or the model raises in training: nothing is known of it
        return replace(streams, fixed=frozenset(streams.sizes))
    if trained == streams:
        return streams
    uses, others = _uses(streams), _uses(trained)
    makers = {stream: frozenset(streams.makers(stream)) for stream in streams.sizes}
    parted = {stream for stream, names in makers.items() if names in uses and uses[names] != others.get(names)}
    return replace(streams, fixed=streams.fixed | parted)


def _uses(streams: Streams) -> dict[frozenset[str], set[object]]:
    """By the makers of every stream that is not fixed: who carries or reads it, and beside which others."""
    makers = {stream: frozenset(streams.makers(stream)) for stream in streams.sizes}
    rows = (*streams.carried_by.items(), *streams.read_by.items())
    return {
        names: {(name, tuple(makers[part] for part in row)) for name, row in rows if stream in row}
        for stream, names in makers.items()
        if stream not in streams.fixed
    }
