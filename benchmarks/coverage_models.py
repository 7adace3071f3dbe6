"""The models of the coverage table: how one is built, and the smallest inputs that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from coverage_page import Row
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import ghostify
from ghostify._torchvision import import_torchvision
from ghostify.tracing import Example

SIDES = (64, 96, 128)
VIDEOS = ((8, 64), (8, 112), (16, 112), (16, 224))  # frames and side

Inputs = Callable[[int], tuple[Any, ...]]
"""Makes the arguments of one call for so many examples."""


def build(row: Row) -> nn.Module:
    """The model of a row with random weights, in evaluation mode."""
    torch.manual_seed(0)
    if row.library == "timm":
        import_torchvision()
        import timm

        return timm.create_model(row.name, pretrained=False).eval()
    _nms_where_missing()
    options: dict[str, Any] = {}
    if row.task == "detection" and not row.name.startswith("ssd"):  # these have their own size
        options = {"min_size": 96, "max_size": 128}
    if "rcnn" in row.name:
        options |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 20}
    return ghostify.load_model(f"torchvision:{row.name}", **options).eval()


def with_values_if_small(row: Row, values_below: float) -> tuple[nn.Module, bool]:
    with suppress(Exception), torch.device("meta"):  # a factory may need values, to say how deep the model is
        model = build(row)
        if sum(parameter.numel() for parameter in model.parameters()) > values_below:
            return model, False
    model = build(row)
    if sum(parameter.numel() for parameter in model.parameters()) > values_below:
        return model.to("meta"), False
    with torch.no_grad():  # a branch that is multiplied by zero, as training starts it, would hide what it computes
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.1)
    return model, True


def convolutions(model: nn.Module, image_channels: int = 3) -> list[str]:
    """Names of a model's convolutions, without a patch embedding: one that cuts the image into tiles."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd)
        and not (
            module.in_channels == image_channels
            and tuple(module.kernel_size) == tuple(module.stride)
            and max(module.kernel_size) > 1
        )
    ]


def _nms_where_missing() -> None:
    """Greedy suppression of boxes in plain Python, where torchvision's compiled operator does not load."""
    torchvision = import_torchvision()
    if torchvision.extension._has_ops():
        return

    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        overlaps = (torchvision.ops.box_iou(boxes.detach(), boxes.detach()) > iou_threshold).numpy()
        kept: list[int] = []
        for position in scores.detach().argsort(descending=True, stable=True).tolist():
            if not overlaps[position, kept].any():
                kept.append(position)
        return torch.tensor(kept, dtype=torch.int64)

    torchvision.ops.boxes.nms = nms


def smallest_inputs(row: Row, model: nn.Module) -> tuple[Inputs, list[Inputs]]:
    """The smallest inputs that the model accepts, and the larger ones.

    Raises:
        TraceError: It accepts none.
    """
    *smaller, default = _candidates(row, model)
    for position, inputs in enumerate(smaller):
        with suppress(Exception):
            Example.of(inputs(1)).run(model)
            return inputs, [*smaller[position + 1 :], default]
    Example.of(default(1)).run(model)
    return default, []


def _candidates(row: Row, model: nn.Module) -> Iterator[Inputs]:
    if row.task == "detection":
        yield lambda n: ([torch.rand(3, 96, 128) for _ in range(n)],)
    elif row.task == "optical flow":
        for side in (128, 256):
            yield lambda n, side=side: (torch.randn(n, 3, side, side), torch.randn(n, 3, side, side), 2)
    elif row.task == "video":
        for frames, side in VIDEOS:
            yield lambda n, frames=frames, side=side: (torch.randn(n, 3, frames, side, side),)
    else:
        config = getattr(model, "default_cfg", None) or {}
        channels, *default = config.get("input_size") or (3, *[299 if "inception" in row.name else 224] * 2)
        least = max(config.get("min_input_size") or (0,))
        squares = [(side, side) for side in SIDES if least <= side < min(default)]
        for sides in (*squares, tuple(default)):
            yield lambda n, sides=sides: (torch.randn(n, channels, *sides),)


def for_training(row: Row, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in training mode: detectors want to know what is to be seen."""
    if row.task != "detection":
        return inputs
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 96, 128, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
    return (*inputs, [dict(target) for _ in inputs[0]])
