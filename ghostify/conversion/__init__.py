"""Carrying out a plan: replacing modules, and starting the new ones from the old weights."""

from ghostify.conversion.fits import Fit
from ghostify.conversion.initialisers import INITIALISERS, Conversion, Initialiser, check_initialiser
from ghostify.conversion.norms import estimate_norms
from ghostify.conversion.rewriter import apply, as_planned, check_fits, convert, rebuild
from ghostify.tracing.calibration import Calibration

__all__ = [
    "INITIALISERS",
    "Calibration",
    "Conversion",
    "Fit",
    "Initialiser",
    "apply",
    "as_planned",
    "check_fits",
    "check_initialiser",
    "convert",
    "estimate_norms",
    "rebuild",
]
