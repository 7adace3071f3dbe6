"""Importing torchvision beside a torch build that its compiled operators were not built for.

A torchvision wheel built for CUDA cannot load its compiled library beside a CPU build of torch.
Its Python parts (models, transforms) need none of it, yet ``import torchvision``, and with it
``import timm``, stops at "operator torchvision::nms does not exist", because it describes the
operators to torch's compiler before it knows whether they are there. This module declares the
missing schemas, and only after the import has failed for exactly that reason.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import torch

from ghostify.extras import require

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A library's declarations live as long as the object, so it must not be collected.
_declared: list[Any] = []


class TorchvisionOpsWarning(UserWarning):
    """torchvision works without its compiled operators."""


def import_torchvision() -> Any:
    """Import torchvision, if need be without its compiled operators.

    Call it before importing timm too. Where the operators are missing, a warning says so once;
    calling one of them then raises torch's own error.

    Returns:
        The module ``torchvision``.

    Raises:
        MissingExtraError: torchvision is not installed.
        RuntimeError: The import failed for another reason; the original error.
    """
    try:
        return require("torchvision", extra="models")
    except RuntimeError as error:
        missing = [name for name in _SCHEMAS if f"operator torchvision::{name} does not exist" in str(error)]
        if not missing or _declared:
            raise
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)
    # Parts that were imported before the failure hold what they found out then.
    for part in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[part]
    module = importlib.import_module("torchvision")
    warnings.warn(
        "torchvision's compiled operators do not fit this build of torch: its models and transforms work, "
        "operators such as nms and roi_align do not. Install builds of torch and torchvision that belong together "
        "to have them.",
        TorchvisionOpsWarning,
        stacklevel=2,
    )
    return module
