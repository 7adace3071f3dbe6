"""Small ONNX files that would make much: refused, before they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from test_onnx_in import numbers, whole, written

from ghostify.deployment.onnx_in import read_model, reader
from ghostify.errors import ArtefactError

TEXT = numpy_helper.from_array(np.array(["text"], dtype=object))
ADD = ("Add", ["x", "c"], ["y"], {})
# Node by node (kind, inputs, outputs, attributes), and what is told.
HOSTILE: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "huge": ([("ConstantOfShape", [whole(2**40)], ["c"], {}), ADD], "ConstantOfShape .* makes more numbers"),
    "broadcasting": (
        [
            ("ConstantOfShape", [whole(2**13, 1)], ["a"], {}), ("ConstantOfShape", [whole(2**13)], ["b"], {}),
            ("Mul", ["a", "b"], ["c"], {}), ADD,
        ],
        "operator Mul .* makes more numbers of constants than the 1,032,",
    ),
    "gathering": (
        [
            ("ConstantOfShape", [whole(2**13)], ["a"], {}), ("Cast", ["a"], ["b"], {"to": 7}),
            ("ConstantOfShape", [whole(1, 2**13)], ["d"], {}), ("Gather", ["d", "b"], ["c"], {"axis": 0}), ADD,
        ],
        "operator Gather .* makes more numbers",
    ),
    "concatenating, which shape inference would carry on": (
        [
            ("ConstantOfShape", [whole(2**12)], ["a0"], {}),
            *(("Concat", [f"a{step}"] * 4, [f"a{step + 1}"], {"axis": 0}) for step in range(9)),
            ("Add", ["x", "a9"], ["y"], {}),
        ],
        "operator Concat .* makes more numbers",
    ),
    "text": ([("ConstantOfShape", [whole(2**18)], ["c"], {"value": TEXT}), ADD], "ConstantOfShape .* makes text"),
    "text of numbers": (
        [("ConstantOfShape", [whole(2**18)], ["a"], {}), ("Cast", ["a"], ["c"], {"to": 8}), ADD], "Cast .* makes text",
    ),
    "groups of an empty weight": (
        [("ConvTranspose", ["x", numbers(0, 1, 1, 1), numbers(1)], ["y"], {"group": 2**27})], "with group=134217728",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_makes_much_of_little_is_refused(case: str, tmp_path: Path) -> None:
    nodes, told = HOSTILE[case]
    nodes = [(kind, list(inputs), outputs, dict(attributes)) for kind, inputs, outputs, attributes in nodes]
    with pytest.raises(ArtefactError, match=rf"net\.onnx.*{told}"):
        read_model(written(tmp_path, nodes))


def test_functions_of_a_file_are_refused_before_they_are_followed(tmp_path: Path) -> None:
    file = written(tmp_path, [("Relu", ["x"], ["y"], {})])
    proto, depth = onnx.load(file), 26
    for level in range(depth):  # each calls the next one twice
        inside = [helper.make_node(f"f{level + 1}", [a], [b], domain="own") for a, b in ("ab", "bc")]
        body = inside if level < depth - 1 else [helper.make_node("Relu", ["a"], ["c"])]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        names = ("own", f"f{level}") if level else ("", "Mish")  # which operator set 17 does not have
        proto.functions.append(helper.make_function(*names, ["a"], ["c"], body, imports))
    del proto.opset_import[:]
    proto.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid("own", 1)])
    proto.graph.node[0].op_type = "Mish"
    onnx.save(proto, file)
    with pytest.raises(ArtefactError, match="it has functions of its own"):
        read_model(file)


def test_a_constant_that_many_operators_read_is_there_once(tmp_path: Path) -> None:
    nodes: list[tuple[Any, ...]] = [("Add", ["x", numbers(1, 4, 6, 6)], ["v0"], {})]
    nodes += [("Add", [f"v{step}", "w0_1"], [f"v{step + 1}" if step < 5 else "y"], {}) for step in range(6)]
    assert len(list(read_model(written(tmp_path, nodes)).buffers())) == 1


@pytest.mark.parametrize("kept_as", ["initializer", "Constant"])
def test_weights_of_either_kind_may_be_made_over(kept_as: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many exporters write all weights as operators."""
    monkeypatch.setattr(reader, "_CONSTANTS", 100)
    weight = numbers(6, 4)
    first = [("Constant", [], ["w"], {"value": numpy_helper.from_array(weight)})] if kept_as == "Constant" else []
    made = ("Transpose", ["w" if first else weight], ["turned"], {"perm": [1, 0]})
    nodes = [*first, made, ("Transpose", ["turned"], ["back"], {"perm": [1, 0]}), ("MatMul", ["x", "back"], ["y"], {})]
    read_model(written(tmp_path, nodes, shape=("n", 6)))
