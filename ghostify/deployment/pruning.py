"""What a Ghost network is compared with: the original without some of its channels, by torch-pruning."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ghostify.conversion.norms import estimate_norms
from ghostify.errors import BudgetError, InputsError, OptionError
from ghostify.extras import require
from ghostify.tracing import trace
from ghostify.tracing.calibration import Calibration
from ghostify.tracing.counting import count_macs, count_params
from ghostify.tracing.example import Example, ExampleInputs, copier_memo
from ghostify.tracing.streams import Streams

_STEPS = 400  # so fine that the last one passes the MACs asked for by little
_MOST = 0.9  # of a layer's channels


def pruned(
    model: nn.Module, macs: int, *, example_inputs: ExampleInputs | Example, calibration: Calibration | None = None
) -> nn.Module:
    """Copy a model without its channels of least norm, so that its MACs have just come down to a number.

    By torch-pruning (Fang et al. 2023, arXiv 2301.12900): channels that go together are one group, and the groups of
    the whole network compete by their L2 norm. A layer loses output channels only where the graph tells every layer
    that reads them; a shortcut that is padded with zeros forbids it, as does the output. Nothing is trained.

    Args:
        model: Any model with a graph; left as found.
        macs: Multiply-accumulates of convolutions and linear layers, batch 1, that may be left.
        example_inputs: A batch ``(n, c, h, w)``, or arguments as a tuple or a dict.
        calibration: Images on which the statistics of batch norms are estimated anew; by default they stay.

    Returns:
        A smaller copy of the caller's own class, in evaluation mode.

    Raises:
        BudgetError: With a tenth of the channels that can go it would still have more MACs.
        InputsError: The model has no graph that tells which channels can go, or the inputs do not fit.
        MissingExtraError: The extra ``bench`` is not installed.
        OptionError: ``macs`` is no number of MACs.
        TraceError: The model does not run on the example inputs.
    """
    if isinstance(macs, bool) or not isinstance(macs, int) or macs < 1:
        raise OptionError(f"macs={macs!r} is not a whole number ≥ 1. Give the MACs that may be left.")
    pruning = require("torch_pruning", extra="bench")
    example = Example.of(example_inputs).to(model)
    facts = trace(model, example, lift=False)
    if facts.graph is None:
        raise InputsError(
            f"{type(model).__name__} has no graph that torch.fx can trace, so nobody can tell which channels go "
            "together. Prune it by hand, and compare with the result: others={'pruned': …}."
        )
    small = copy.deepcopy(facts.model, copier_memo(facts.model)).eval()
    one = example.part(0, 1) if example.separable else example
    with torch.inference_mode(False), torch.enable_grad():
        pruner = pruning.pruner.BasePruner(
            small.requires_grad_(True),
            one.args or one.kwargs,
            importance=pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=_MOST,
            max_pruning_ratio=_MOST,
            iterative_steps=_STEPS,
            ignored_layers=_staying(small, facts.streams),
        )
        left, params = count_macs(small, one).macs, count_params(small)
        for _ in range(_STEPS):
            if left <= macs:
                break
            pruner.step()
            if (now := count_params(small)) != params:  # most steps take nothing from a small network
                left, params = count_macs(small, one).macs, now
        else:
            raise BudgetError(
                f"macs={macs:,} is out of reach: torch-pruning leaves {type(model).__name__} {left:,} with a tenth of "
                "the channels that can go. Compare at a lower ratio."
            )
    if calibration is not None:
        estimate_norms(small, calibration)
    return small


def _staying(model: nn.Module, streams: Streams) -> list[nn.Module]:
    """Layers that keep all their output channels, because not all layers are known that read them."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear))
    return [
        layer
        for name, layer in layers
        if name not in streams.carried_by and streams.made_by.get(name) in (None, *streams.fixed)
    ]
