"""What an error in a site's channels costs at the network's output.

Small errors ``e`` of a layer's output change the distribution that the network answers by about
``½ · Σ eᵀ G e`` (Kullback-Leibler divergence), summed over the pixels as if they were independent.
``G = Jᵀ H J`` with ``J`` the derivative of the logits by the layer's output and ``H`` the
divergence's curvature: the factor that K-FAC keeps of a layer's output (Martens and Grosse 2015,
arXiv 1503.05671, §3; for convolutions Grosse and Martens 2016, arXiv 1602.01407). It takes one
backward pass for every image, and no labels. The distribution is softened as in distillation, or
the few images of which a trained network is not sure would decide alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.spec import Decision, Plan
from ghostify.tracing import Example, seed_torch, tensors_in, unmarked

# Of Hinton et al. 2015, arXiv 1503.02531.
_TEMPERATURE = 4.0
# The matrix is estimated on few images; its diagonal is surer than the rest.
_DIAGONAL_SHARE = 0.1
# How much a channel counts at least, as a share of the mean, though the output hardly depends on it.
_LEAST_WEIGHT = 1e-3
# Examples on which it is estimated: fewer where their maps hold more numbers than so many, but some.
_IMAGES, _NUMBERS, _FEWEST_IMAGES = 256, 1_000_000_000, 64
# Bytes for the activations that one backward pass goes through.
_MEMORY = 2**29
# Numbers that a backward pass keeps for every one that a convolution makes: its own, a norm's, an activation's.
_KEPT = 3


def channel_metrics(
    model: nn.Module, plan: Plan, chunks: list[Example], generator: torch.Generator
) -> dict[str, Tensor]:
    """What errors of a site's output channels cost together, averaged over images and pixels.

    Args:
        model: The original; run in evaluation mode, and left as it was.
        plan: Names the sites.
        chunks: Calibration inputs, of which the first few hundred are used.
        generator: Draws directions in the space of outputs.

    Returns:
        ``(n, n)`` for every site, the mean of the diagonal 1; nothing for sites that gradients do not
        reach, or if the model has none.
    """
    sums: dict[str, Tensor] = {}
    outputs: list[tuple[Decision, Tensor]] = []
    handles = []
    for decision in plan.replaced:

        def keep(module: nn.Module, args: Any, output: Tensor, decision: Decision = decision) -> Tensor:
            watched = output if output.requires_grad else output.detach().requires_grad_()
            outputs.append((decision, watched))
            return watched.clone()  # what follows may work in place

        handles.append(model.get_submodule(decision.site.name).register_forward_hook(keep))
    try:
        with unmarked(model), torch.inference_mode(False), torch.enable_grad():
            seed_torch(0, model)  # for a model that draws random numbers
            numbers = sum(math.prod(call.output_shape) * call.rows for made in plan for call in made.site.calls)
            images = min(_IMAGES, max(_FEWEST_IMAGES, int(_NUMBERS / max(1, numbers))))
            for example in _small(chunks, images, most=max(1, int(_MEMORY / (4 * _KEPT * numbers)))):
                outputs.clear()
                made = model(*example.args, **example.kwargs)
                loss = _drawn(made, generator)
                kept = list(outputs)  # what a checkpoint computes again, in the backward pass, is kept again
                gradients = torch.autograd.grad(loss, [output for _, output in kept], allow_unused=True)
                for (decision, _), gradient in zip(kept, gradients, strict=True):
                    if gradient is not None:
                        name, dims = decision.site.name, len(decision.site.kernel_size)
                        rows = gradient.movedim(-dims - 1, 0).flatten(1).float()
                        sums[name] = torch.addmm(sums.get(name, rows.new_zeros(())), rows, rows.T)
    except RuntimeError as error:  # some operation of the model has no gradient, or memory is short
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"What errors cost at the output of {type(model).__name__} is not known ({reason.rstrip('.')}): they count "
            "by what the norms make of them, and the start is somewhat weaker.",
            stacklevel=2,
        )
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {name: _damped(total) for name, total in sums.items() if float(total.diagonal().sum()) > 0}


def _small(chunks: list[Example], images: int, most: int) -> Iterator[Example]:
    """The first examples, few at a time where they can be told apart."""
    used = 0
    for chunk in chunks:
        step = most if chunk.separable else chunk.batch
        for start in range(0, chunk.batch, step):
            if used >= images:
                return
            used += min(step, chunk.batch - start)
            yield chunk.copied() if step >= chunk.batch else chunk.part(start, start + step).copied()


def _drawn(outputs: Any, generator: torch.Generator) -> Tensor:
    """The outputs times random numbers whose covariance is the curvature of the divergence.

    Of logits that is ``diag(p) − p pᵀ`` with ``p`` their softened distribution; of other outputs
    the identity, as for squared errors.
    """
    made = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    logits = len(made) == 1 and made[0].dim() == 2 and made[0].shape[1] > 1
    total = torch.zeros(())
    for output in made:
        drawn = (torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1).to(output.device)
        if logits:
            p = (output.detach().float() / _TEMPERATURE).softmax(1)
            drawn = p.sqrt() * drawn - p * (p.sqrt() * drawn).sum(1, keepdim=True)
        total = total + (output.float() * drawn).sum().cpu()
    return total


def _damped(curvature: Tensor) -> Tensor:
    metric = curvature / curvature.diagonal().mean()
    diagonal = torch.diag(metric.diagonal())
    return (
        (1 - _DIAGONAL_SHARE) * metric + _DIAGONAL_SHARE * diagonal + _LEAST_WEIGHT * torch.eye(len(metric)).to(metric)
    )
