"""Why a convolution is kept.

Each rule is a plain function from the facts of a site to a reason, or to an empty string if the
rule has nothing against it. ``OBSTACLES`` cannot be overruled: replacing the module would be wrong
or pointless. ``HABITS`` are what experience recommends; naming the site in ``overrides`` overrules them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ghostify.planning.cost import conv_macs, ghost_macs, ghost_params
from ghostify.spec import Decision, GhostSpec, Site

_MOST_TOLD = 5
Rule = Callable[[Site], str]


def cannot_be_replaced(site: Site) -> str:
    """The module's meaning would change."""
    return site.obstacle


def never_called(site: Site) -> str:
    """Nothing is known of it."""
    return "" if site.calls else "not reached by the example inputs"


def called_differently(site: Site) -> str:
    """Its gain would differ from call to call."""
    return f"called {len(site.calls)} times with different shapes" if len(set(site.calls)) > 1 else ""


def depthwise(site: Site) -> str:
    """It is a cheap operation already: one input channel for every output."""
    return "depthwise: cheap already" if site.groups > 1 and site.groups == site.in_channels else ""


def first_layer(site: Site) -> str:
    """It reads the image, has few channels to draw on, and costs little."""
    return "first layer" if site.order == 0 else ""


def output_layer(site: Site) -> str:
    """Its channels are the answers themselves; one answer is not a filtered copy of another."""
    return "output layer" if site.chain is not None and site.chain.is_output else ""


OBSTACLES: tuple[Rule, ...] = (cannot_be_replaced, never_called, depthwise, called_differently)
HABITS: tuple[Rule, ...] = (first_layer, output_layer)


def saves_nothing(site: Site, spec: GhostSpec, macs: int | None = None) -> str:
    """Whether the unit would cost as much as the convolution or more, in parameters or in MACs.

    Args:
        site: The facts.
        spec: The unit.
        macs: MACs of the convolution if they are known already.
    """
    macs = conv_macs(site) if macs is None else macs
    if spec.intrinsic_channels(site.out_channels, site.groups) == site.out_channels:
        per_group = site.out_channels // site.groups
        return f"too few channels: {per_group} a group at ratio {spec.ratio:g} leaves no ghost"
    if ghost_params(site, spec) >= site.params:
        return f"too small to pay: {site.params:,} parameters would become {ghost_params(site, spec):,}"
    if ghost_macs(site, spec) >= macs:
        return f"too small to pay: {macs:,} MACs would become {ghost_macs(site, spec):,}"
    return ""


def reasons_told(decisions: Iterable[Decision]) -> str:
    """The reasons that most sites are kept for, each with their number."""
    counted = Counter(made.reason for made in decisions if not made.replaced)
    return ", ".join(f"{reason} ({count})" for reason, count in counted.most_common(_MOST_TOLD))
