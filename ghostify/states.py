"""State dicts that every model loads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn


def versioned(state: Mapping[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """A state dict with the versions that the modules of a model write into theirs.

    Some modules, torchvision's MNASNet among them, refuse a state without its version, and a file
    of plain tensors holds none.

    Args:
        state: Values by name, as this version of the model has them.
        model: Tells the versions.

    Example:
        >>> versioned({}, nn.BatchNorm2d(3))._metadata[""]["version"]
        2
    """
    made = OrderedDict(state)
    setattr(made, "_metadata", getattr(model.state_dict(), "_metadata"))  # noqa: B009, B010 - torch's, and not typed
    return made
