"""How the channels of every Ghost unit get where they belong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ghostify.spec import ChannelOrder, Decision
from ghostify.tracing import Streams


def with_orders(decisions: Sequence[Decision], streams: Streams, *, share: bool = True) -> tuple[Decision, ...]:
    """Say how the channels of every Ghost unit get where they belong; see [Decision][ghostify.spec.Decision].

    One order is possible for every stream. It is that of one unit, if it makes more of the stream than
    all other units together (those of a gate, say); else the units that are alike share one. Other
    makers follow, if their groups let them.

    Args:
        decisions: For every site.
        streams: From the graph.
        share: Whether units may share an order, which costs each some of its choice.
    """
    numbers = {made.site.name: sum(math.prod(call.output_shape) for call in made.site.calls) for made in decisions}
    orders: dict[str, ChannelOrder] = {made.site.name: "index" for made in decisions if made.replaced}
    bound = {made.site.name for made in decisions if made.site.groups > 1}
    together: dict[int, list[Decision]] = {}
    for made in decisions:
        stream = streams.made_by.get(made.site.name)
        if made.replaced and stream is not None and stream not in streams.fixed:
            together.setdefault(stream, []).append(made)
    for stream, units in together.items():
        largest = max(units, key=lambda made: numbers[made.site.name])
        total = sum(numbers[made.site.name] for made in units)
        (usual, _), *_ = Counter(made.spec for made in units).most_common(1)
        alike = [made for made in units if made.spec == usual]
        if 2 * numbers[largest.site.name] > total:
            if not bound & {*streams.makers(stream)} - {largest.site.name}:
                orders[largest.site.name] = "folded"
        elif share and len(alike) > 1 and not bound & {*streams.makers(stream)}:
            orders |= {made.site.name: "shared" for made in alike}
    return tuple(replace(made, order=orders.get(made.site.name, "")) for made in decisions)
