"""What a site's loss does to the network's answers, measured: only this site is replaced, and the network is run.

Small errors of a layer change the answers' divergence in proportion to their variance, so one ratio tells what the
others would do: the divergence that it makes, for every unit of variance that it loses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ghostify.errors import InputsError
from ghostify.measurements import keep, place_of, recall
from ghostify.nn.layout import position_parents
from ghostify.planning.choice import choose_layout
from ghostify.planning.explained import RIDGE, explained_by, kept_share, norm_of, site_moments
from ghostify.planning.statistics import Moments, ridge_solve
from ghostify.spec import GhostSpec, Site
from ghostify.tracing import Example, Trace, seed_torch, tensors_in, unmarked

# Examples on which the answers are compared.
_IMAGES = 64
# Of Hinton et al. 2015, arXiv 1503.02531: the few images of which a network is not sure would decide alone.
_TEMPERATURE = 4.0
# Part of every key: what was measured in another way is not read.
_METHOD = 2
_ADAPTER = pydantic.TypeAdapter(dict[str, float])


def influences(facts: Trace, specs: Mapping[str, GhostSpec], chunks: list[Example]) -> dict[str, float]:
    """How far the answers part from the original's for all of a site's variance, by the name of the site.

    Args:
        facts: The original with its facts.
        specs: By site the unit that is tried there.
        chunks: Calibration inputs. What is found is kept under their fingerprint, that of the weights and that of the
            answers, site by site: what was stopped goes on there.

    Raises:
        InputsError: The answers are not finite.
    """
    if not specs:
        return {}
    few = list(_first(chunks, _IMAGES))
    answers = [_answers(facts.model, example) for example in few]
    file = place_of("influence", _fingerprint(facts.model, chunks, specs, answers))
    found = recall(_ADAPTER, file) or {}
    sites = [site for site in facts.sites if site.name in specs and site.name not in found]
    some = next(iter(specs.values()))
    bar = Console(stderr=True)
    measured = site_moments(facts, sites, some, chunks) if sites else iter(())
    for site, moments in track(
        measured, "replacing one layer at a time", len(sites), console=bar, transient=True, disable=not bar.is_terminal
    ):
        stand_in, lost = _stand_in(site, specs[site.name], moments, norm_of(site, facts))
        with _hooked(facts.model.get_submodule(site.name), stand_in):
            made = [_answers(facts.model, example) for example in few]
        apart = sum(_divergence(new, old) for new, old in zip(made, answers, strict=True)) / len(few)
        if not math.isfinite(apart):
            raise InputsError(
                f"The answers of {type(facts.model).__name__} on the calibration inputs are not finite, with "
                f"{site.name} replaced or without, and cannot be compared. Pass sensitivity='explained', or other "
                "inputs."
            )
        found[site.name] = apart / max(lost, 1e-6)
        keep(_ADAPTER, found, file)
    return found


def _stand_in(
    site: Site, spec: GhostSpec, moments: Moments, norm: nn.Module | None
) -> tuple[Callable[[Tensor], Tensor], float]:
    """What makes of a layer's maps those of its Ghost unit, and the share of variance that is lost then."""
    explained = explained_by(moments, norm)
    layout = choose_layout(explained, spec, site.groups)
    lost = 1 - kept_share(explained, layout, spec, site.groups)
    m, dims = spec.intrinsic_channels(site.out_channels, site.groups), len(site.kernel_size)
    parents, ghosts = layout[position_parents(spec, len(layout), site.groups)][m:], layout[m:]
    gram, cross = moments.centred()
    columns = ghosts.to(cross.device)
    rows = parents.to(cross.device)
    kernels = ridge_solve(gram[rows], cross[rows, :, columns].unsqueeze(-1), RIDGE).squeeze(-1)
    bias = moments.mean_y[columns] - (moments.mean_a[rows] * kernels).sum(1)
    weight = kernels.view(len(ghosts), 1, *(spec.dw_size,) * dims)

    def replaced(maps: Tensor) -> Tensor:
        read, groups = maps.index_select(-dims - 1, rows), len(ghosts)
        made = _DEPTHWISE[dims](read, weight.to(maps), bias.to(maps), padding=spec.dw_size // 2, groups=groups)
        return maps.index_copy(-dims - 1, columns, made)

    return replaced, lost


@contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _answers(model: nn.Module, example: Example) -> list[Tensor]:
    fresh = example.copied()
    with unmarked(model), torch.no_grad():
        seed_torch(0, model)
        made: Any = model(*fresh.args, **fresh.kwargs)
    return [tensor.float() for tensor in tensors_in(made) if tensor.is_floating_point()]


def _divergence(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Kullback-Leibler divergence of class scores ``(n, classes)``; of other outputs the squared error, relative."""
    total = 0.0
    for new, old in zip(made, wanted, strict=True):
        if old.dim() == 2 and old.shape[1] > 1:
            a, b = ((scores.double() / _TEMPERATURE).log_softmax(1) for scores in (old, new))
            # Of the tensor, as Python's max would take a NaN for 0.
            total += float(F.kl_div(b, a, log_target=True, reduction="batchmean").clamp_min(0))
        else:
            total += float((new - old).square().sum() / old.square().sum().clamp_min(1e-12))
    return total


def _first(chunks: list[Example], images: int) -> Iterator[Example]:
    used = 0
    for chunk in chunks:
        if used >= images:
            return
        take = min(chunk.batch, images - used)
        yield chunk.part(0, take) if chunk.separable and take < chunk.batch else chunk
        used += chunk.batch


def _fingerprint(
    model: nn.Module, chunks: list[Example], specs: Mapping[str, GhostSpec], answers: list[list[Tensor]]
) -> bytes:
    """A hash of weights, images and units, and of the answers: they tell a changed forward from the old one."""
    units = sorted((name, str(spec)) for name, spec in specs.items())
    digest = hashlib.sha256(f"{_METHOD} {units} {list(model.state_dict())}".encode())
    inputs = (tensor for chunk in chunks for tensor in chunk.tensors())
    for tensor in (*model.state_dict().values(), *inputs, *(leaf for made in answers for leaf in made)):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


_DEPTHWISE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
