"""What a budget asks: its keys, and its values as fractions, as whole numbers or with a unit."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from fractions import Fraction

from ghostify.errors import OptionError

Budget = Mapping[str, float | str]
KEYS = ("macs", "params", "size_bytes", "latency")
# The solver counts in whole numbers; a table shows milliseconds.
MICROSECONDS = 1_000
_WITH_UNIT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(ms|%)\s*")


def check_budget_options(budget: Budget, keep: float | None, ratio: float | None) -> None:
    """Raise OptionError unless a budget has known keys and sound values, and alone decides the ratios."""
    if not isinstance(budget, Mapping) or not budget:
        raise OptionError(f"budget={budget!r} is not a dict of limits. Pass one such as {{'macs': 0.5}}.")
    for key, value in budget.items():
        check_limit(key, value)
    for name, other in (("keep", keep), ("ratio", ratio)):
        if other is not None:
            raise OptionError(
                f"budget={dict(budget)!r} and {name}={other!r} are both given, and each chooses the ratios. Pass one."
            )


def check_limit(key: str, value: float | str) -> None:
    """Raise OptionError unless a limit has a known key and a sound value."""
    told = f"budget={{{key!r}: {value!r}}}"
    if key not in KEYS:
        raise OptionError(f"{told}: the key is unknown. Use one or more of {', '.join(KEYS)}.")
    if isinstance(value, str):
        known = _WITH_UNIT.fullmatch(value)
        if known is None or not Fraction(known[1]):
            raise OptionError(f"{told} is no number above 0 with a unit. Write '50 %', or '0.8 ms' for latency.")
        if known[2] == "ms" and key != "latency":
            raise OptionError(f"{told} is a time. Pass 0.5 or '50 %' for half, or a whole number of {key}.")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise OptionError(f"{told} is no finite number above 0, such as 0.5 for half.")
    if value > 1 and value != int(value) and key != "latency":
        raise OptionError(
            f"{told} is neither a fraction of the original, up to 1, nor a whole number of {key}. Pass 0.5 for half."
        )


def absolute(key: str, value: float | str, total: int) -> int:
    """A limit as a whole number, latency in microseconds.

    Args:
        key: What is limited.
        value: As [plan][ghostify.plan] takes it, checked: a number is a fraction up to 1, above it as it is, latency
            in milliseconds; a text has the unit ``ms`` or ``%``.
        total: What the original has.
    """
    if isinstance(value, str):
        known = _WITH_UNIT.fullmatch(value)
        assert known is not None  # it is checked
        share, number = known[2] == "%", Fraction(known[1]) / (100 if known[2] == "%" else 1)
    else:
        # By its decimals: 0.29 of 100 are 29, though 0.29 * 100 is less in floating point.
        share = value <= 1
        number = Fraction(int(value)) if isinstance(value, numbers.Integral) else Fraction(str(float(value)))
    return math.floor(number * (total if share else MICROSECONDS if key == "latency" else 1))
