"""Every error that ghostify raises on purpose.

The tree::

    GhostifyError
    ├── OptionError         an option has a value that cannot be used (ratio=0.5, dw_size=4)
    ├── InputsError         example inputs or data are missing, empty, or do not fit the model
    ├── ModelNotFoundError  no model has the name that was asked for
    ├── MissingExtraError   an optional package is not installed; names the extra that brings it
    ├── TraceError          the model does not run on the example inputs
    ├── PlanError           the plan cannot be made or does not fit
    │   ├── NothingToConvertError   no convolution is left to replace
    │   ├── PatternError            a name pattern matches no convolution
    │   ├── BudgetError             no choice of ratios meets the budget
    │   └── PlanMismatchError       the plan was made for another model
    ├── ConversionError     the converted model is not what the plan promised
    ├── TrainingError       distillation cannot start or go on
    │   └── NonFiniteLossError      the loss became NaN or infinite
    ├── ArtefactError       a stored model is damaged, foreign, or fits another base model
    ├── ExportError         the exported file does not compute what the model computes
    └── OutputError         a result cannot be written

Each message is one string: what is wrong (``name=value``), where, and what to do next.
The classes also derive from the built-in exception that a caller would expect
(``ValueError``, ``ImportError``, ``OSError``), so code that knows nothing of ghostify
catches them as usual.
"""

from typing import Any


class GhostifyError(Exception):
    """The root of all errors raised on purpose by ghostify."""


class OptionError(GhostifyError, ValueError):
    """An option has a value that cannot be used."""


class InputsError(GhostifyError, ValueError):
    """Example inputs or data are missing, empty, or do not fit the model."""


class ModelNotFoundError(GhostifyError, LookupError):
    """No model has the name that was asked for."""


class MissingExtraError(GhostifyError, ImportError):
    """An optional package is not installed."""


class TraceError(GhostifyError, RuntimeError):
    """The model does not run on the example inputs."""


class PlanError(GhostifyError, ValueError):
    """The plan cannot be made or does not fit."""


class NothingToConvertError(PlanError):
    """No convolution is left to replace."""


class PatternError(PlanError):
    """A name pattern matches no convolution of the model."""


class BudgetError(PlanError):
    """No choice of ratios meets the budget; the message names what can be reached."""


class PlanMismatchError(PlanError):
    """The plan was made for another model."""


class ConversionError(GhostifyError, RuntimeError):
    """The converted model is not what the plan promised."""


class TrainingError(GhostifyError, RuntimeError):
    """Distillation cannot start or go on."""


class NonFiniteLossError(TrainingError):
    """The loss or its gradient became NaN or infinite."""


class ArtefactError(GhostifyError, ValueError):
    """A stored model is damaged, foreign, or fits another base model."""


class ExportError(GhostifyError, RuntimeError):
    """The exported file does not compute what the model computes.

    Args:
        message: What is wrong.
        check: The comparison that failed, if there was one: an ``ExportCheck``, whose table follows the message.
    """

    def __init__(self, message: str, check: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.check = check

    def __str__(self) -> str:
        return self.message if self.check is None else f"{self.message}\n{self.check.table()}"


class OutputError(GhostifyError, OSError):
    """A result cannot be written."""


def first_line(error: BaseException) -> str:
    r"""What an error of somebody else's says, in one line.

    Example:
        >>> first_line(ValueError("no such axis\nat line 3"))
        'ValueError: no such axis'
    """
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
