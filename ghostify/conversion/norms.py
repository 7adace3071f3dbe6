"""Estimating the statistics of batch norms anew, on unlabelled images.

It is what a start needs that follows no drift (``random``, ``first``, ``weights``, ``least-squares``).
``sequential`` and ``alternating`` fit their units to the original's statistics, and have no use for it
(docs/initialisation.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ghostify.errors import InputsError
from ghostify.tracing import seed_torch, unmarked
from ghostify.tracing.calibration import MOST_IMAGES, Calibration, calibration_chunks

# Statistics as near to mean 0 and variance 1 as this are what is left where a norm was folded away.
_TOLERANCE = 1e-6


def estimate_norms(model: nn.Module, calibration: Calibration, *, images: int = MOST_IMAGES) -> tuple[str, ...]:
    """Replace the statistics of every batch norm by those of the given images.

    Means and variances are averaged over the batches, every example counting alike; each norm sees
    what the norms before it make of a batch, as in training. Nothing else of the model changes, no
    gradient is taken, and norms that the images do not reach keep what they know.

    Args:
        model: Any model; torch's batch norms with statistics are changed in place, frozen ones too.
        calibration: A tensor ``(n, c, h, w)`` or an iterable of batches, as [apply][ghostify.apply] takes
            them. A tensor is split into batches of up to 64.
        images: How many examples are enough.

    Returns:
        The names of the norms that looked folded: mean 0 and variance 1 in every channel, as where
        the statistics had been moved into the convolution before. They are warned of: after this
        they normalise what they only scaled before.

    Raises:
        InputsError: There are no images, some are no numbers, or a norm gets a single number of a
            channel, of which there is no variance.

    Example:
        >>> layers = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1))
        >>> _ = layers[0].running_mean.fill_(5), layers[1].running_var.fill_(2)
        >>> estimate_norms(layers, 3 + torch.randn(64, 1, 8, 8))
        ()
        >>> round(layers[0].running_mean.item())
        3
    """
    chunks = calibration_chunks(calibration, model, images, whole=True)
    if not chunks:
        raise InputsError("calibration=None: there is nothing to estimate norms from. Pass images (n, c, h, w).")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and _has_statistics(module)
    }
    folded = tuple(name for name, norm in norms.items() if looks_folded(norm))
    if folded:
        warnings.warn(
            f"{len(folded)} of {len(norms)} batch norms hold mean 0 and variance 1 in every channel "
            f"({', '.join(folded[:5])}{', …' if len(folded) > 5 else ''}): they look folded into the layers before "
            "them, or were never trained. From now on they normalise what they only scaled before.",
            stacklevel=2,
        )
    totals: dict[str, list[Tensor]] = {}
    with unmarked(model), torch.no_grad():  # also takes the hooks off
        seed_torch(0, model)  # for a model that draws random numbers
        for name, norm in norms.items():
            norm.training, norm.momentum = True, 1.0  # it holds the statistics of the last batch alone
            norm.num_batches_tracked = None
            norm.register_forward_hook(_adder(totals.setdefault(name, [])))
        for chunk in chunks:
            fresh = chunk.copied()
            try:
                model(*fresh.args, **fresh.kwargs)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise InputsError(f"calibration has a batch too small for a batch norm: {error}") from error
    with torch.no_grad():
        for name, norm in norms.items():
            if totals[name]:
                count, mean, variance = totals[name]
                norm.running_mean.copy_(mean / count)  # type: ignore[union-attr]  # it has statistics
                norm.running_var.copy_(variance / count)  # type: ignore[union-attr]
    return folded


def _adder(total: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that adds what a norm has just seen, every example counting alike: count, means, variances."""

    def add(norm: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(norm, _BatchNorm)  # it is registered on nothing else
        assert norm.running_mean is not None
        assert norm.running_var is not None
        count = len(args[0])
        seen = [torch.tensor(count), count * norm.running_mean.double(), count * norm.running_var.double()]
        total[:] = [a + b for a, b in zip(total, seen, strict=True)] if total else seen

    return add


def _has_statistics(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None and not is_lazy(norm.running_mean)


def looks_folded(norm: _BatchNorm) -> bool:
    """Whether a norm's statistics are mean 0 and variance 1 in every channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return bool(norm.running_mean.abs().max() <= _TOLERANCE and (norm.running_var - 1).abs().max() <= _TOLERANCE)
