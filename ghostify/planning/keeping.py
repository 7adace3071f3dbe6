"""Ratios by quality: every site gets the largest ratio at which enough of its output can still be expressed."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ghostify.errors import InputsError, OptionError
from ghostify.planning.choice import choose_layout
from ghostify.planning.explained import kept_share, site_shares
from ghostify.planning.white import white_shares
from ghostify.spec import Decision, GhostSpec
from ghostify.tracing import Example, Trace

RATIOS = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0)


def check_keep_options(keep: float, ratio: float | None, calibrated: bool) -> None:
    """Raise OptionError unless ``keep`` is a share that can be measured, and alone decides the ratios."""
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real) or not 0 < keep <= 1:
        raise OptionError(
            f"keep={keep!r} is no share of a layer's variance: pass a number above 0 and at most 1, such as 0.98."
        )
    if ratio is not None:
        raise OptionError(f"keep={keep!r} and ratio={ratio!r} are both given, and keep chooses the ratios. Pass one.")
    if not calibrated:
        raise OptionError(f"keep={keep!r} needs calibration inputs. Pass calibration=images (a few hundred).")


def measured(
    options: Sequence[Sequence[Decision]], spec: GhostSpec, facts: Trace, chunks: list[Example]
) -> list[list[Decision]]:
    """Measure for every site what each of its ratios could still express.

    Args:
        options: For every site its decisions in the order of ``RATIOS``; one alone is taken as it is.
        spec: Gives all but the ratio.
        facts: The original with its facts.
        chunks: Calibration inputs; if there are none, the weights alone tell.

    Returns:
        For every site the ratios that are possible, with ``explained``; one decision without it where nothing is open.

    Raises:
        InputsError: Weights or inputs hold numbers that are not finite.
    """
    open_sites = [some[0].site for some in options if len(some) > 1 and any(option.replaced for option in some)]
    if chunks:
        shares = {site.name: explained for site, explained in site_shares(facts, open_sites, spec, chunks)}
    else:
        shares = {site.name: white_shares(facts, site) for site in open_sites}
    for name, explained in shares.items():
        if not explained.isfinite().all():
            raise InputsError(
                f"What {name} of {type(facts.model).__name__} makes is not finite: its weights"
                f"{' or the calibration inputs' if chunks else ''} hold NaN or infinite numbers. Load sound ones."
            )
    unseen = {site.name for site in open_sites} - shares.keys()
    found = []
    for some in options:
        name = some[0].site.name
        if name in shares:
            found.append([_with_share(option, shares[name]) for option in some if option.replaced])
        else:
            found.append([_as_it_is(some[0], "not reached by the calibration inputs") if name in unseen else some[0]])
    return found


def with_ratios(options: Sequence[Sequence[Decision]], keep: float) -> list[Decision]:
    """Choose for every site the largest ratio that leaves enough of it.

    Args:
        options: From [measured][ghostify.planning.keeping.measured].
        keep: The share of a layer's variance that must be left.
    """
    chosen = []
    for some in options:
        enough = [option for option in some if option.explained is None or option.explained >= keep]
        chosen.append(enough[-1] if enough else kept(some))
    return chosen


def kept(some: Sequence[Decision]) -> Decision:
    """The decision to leave a site as it is, though some ratios are possible: told is what the best of them keeps."""
    nearest = max(some, key=lambda option: option.explained or 0.0)
    assert nearest.spec is not None  # they are ratios
    return _as_it_is(nearest, f"would keep {nearest.explained:.1%} at ratio {nearest.spec.ratio:g}".replace("%", " %"))


def _as_it_is(made: Decision, reason: str) -> Decision:
    return replace(
        made,
        spec=None,
        reason=reason,
        params_after=made.params_before,
        macs_after=made.macs_before,
        explained=None,
        damage=None,
    )


def _with_share(option: Decision, explained: Tensor) -> Decision:
    spec, groups = option.spec, option.site.groups
    assert spec is not None  # only ratios are measured
    return replace(option, explained=kept_share(explained, choose_layout(explained, spec, groups), spec, groups))
