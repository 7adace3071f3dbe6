"""Carrying out a plan: replacing modules, and starting the new ones from the old weights."""

from ghostify.conversion.calibration import Calibration
from ghostify.conversion.initialisers import INITIALISERS, Conversion, Initialiser
from ghostify.conversion.rewriter import apply, as_planned, check_fits, convert, rebuild

__all__ = [
    "INITIALISERS",
    "Calibration",
    "Conversion",
    "Initialiser",
    "apply",
    "as_planned",
    "check_fits",
    "convert",
    "rebuild",
]
