from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from ghostify import zoo
from ghostify._torchvision import TorchvisionOpsWarning
from ghostify.errors import ArtefactError, ModelNotFoundError, OptionError
from ghostify.nn.cifar import CifarResNet, resnet20
from ghostify.zoo import input_shape, load_model, read_state

pytestmark = pytest.mark.filterwarnings("ignore::ghostify._torchvision.TorchvisionOpsWarning")

NET_FILE = """
import sys
from torch import nn
from random_parts import WIDTH

def net(width=WIDTH, pretrained=False):
    layer = nn.Conv2d(3, width, 3)
    if pretrained:
        nn.init.ones_(layer.weight)
    return layer

def offline(pretrained=False):
    raise ConnectionError("no route to host")

ready = nn.Conv2d(3, 2, 1)
number = 3
_private = net

def a_string():
    return "model"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's own."""
    (tmp_path / "own_zoo_net.py").write_text(NET_FILE)
    (tmp_path / "random_parts.py").write_text("WIDTH = 6\n")
    (tmp_path / "broken_zoo_net.py").write_text("def net(:\n")
    (tmp_path / "needy_zoo_net.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_zoo_net", "random_parts", "_ghostify_zoo_own_zoo_net"):
        sys.modules.pop(name, None)


def test_a_timm_model_is_made_with_its_options_and_shape() -> None:
    net = load_model("timm:resnet18", num_classes=7, in_chans=1)
    assert net.get_classifier().out_features == 7
    assert input_shape(net, "timm:resnet18") == (1, 224, 224)


def test_a_torchvision_model_is_made_with_its_options_and_shape() -> None:
    net = load_model("torchvision:mobilenet_v2", num_classes=7)
    assert net.classifier[1].out_features == 7
    assert input_shape(net, "torchvision:mobilenet_v2") == (3, 224, 224)


