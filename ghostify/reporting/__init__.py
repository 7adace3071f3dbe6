"""Comparing the original and the converted model in plain numbers, and showing them."""

from ghostify.reporting.compare import compare
from ghostify.reporting.figures import Point
from ghostify.reporting.latency import LatencyOptions, measure_latency
from ghostify.reporting.report import (
    Accuracy,
    Environment,
    Latency,
    ModelNumbers,
    Pair,
    Report,
    Timing,
)

__all__ = [
    "Accuracy",
    "Environment",
    "Latency",
    "LatencyOptions",
    "ModelNumbers",
    "Pair",
    "Point",
    "Report",
    "Timing",
    "compare",
    "measure_latency",
]
