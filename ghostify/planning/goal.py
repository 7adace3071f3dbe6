"""What decides the ratios of a plan, if a fixed one does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ghostify.backends.runners import Backend, backend_installed
from ghostify.errors import OptionError
from ghostify.planning.keeping import check_keep_options
from ghostify.planning.limits import Budget, check_budget_options
from ghostify.tracing import Example

_SENSITIVITIES = ("explained", "measured")


@dataclass(frozen=True)
class Goal:
    """What decides the ratios, if a fixed one does not.

    Attributes:
        keep: As [plan][ghostify.plan] takes it.
        budget: As [plan][ghostify.plan] takes it.
        backend: On which every replaced site must pay, and latency is measured.
        sensitivity: As [plan][ghostify.plan] takes it.
        chunks: Calibration inputs; those of a fixed ratio are not looked at.
    """

    keep: float | None = None
    budget: Budget | None = None
    backend: Backend | None = None
    sensitivity: str = "explained"
    chunks: Sequence[Example] = ()

    @staticmethod
    def of(
        keep: float | None,
        budget: Budget | None,
        backend: Backend | str | None,
        sensitivity: str,
        ratio: float | None,
        chunks: Sequence[Example],
    ) -> Goal:
        """The goal from the arguments of [plan][ghostify.plan].

        Raises:
            OptionError: They contradict each other, or one cannot be used.
            MissingExtraError: The backend is not installed.
        """
        check_goal(keep, budget, backend, sensitivity, ratio, calibrated=bool(chunks))
        if backend is None and budget is not None and "latency" in budget:
            backend = Backend()
        backend = None if backend is None else Backend.of(backend)
        if backend is not None:
            backend_installed(backend.name)  # before anything that takes minutes
        return Goal(keep, budget, backend, sensitivity, chunks)


def check_goal(
    keep: float | None,
    budget: Budget | None,
    backend: Backend | str | None,
    sensitivity: str,
    ratio: float | None,
    *,
    calibrated: bool,
) -> None:
    """Raise OptionError if arguments of [plan][ghostify.plan] contradict each other, or one cannot be used.

    Args:
        keep: As [plan][ghostify.plan] takes it, and so are those that follow.
        budget: The same.
        backend: The same.
        sensitivity: The same.
        ratio: The same.
        calibrated: Whether there are calibration inputs.
    """
    if sensitivity not in _SENSITIVITIES:
        raise OptionError(f"sensitivity={sensitivity!r} is unknown. Use one of {', '.join(_SENSITIVITIES)}.")
    if sensitivity == "measured" and (budget is None or not calibrated):
        raise OptionError("sensitivity='measured' needs a budget, and calibration inputs to measure on.")
    if budget is not None:
        check_budget_options(budget, keep, ratio)
    elif backend is not None:
        raise OptionError(f"backend={backend!r} is given without a budget. Pass one, such as {{'latency': 0.7}}.")
    elif keep is not None:
        check_keep_options(keep, ratio, calibrated)