def test_a_torchvision_model_without_weights_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", forbidden)
    assert isinstance(load_model("torchvision:lraspp_mobilenet_v3_large"), nn.Module)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm:resnet81", "timm:resnet18"),
        ("timm:mobilnetv3_large_100", "timm:mobilenetv3_large_100"),
        ("torchvision:mobilenetv2", "torchvision:mobilenet_v2"),
        ("torchvision:resnet_50", "torchvision:resnet50"),
        ("ghostify.nn.cifar:resnet2", "ghostify.nn.cifar:resnet20"),
        ("ghostfy.nn.cifar:resnet20", "there is no module 'ghostfy'"),
        ("tim:resnet18", "Did you mean timm?"),
        ("resnet18", "timm:resnet18"),
        (":resnet18", "torchvision:mobilenet_v2"),
        ("torchvision:", "names no model"),
        ("timm:qqqqqqqq", "package.module:factory"),
        ("nowhere/net.py:net", "there is no file 'nowhere/net.py'"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest_or_the_next_step(name: str, near: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_model(name)
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inception_has_larger_images_and_videos_have_no_known_shape() -> None:
    assert input_shape(nn.Conv2d(3, 3, 1), "torchvision:inception_v3") == (3, 299, 299)
    assert input_shape(nn.Conv3d(3, 3, 1), "torchvision:r3d_18") is None
    assert input_shape(nn.Conv2d(3, 3, 1), "some.module:net") is None


def test_a_factory_of_an_installed_package() -> None:
    net = load_model("ghostify.nn.cifar:resnet20", num_classes=3)
    assert isinstance(net, CifarResNet)
    assert net.linear.out_features == 3
    assert input_shape(net) == (3, 32, 32)


def test_a_module_and_a_file_of_the_current_folder(folder: Path) -> None:
    path = list(sys.path)
    assert load_model("own_zoo_net:net").out_channels == 6
    assert load_model("own_zoo_net.py:net", width=4).out_channels == 4
    assert load_model(f"{folder}/own_zoo_net.py:net", pretrained=True).weight.eq(1).all()
    assert sys.path == path


def test_a_model_that_is_there_is_copied(folder: Path) -> None:
    first, second = load_model("own_zoo_net:ready"), load_model("own_zoo_net:ready")
    assert first is not second
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(OptionError, match="width cannot be passed"):
        load_model("own_zoo_net:ready", width=3)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own_zoo_net:number", ModelNotFoundError, "is a int"),
        ("own_zoo_net:a_string", OptionError, "made a str"),
        ("broken_zoo_net:net", ModelNotFoundError, "SyntaxError"),
        ("needy_zoo_net:net", ModelNotFoundError, "needs not_installed_anywhere"),
        ("broken_zoo_net.py:net", ModelNotFoundError, "SyntaxError"),
    ],
)
def test_what_is_no_factory_is_said(folder: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(name)


def test_options_that_a_factory_does_not_take_are_named(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be built with depth=3.*depth"):
        load_model("own_zoo_net:net", depth=3)
    with pytest.raises(OptionError, match="pretrained"):
        load_model("own_zoo_net:a_string", pretrained=True)


def test_a_failed_download_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no route to host.*weights=FILE"):
        load_model("own_zoo_net:offline", pretrained=True)

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ModelNotFoundError, match=r"torchvision:resnet18.*not known.*--weights FILE"):
        load_model("torchvision:resnet18", pretrained=True)


def test_pretrained_and_weights_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        load_model("ghostify.nn.cifar:resnet20", pretrained=True, weights=tmp_path / "w.pth")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return resnet20().state_dict()


WAYS = {
    "plain.pth": lambda state: state,
    "lightning.ckpt": lambda state: {"state_dict": state, "epoch": 3},
    "nested.pt": lambda state: {"model": state},
    "parallel.pth": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("file", [*WAYS, "plain.safetensors"])
def test_weights_are_loaded_from_every_usual_layout(file: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / file
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(WAYS[file](state), path)
    net = load_model("ghostify.nn.cifar:resnet20", weights=path)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_weights_of_another_model_are_told_apart(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ArtefactError, match=r"linear.weight is \(10, 64\) in the file, \(3, 64\) in the model.*num_classes"
    ):
        load_model("ghostify.nn.cifar:resnet20", weights=tmp_path / "w.pth", num_classes=3)
    with pytest.raises(ArtefactError, match=r"missing in the file; .*and \d+ more"):
        load_model("ghostify.nn.cifar:resnet56", weights=tmp_path / "w.pth")


class Payload:
    """Runs a command when it is unpickled by an unwary reader."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_code_in_a_file_of_weights_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    torch.save({"state_dict": Payload(trace)}, tmp_path / "evil.pth")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload(trace), protocol=2))
    for file in ("evil.pth", "evil.pt"):
        with pytest.raises(ArtefactError, match=r"could run code \(UnpicklingError\)\. Write it"):
            read_state(tmp_path / file)
    assert not trace.exists()


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02}", b"PK\x03\x04" + bytes(40)])
def test_a_damaged_file_of_weights_is_refused(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ArtefactError, match=file):
        read_state(tmp_path / file)


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ArtefactError, match="holds no state dict"):
        read_state(tmp_path / "w.pth")


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is not a file"):
        load_model("ghostify.nn.cifar:resnet20", weights=tmp_path / "nowhere.pth")


def run(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    prelude = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_torchvision_is_imported_whatever_torch_it_was_built_for() -> None:
    done = run("""
        import warnings
        from ghostify._torchvision import TorchvisionOpsWarning, import_torchvision
        try:
            import torchvision
            broken = False
        except RuntimeError:
            broken = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = import_torchvision()
            assert import_torchvision() is module
        ours = [w for w in caught if w.category is TorchvisionOpsWarning]
        assert len(ours) == (1 if broken else 0), caught
        assert all("nms" in str(w.message) for w in ours)
        import torch, torchvision
        assert torchvision is module
        assert torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
        assert torchvision.transforms.CenterCrop(2)(torch.zeros(3, 4, 4)).shape == (3, 2, 2)
        print("imported")
    """)
    assert done.stdout.strip() == "imported", done.stderr


# A torchvision whose operators are missing, as it behaves beside a torch build that it was not built for.
WITHOUT_OPS = """
import torch
from torchvision import extension
torch.library.register_fake("torchvision::nms")(lambda dets, scores, threshold: dets)
"""


def test_missing_operators_are_declared_and_half_imported_parts_dropped(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(WITHOUT_OPS)
    (package / "extension.py").write_text("import builtins; builtins.runs = getattr(builtins, 'runs', 0) + 1\n")
    done = run(
        """
        import builtins, torch
        from ghostify._torchvision import import_torchvision
        module = import_torchvision()
        assert hasattr(torch.ops.torchvision, "qnms")
        print(module.__name__, builtins.runs)
        """,
        tmp_path,
    )
    assert done.stdout.strip() == "torchvision 2", done.stderr
    assert "TorchvisionOpsWarning" in done.stderr


def test_another_failure_of_torchvision_keeps_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('compiled with another CUDA')\n")
    done = run("from ghostify._torchvision import import_torchvision; import_torchvision()", tmp_path)
    assert "RuntimeError: compiled with another CUDA" in done.stderr
    assert "TorchvisionOpsWarning" not in done.stderr


def test_torchvision_is_looked_at_before_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    timm = SimpleNamespace(is_model=lambda name: False, list_models=lambda: [])
    monkeypatch.setattr(zoo, "import_torchvision", lambda: order.append("torchvision"))
    monkeypatch.setattr(zoo, "require", lambda name, extra: (order.append(name), timm)[1])
    with pytest.raises(ModelNotFoundError):
        load_model("timm:nothing")
    assert order == ["torchvision", "timm"]
    assert issubclass(TorchvisionOpsWarning, UserWarning)
