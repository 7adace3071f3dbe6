"""ONNX files as torch models: every operator that is read, whole networks, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from deployment_nets import make_net
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn

import ghostify
from ghostify.deployment import ExportConfig, export_onnx, load, read_notes, save
from ghostify.deployment.onnx_in import read_model, reader
from ghostify.errors import ArtefactError, OptionError
from ghostify.zoo import input_shape, load_model

ONE = ExportConfig(batch_sizes=(1,))
RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def written(
    folder: Path,
    nodes: list[tuple[Any, ...]],
    *,
    shape: tuple[Any, ...] = ("n", 4, 6, 6),
    opset: int = 20,
    outputs: tuple[str, ...] = ("y",),
) -> Path:
    """A file of nodes ``(kind, inputs, outputs, attributes)``; inputs that are arrays become weights."""
    weights, made = [], []
    for number, (kind, inputs, results, attributes) in enumerate(nodes):
        names = []
        for place, value in enumerate(inputs):
            if isinstance(value, np.ndarray):
                weights.append(numpy_helper.from_array(value, f"w{number}_{place}"))
                names.append(weights[-1].name)
            else:
                names.append(value)
        domain = attributes.pop("domain", "")
        made.append(helper.make_node(kind, names, list(results), name=attributes.pop("name", ""), domain=domain))
        made[-1].attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    graph = helper.make_graph(
        made,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    file = folder / "net.onnx"
    file.write_bytes(proto.SerializeToString())
    return file


def one(kind: str, *inputs: Any, opset: int = 20, shape: tuple[Any, ...] = ("n", 4, 6, 6), **attributes: Any) -> Any:
    """A case of one operator that reads the input."""
    return pytest.param([(kind, ["x", *inputs], ["y"], attributes)], shape, opset, id=f"{kind} {attributes} {opset}")


def several(name: str, *nodes: Any, opset: int = 20, shape: tuple[Any, ...] = ("n", 4, 6, 6)) -> Any:
    return pytest.param(list(nodes), shape, opset, id=name)


LINE, VOLUME, ROW = ("n", 4, 9), ("n", 4, 5, 6, 6), ("n", 8)
CASES = [
    one("Conv", numbers(6, 4, 3, 3), numbers(6), pads=[1, 1, 1, 1], strides=[2, 2]),
    one("Conv", numbers(6, 4, 3, 3), pads=[0, 1, 1, 2], dilations=[1, 2]),
    one("Conv", numbers(6, 2, 3, 3), group=2, auto_pad="SAME_UPPER", strides=[2, 2]),
    one("Conv", numbers(6, 4, 2, 2), auto_pad="SAME_LOWER", strides=[1, 1]),
    one("Conv", numbers(6, 4, 3), numbers(6), shape=LINE),
    one("Conv", numbers(6, 4, 3, 3, 3), shape=VOLUME, opset=11),
    one("ConvTranspose", numbers(4, 3, 3, 3), numbers(6), group=2, strides=[2, 2], pads=[1] * 4, output_padding=[1, 1]),
    one("BatchNormalization", numbers(4), numbers(4), numbers(4), abs(numbers(4)), epsilon=1e-3),
    one("BatchNormalization", numbers(4), numbers(4), numbers(4), abs(numbers(4)), shape=LINE, opset=9),
    one("InstanceNormalization", numbers(4), numbers(4)),
    one("Gemm", numbers(5, 8), numbers(5), transB=1, shape=ROW),
    one("Gemm", numbers(8, 5), numbers(5), alpha=0.5, beta=2.0, shape=ROW),
    one("MatMul", numbers(8, 5), shape=ROW),
    one("MatMul", numbers(4, 6, 3)),
    one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1),
    one("MaxPool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
    one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    one("AveragePool", kernel_shape=[3, 3], pads=[0, 0, 1, 1], count_include_pad=1),
    one("GlobalAveragePool"),
    one("GlobalMaxPool", shape=VOLUME),
    one("Clip", scalar(0), scalar(6)),
    one("Clip", "", scalar(1)),
    one("Clip", min=-1.0, max=0.5, opset=6),
    one("HardSigmoid", alpha=1 / 6),
    one("HardSigmoid"),
    one("PRelu", numbers(4, 1, 1)),
    one("Softmax", axis=1, shape=ROW),
    one("Softmax", shape=ROW, opset=11),
    one("LogSoftmax", shape=ROW),
    one("LRN", size=3, alpha=0.1, beta=0.5, bias=2.0),
    *(one(kind) for kind in ("Relu", "LeakyRelu", "Elu", "Celu", "Selu", "Sigmoid", "Tanh", "HardSwish", "Softplus",
                             "Softsign", "Mish", "Gelu", "Abs", "Neg", "Exp", "Erf", "Floor", "Ceil", "Identity",
                             "Dropout")),
    one("Gelu", approximate="tanh"),
    one("LeakyRelu", alpha=0.3),
    *(several(kind, ("Abs", ["x"], ["p"], {}), (kind, ["p"], ["y"], {})) for kind in ("Sqrt", "Log", "Reciprocal")),
    *(one(kind, numbers(4, 1, 1)) for kind in ("Add", "Sub", "Mul", "Div")),
    one("Pow", scalar(2)),
    one("Mul", np.array([[[3.0]]], np.float32)),
    several("residual", ("Relu", ["x"], ["r"], {}), ("Add", ["x", "r"], ["y"], {})),
    several("sub from one", ("Sub", [scalar(1), "x"], ["y"], {})),
    *(several(kind, ("Neg", ["x"], ["m"], {}), (kind, ["x", "m"], ["y"], {})) for kind in ("Sum", "Max", "Min")),
    one("ReduceMean", whole(-1, -2), keepdims=0),
    one("ReduceMean", axes=[2, 3], opset=13),
    one("ReduceSum", whole(1)),
    one("ReduceMax", whole(2, 3)),
    one("ReduceMin", keepdims=0),
    one("Flatten"),
    one("Reshape", whole(0, -1)),
    one("Reshape", whole(0, 2, 2, -1)),
    one("Transpose", perm=[0, 2, 3, 1]),
    one("Squeeze", whole(2, 3), shape=("n", 4, 1, 1)),
    one("Unsqueeze", whole(2), shape=ROW),
    several("concat", ("Relu", ["x"], ["r"], {}), ("Concat", ["x", "r"], ["y"], {"axis": 1})),
    several(
        "split", ("Split", ["x", whole(1, 3)], ["a", "b"], {"axis": 1}), ("Concat", ["b", "a"], ["y"], {"axis": 1})
    ),
    several("equal split", ("Split", ["x"], ["a", "b"], {"axis": 1}), ("Sub", ["a", "b"], ["y"], {}), opset=13),
    one("Slice", whole(1), whole(2**63 - 1), whole(-1), whole(2)),
    one("Slice", starts=[0, 1], ends=[4, -1], axes=[1, 2], opset=9),
    one("Gather", whole(3, 1, 0, 2), axis=1),
    one("Gather", np.array(2), axis=1),
    one("Pad", whole(0, 1, 0, 0, 0, 2, 1, 0), scalar(0.5)),
    one("Pad", whole(1, 2), "", whole(3), mode="reflect"),
    one("Pad", pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="edge", opset=2),
    one("Resize", "", np.array([1, 1, 2, 2], np.float32), coordinate_transformation_mode="asymmetric",
        nearest_mode="floor"),
    one("Resize", "", "", whole(1, 4, 9, 9), mode="linear", shape=(1, 4, 6, 6)),
    one("Resize", "", np.array([1, 1, 2, 2], np.float32), mode="linear",
        coordinate_transformation_mode="align_corners"),
    one("Upsample", np.array([1, 1, 2, 2], np.float32), opset=9),
    one("DepthToSpace", blocksize=2, mode="CRD"),
    one("Cast", to=1),
    several("constant", ("Constant", [], ["c"], {"value_float": 2.0}), ("Mul", ["x", "c"], ["y"], {})),
    several(
        "view of the older exporter", ("Shape", ["x"], ["s"], {}), ("Gather", ["s", np.array(0)], ["b"], {"axis": 0}),
        ("Unsqueeze", ["b", whole(0)], ["u"], {}), ("Concat", ["u", whole(-1)], ["to"], {"axis": 0}),
        ("Reshape", ["x", "to"], ["y"], {}),
    ),
    several(
        "padding of the older exporter",
        ("ConstantOfShape", [whole(4)], ["zeros"], {"value": numpy_helper.from_array(whole(0))}),
        ("Concat", [whole(0, 0, 1, 1), "zeros"], ["all"], {"axis": 0}), ("Cast", ["all"], ["pads"], {"to": 7}),
        ("Pad", ["x", "pads"], ["y"], {}), opset=13,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "shape", "opset"), CASES)
def test_every_operator_is_read_as_onnxruntime_runs_it(
    nodes: list[Any], shape: tuple[Any, ...], opset: int, tmp_path: Path
) -> None:
    # read_model compares both itself, and raises if they part.
    assert isinstance(read_model(written(tmp_path, nodes, shape=shape, opset=opset)), fx.GraphModule)


def test_the_cases_are_of_all_operators() -> None:
    assert {node[0] for case in CASES for node in case.values[0]} == {*reader.OPERATORS, "ConstantOfShape"}


@pytest.fixture
def file(tmp_path: Path, images: Tensor) -> Path:
    return export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=images, config=ONE).path


def test_a_network_comes_back_with_the_names_of_its_layers(file: Path, images: Tensor) -> None:
    model = load_model(f"onnx:{file}")
    torch.testing.assert_close(model(images), make_net().eval()(images))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["stem"] is kinds["features.2"] is nn.Conv2d
    assert kinds["head"] is nn.Linear
    assert input_shape(model, str(file)) == (3, 12, 12)
    assert not any(module.training for module in model.modules())


def test_all_verbs_work_on_it(file: Path, images: Tensor, tmp_path: Path) -> None:
    model = load_model(str(file))
    plan = ghostify.plan(model, ratio=2, example_inputs=images)
    assert [(d.site.name, d.order) for d in plan.replaced] == [("features.2", "folded"), ("features.5", "folded")]
    small = ghostify.apply(plan, model, calibration=images)
    again = load(save(small, tmp_path / "small"), base=load_model(str(file)))
    assert torch.equal(again(images), small.eval()(images))
    report = ghostify.compare(model, small, example_inputs=images, latency=None)
    assert report.compressed.params < report.original.params
    check = export_onnx(small, tmp_path / "small.onnx", example_inputs=images, config=ONE)
    assert not {"Gather", "BatchNormalization"} & set(check.ops)


def test_reading_leaves_the_random_state_alone(file: Path) -> None:
    before = torch.get_rng_state()
    read_model(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_beside_the_file_are_read(file: Path, images: Tensor) -> None:
    proto = onnx.load(file)
    onnx.save(proto, file, save_as_external_data=True, location="weights.bin", size_threshold=200)
    assert (file.parent / "weights.bin").exists()
    torch.testing.assert_close(read_model(file)(images), make_net().eval()(images))


def test_a_file_for_one_batch_size_becomes_a_model_for_all(tmp_path: Path) -> None:
    nodes = [("Conv", ["x", numbers(8, 4, 3, 3)], ["c"], {}), ("Reshape", ["c", whole(1, 128)], ["y"], {})]
    model = read_model(written(tmp_path, nodes, shape=(1, 4, 6, 6)))
    assert model(torch.zeros(3, 4, 6, 6)).shape == (3, 128)


def test_several_outputs_come_as_a_tuple(tmp_path: Path) -> None:
    nodes = [("Relu", ["x"], ["y"], {}), ("Neg", ["x"], ["z"], {})]
    model = read_model(written(tmp_path, nodes, outputs=("y", "z")))
    assert len(model(torch.ones(1, 4, 6, 6))) == 2


REFUSED = {
    "unknown operator": ([("Hardmax", ["x"], ["y"], {"name": "last"})], r"operator Hardmax \(node 'last'\) is none of"),
    "custom domain": ([("Relu", ["x"], ["y"], {"domain": "com.x"})], r"operator com\.x\.Relu .* is none of"),
    "computed weight": ([("Relu", ["x"], ["w"], {}), ("Conv", ["x", "w"], ["y"], {})], "computed when the model runs"),
    "does not fit": ([("Conv", ["x", numbers(6, 4, 3, 3)], ["y"], {"group": 5})], "does not fit its inputs"),
    "no such value": ([("Relu", ["nowhere"], ["y"], {})], "reads 'nowhere', which nothing makes before it"),
    "constant output": ([("Constant", [], ["y"], {"value_float": 1.0})], "an output that depends on none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_network_is_refused(case: str, tmp_path: Path) -> None:
    nodes, told = REFUSED[case]
    nodes = [(kind, list(inputs), outputs, dict(attributes)) for kind, inputs, outputs, attributes in nodes]
    with pytest.raises(ArtefactError, match=rf"net\.onnx.*{told}"):
        read_model(written(tmp_path, nodes))


def test_half_precision_is_refused(tmp_path: Path) -> None:
    proto = onnx.load(written(tmp_path, [("Relu", ["x"], ["y"], {})]))
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    (tmp_path / "half.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ArtefactError, match="'x' is not of float32"):
        read_model(tmp_path / "half.onnx")


def test_a_reading_that_computes_something_else_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reader.OPERATORS, "Relu", lambda build, op: build.call(torch.abs, op.x))
    with pytest.raises(ArtefactError, match=r"torch reads another model .* part by .* more than 0\.001"):
        read_model(file)


def test_names_of_the_file_never_become_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evil = '"); print("run"); getattr(self, "x'
    proto = onnx.load(written(tmp_path, [("Conv", ["x", numbers(4, 4, 1, 1)], ["y"], {"name": evil})]))
    proto.graph.node[0].input[1] = proto.graph.initializer[0].name = f"a.{evil}.weight"
    proto.graph.node[0].input[0] = proto.graph.input[0].name = evil
    (tmp_path / "evil.onnx").write_bytes(proto.SerializeToString())
    model = read_model(tmp_path / "evil.onnx")
    model(torch.zeros(1, 4, 6, 6))
    assert "print(" not in model.code
    assert '"' not in model.code
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["forward.weight", "training.weight", "1.weight", "graph.x.weight"])
def test_names_that_torch_needs_itself_are_changed(name: str, tmp_path: Path) -> None:
    proto = onnx.load(written(tmp_path, [("Conv", ["x", numbers(4, 4, 1, 1)], ["y"], {})]))
    proto.graph.node[0].input[1] = proto.graph.initializer[0].name = name
    (tmp_path / "x.onnx").write_bytes(proto.SerializeToString())
    assert read_model(tmp_path / "x.onnx")(torch.zeros(1, 4, 6, 6)).shape == (1, 4, 6, 6)


def test_options_of_a_factory_do_not_go_with_a_file(file: Path) -> None:
    with pytest.raises(OptionError, match="num_classes"):
        load_model(str(file), num_classes=3)
    with pytest.raises(ArtefactError, match="is not a file"):
        load_model("onnx:nowhere.onnx")
    file.write_bytes(b"text")
    with pytest.raises(ArtefactError, match="no ONNX file"):
        load_model(str(file))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = ghostify.convert(make_net(), ratio=2, example_inputs=torch.zeros(1, 3, 12, 12), initialiser="first")
    file = tmp_path_factory.mktemp("exported") / "small.onnx"
    return export_onnx(small, file, example_inputs=torch.zeros(1, 3, 12, 12), config=ONE).path


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    kept=st.floats(0.5, 2),
)
@example(changes=[(0.0, 8)], kept=0.9)
def test_whatever_happens_to_a_file_it_is_an_artefact_error_or_a_model(
    exported: Path, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(exported.read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    file = exported.with_name("damaged.onnx")
    file.write_bytes(data[: int(kept * len(data))])
    for read in (read_model, read_notes):
        with contextlib.suppress(ArtefactError):
            read(file)


def test_text_that_is_no_text_is_refused(file: Path) -> None:
    """The parser hands out bytes where a file's text is no UTF-8."""
    data = file.read_bytes()
    assert data.count(b"SmallNet") == 1
    file.write_bytes(data.replace(b"SmallNet", b"Small\xff\xfe\xfd"))
    with pytest.raises(ArtefactError, match="no graph that can be read"):
        read_notes(file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ghostify._torchvision.TorchvisionOpsWarning")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "googlenet"])
def test_networks_of_torchvision_make_the_whole_way(name: str, tmp_path: Path) -> None:
    net, x = load_model(f"torchvision:{name}", **({"init_weights": False} if name == "googlenet" else {})).eval(), None
    x = torch.randn(1, 3, 64, 64)
    file = export_onnx(net, tmp_path / "net.onnx", example_inputs=x, config=ONE).path
    model = load_model(str(file))
    torch.testing.assert_close(model(x), net(x), rtol=1e-3, atol=1e-4)
    small = ghostify.convert(model, ratio=2, example_inputs=x)
    export_onnx(small, tmp_path / "small.onnx", example_inputs=x, config=ONE)
