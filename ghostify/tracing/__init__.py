"""Facts about a model's convolutions: where they are called, with which shapes, and what follows them."""

from ghostify.tracing.counting import MacCount, count_macs, count_params, state_bytes
from ghostify.tracing.example import (
    Example,
    ExampleInputs,
    copier_memo,
    difference,
    on_meta,
    same_shapes,
    shapes_of,
    tensors_in,
    unwrapped,
)
from ghostify.tracing.running import evaluating, own_random_state, seed_torch, unmarked
from ghostify.tracing.sites import fingerprint, is_site
from ghostify.tracing.streams import Streams
from ghostify.tracing.trace import Trace, lifted_as, trace

__all__ = [
    "Example",
    "ExampleInputs",
    "MacCount",
    "Streams",
    "Trace",
    "copier_memo",
    "count_macs",
    "count_params",
    "difference",
    "evaluating",
    "fingerprint",
    "is_site",
    "lifted_as",
    "on_meta",
    "own_random_state",
    "same_shapes",
    "seed_torch",
    "shapes_of",
    "state_bytes",
    "tensors_in",
    "trace",
    "unmarked",
    "unwrapped",
]
