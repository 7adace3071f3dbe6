"""Reading JSON that anybody may have written."""

from __future__ import annotations

from typing import TypeVar

import pydantic

from ghostify.errors import GhostifyError

T = TypeVar("T")

# Of every dataclass that is read from JSON: an unknown key and a number that is none are errors.
STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


def read_document(
    adapter: pydantic.TypeAdapter[T], document: str | bytes, *, kind: str, verb: str, error: type[GhostifyError]
) -> T:
    """Read a dataclass from JSON text; checks every field, runs no code.

    Args:
        adapter: Of the dataclass.
        document: The text.
        kind: What it should be, for the message.
        verb: The function of ghostify that makes one.
        error: What to raise if it is something else.
    """
    try:
        return adapter.validate_json(document)
    except pydantic.ValidationError as problem:
        raise error(
            f"This is not a ghostify {kind}: {first_problem(problem)}. Make one with `ghostify.{verb}(...)`."
        ) from problem


def first_problem(error: pydantic.ValidationError) -> str:
    """Where the first thing is wrong, and what."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"])) or "the document"
    return f"{where}: {first['msg']}"
