"""Estimating the statistics of batch norms anew, on unlabelled images.

It is what a start without images needs: of fresh filters the norms' statistics know nothing. A start
with images has no use for it, because there the norms carry the original's statistics (docs/initialisation.md).
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghostify.conversion.fitting import running_mean
from ghostify.errors import InputsError
from ghostify.tracing import evaluating
from ghostify.tracing.calibration import MOST_IMAGES, Calibration, calibration_chunks

# As far as this from mean 0 and variance 1 is what is left where a norm's statistics were folded away.
_EXACT = 1e-6


def estimate_norms(model: nn.Module, calibration: Calibration, *, images: int = MOST_IMAGES) -> tuple[str, ...]:
    """Replace the statistics of every batch norm by those of the given images.

    Means and variances are averaged over the batches, each norm seeing what the norms before it
    make of a batch (as in training). Nothing else of the model changes, and no gradient is taken.

    Args:
        model: Any model; its batch norms are changed in place. Norms without statistics stay.
        calibration: A tensor ``(n, c, h, w)`` or an iterable of batches, as [apply][ghostify.apply] takes
            them. Batches should be as large as in training: of a single example there is no variance.
        images: How many examples are enough.

    Returns:
        The names of the norms that looked folded: mean 0 and variance 1 in every channel, as where
        scale and shift had been moved into the convolution before. They are warned of: after this
        they normalise what they let pass before.

    Raises:
        InputsError: There are no images, a single one, or some that are no numbers.

    Example:
        >>> layers = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1))
        >>> _ = layers[0].running_mean.fill_(5), layers[1].running_var.fill_(2)
        >>> estimate_norms(layers, 3 + torch.randn(64, 1, 8, 8))
        ()
        >>> round(layers[0].running_mean.item())
        3
    """
    chunks = calibration_chunks(calibration, model, images)
    if not chunks or min(chunk.batch for chunk in chunks) < 2:
        raise InputsError("calibration has a batch of fewer than 2 examples, of which there is no variance.")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    folded = tuple(name for name, norm in norms.items() if looks_folded(norm))
    if folded:
        warnings.warn(
            f"{len(folded)} of {len(norms)} batch norms hold mean 0 and variance 1 in every channel "
            f"({', '.join(folded[:5])}{', …' if len(folded) > 5 else ''}): they look folded into the layers before "
            "them, or were never trained. From now on they normalise what they let pass before.",
            stacklevel=2,
        )
    before = [(norm, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms.values()]
    with evaluating(model), torch.no_grad():
        try:
            for norm, _, _ in before:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over batches
                norm.train()
            for chunk in chunks:
                fresh = chunk.copied()
                model(*fresh.args, **fresh.kwargs)
        except BaseException:
            for norm, _, state in before:
                norm.load_state_dict(state)
            raise
        finally:
            for norm, momentum, _ in before:
                norm.momentum = momentum
    return folded


def looks_folded(norm: nn.Module) -> bool:
    """Whether a norm's statistics are mean 0 and variance 1 in every channel, so that they change nothing."""
    mean, variance = running_mean(norm), getattr(norm, "running_var", None)
    if mean is None or not isinstance(variance, torch.Tensor):
        return False
    return bool(mean.abs().max() <= _EXACT and (variance - 1).abs().max() <= _EXACT)
