"""Optional packages: imported where they are used, with an error that names the extra."""

import importlib
from types import ModuleType
from typing import Any

from ghostify.errors import MissingExtraError


def require(module: str, *, extra: str) -> Any:
    """Import an optional module.

    Args:
        module: Its import name, as in ``onnxruntime``.
        extra: The extra of ghostify that installs it, as in ``onnx``.

    Raises:
        MissingExtraError: It is not installed.

    Example:
        >>> require("math", extra="none").sqrt(4.0)
        2.0
    """
    try:
        imported: ModuleType = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".", maxsplit=1)[0]:
            raise  # the package is there, but something that it needs is not: not ours to reword
        raise MissingExtraError(
            f"module={module!r} is not installed. Install the extra that brings it: pip install 'ghostify[{extra}]'."
        ) from error
    return imported
