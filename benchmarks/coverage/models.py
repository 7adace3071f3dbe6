"""Which models there are, how one is built, and small inputs that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import ghostify
from benchmarks.coverage.rows import Row
from ghostify._torchvision import import_torchvision
from ghostify.tracing import Example

TASKS = {"quantization": "quantised", "optical_flow": "optical flow"}
SIDES = (96, 128)
VIDEOS = ((8, 64), (16, 112), (16, 224))  # frames and side

Inputs = Callable[[int], tuple[Any, ...]]
"""Makes the arguments of one call for so many examples."""


def listed(library: str) -> list[Row]:
    """A row for every model of a library, with nothing filled in yet."""
    torchvision = import_torchvision()
    if library == "timm":
        import timm

        return [
            Row("timm", name, family, "classification")
            for family in timm.list_modules()
            for name in timm.list_models(module=family)
        ]
    rows = []
    for name in torchvision.models.list_models():
        package, family = torchvision.models.get_model_builder(name).__module__.split(".")[-2:]
        rows.append(Row("torchvision", name, family, TASKS.get(package, package.replace("models", "classification"))))
    return rows


def build(row: Row) -> nn.Module:
    """The model of a row with random weights, in training mode, as its library makes it."""
    nms_where_missing()
    options: dict[str, Any] = {}
    if row.task == "detection" and not row.name.startswith("ssd"):  # these have their own size
        options = {"min_size": 96, "max_size": 128}
    if "rcnn" in row.name:  # a fixed number of proposals: what the heads compute must not depend on values
        options |= {"rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 20, "rpn_nms_thresh": 1.0}
    torch.manual_seed(0)
    model = ghostify.load_model(f"{row.library}:{row.name}", **options)
    with torch.no_grad():  # a branch that is multiplied by nothing, as training starts it, would hide what it computes
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_meta and parameter.abs().amax() < 1e-3:
                parameter.normal_(0, 0.1)
    return model


def build_on_meta(row: Row) -> nn.Module:
    """The model without values; with them where its factory needs some, to say how deep the model is."""
    with suppress(Exception), torch.device("meta"):
        return build(row)
    return build(row)


def convolutions(model: nn.Module) -> list[str]:
    """Names of a model's convolutions, without patch embeddings, which cut the image into tiles."""
    image_channels = _image_channels(model)
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


def small_inputs(row: Row, model: nn.Module) -> Inputs:
    """The smallest of some inputs that the model accepts.

    Raises:
        TraceError: It accepts none.
    """
    *smaller, default = _candidates(row, model)
    for inputs in smaller:
        with suppress(Exception):
            Example.of(inputs(1)).run(model)
            return inputs
    Example.of(default(1)).run(model)
    return default


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


def _candidates(row: Row, model: nn.Module) -> Iterator[Inputs]:
    if row.task == "detection":
        yield lambda n: ([torch.rand(3, 96, 128) for _ in range(n)],)
    elif row.task == "optical flow":
        yield lambda n: (torch.randn(n, 3, 128, 128), torch.randn(n, 3, 128, 128))
    elif row.task == "video":
        for frames, side in VIDEOS:
            yield lambda n, frames=frames, side=side: (torch.randn(n, 3, frames, side, side),)
    else:
        _, *default = _config(model).get("input_size") or (3, *[299 if "inception" in row.name else 224] * 2)
        squares = [(side, side) for side in SIDES if side < min(default)]
        for sides in (*squares, tuple(default)):
            yield lambda n, sides=sides: (torch.randn(n, _image_channels(model), *sides),)


def _image_channels(model: nn.Module) -> int:
    return (_config(model).get("input_size") or (3,))[0]


def _config(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "default_cfg", None) or {}


def nms_where_missing() -> None:
    """Greedy suppression of boxes in plain torch, where torchvision's compiled operator does not load."""
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

    torchvision.ops.boxes.nms = torchvision.ops.nms = nms
