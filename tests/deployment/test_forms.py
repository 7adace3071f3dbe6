"""The forms of a network side by side."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from deployment_nets import make_net
from torch import Tensor, nn

from ghostify.conversion import convert
from ghostify.deployment import DeployedForms, FormsConfig, QuantisationConfig, compare_deployed
from ghostify.distillation import load_data
from ghostify.errors import InputsError, OptionError
from ghostify.nn.cifar import CifarResNet
from ghostify.tracing.counting import count_macs, count_params

QUICK = {"repeats": 5, "seconds": 1.0, "quantisation": QuantisationConfig(images=64, agreement=0.0, batch_sizes=(1,))}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    pytest.importorskip("sklearn")
    splits = load_data("digits")
    batches = [(images, labels) for images, labels in splits.train]
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]), list(splits.test)


@pytest.fixture(scope="module")
def networks(digits: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]) -> tuple[nn.Module, nn.Module]:
    """Trained for a moment, so that answers are more than chance."""
    images, labels, _ = digits
    torch.manual_seed(0)
    net = CifarResNet(1, in_channels=1)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for index in torch.randperm(len(images))[:1216].view(19, 64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images[index]), labels[index]).backward()
        optimiser.step()
    small = convert(net, ratio=2, calibration=images[:64], initialiser="sequential", example_inputs=images[:1])
    return net.train(), small.eval()


@pytest.fixture(scope="module")
def compared(
    digits: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]],
    networks: tuple[nn.Module, nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[DeployedForms, Path]:
    images, _, test = digits
    folder = tmp_path_factory.mktemp("forms") / "kept"
    config = FormsConfig(folder=folder, **QUICK)  # type: ignore[arg-type]
    forms = compare_deployed(*networks, example_inputs=images[:1], calibration=images[:64], data=test, config=config)
    return forms, folder


NAMES = ["original", "original int8", "Ghost", "Ghost int8"]


def test_every_network_is_there_in_both_precisions(compared: tuple[DeployedForms, Path]) -> None:
    forms, folder = compared
    assert [form.name for form in forms.forms] == NAMES
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.onnx" for name in NAMES)
    for form in forms.forms:
        assert form.bytes == (folder / f"{form.name}.onnx").stat().st_size
        assert 0 < form.weight_bytes < form.bytes
        assert form.params == forms[form.name.removesuffix(" int8")].params
        assert form.macs == forms[form.name.removesuffix(" int8")].macs
        assert 0 < form.latency.minimum <= form.latency.q25 <= form.latency.median <= form.latency.q75
        assert 0 < form.ratio_q25 <= form.ratio <= form.ratio_q75
    assert forms["original"].ratio == 1
    assert forms["original int8"].weight_bytes < 0.4 * forms["original"].weight_bytes
    assert forms.rounds >= 5
    assert forms.input_shapes == ((1, 1, 8, 8),)


def test_counts_are_those_of_the_networks(
    compared: tuple[DeployedForms, Path], networks: tuple[nn.Module, nn.Module]
) -> None:
    for name, model in zip(("original", "Ghost"), networks):
        assert compared[0][name].params == count_params(model)
        assert compared[0][name].macs == count_macs(model, torch.zeros(1, 1, 8, 8)).macs


def test_accuracy_is_that_of_the_files(
    compared: tuple[DeployedForms, Path], digits: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]
) -> None:
    forms, folder = compared
    images, labels = (torch.cat([batch[part] for batch in digits[2]]) for part in (0, 1))
    best = {}
    for name in NAMES:
        scores = onnxruntime.InferenceSession(folder / f"{name}.onnx").run(None, {"input": images.numpy()})[0]
        best[name] = torch.from_numpy(scores).argmax(1)
    assert forms.examples == len(images)
    for name in NAMES:
        assert forms[name].top1 == pytest.approx(float((best[name] == labels).float().mean()), abs=2e-3)
        agreement = float((best[name] == best["original"]).float().mean())
        assert forms[name].agreement == pytest.approx(agreement, abs=2e-3)
    assert forms["original"].agreement == 1
    assert forms["original"].top1 > 0.5
    assert forms["original int8"].agreement > 0.95


def test_networks_are_left_in_their_modes(
    compared: tuple[DeployedForms, Path], networks: tuple[nn.Module, nn.Module]
) -> None:
    assert all(module.training for module in networks[0].modules())
    assert not any(module.training for module in networks[1].modules())


def test_it_reads_as_table_and_json(compared: tuple[DeployedForms, Path]) -> None:
    forms, _ = compared
    text = str(forms)
    assert text.startswith("As deployed: onnxruntime")
    assert [line.split("  ")[0] for line in text.splitlines()[3:7]] == NAMES
    assert "not trained for it" in text
    again = json.loads(forms.to_json())
    assert [form["name"] for form in again["forms"]] == NAMES
    assert again["forms"][3]["latency"]["median"] == forms["Ghost int8"].latency.median


@pytest.mark.slow
def test_pruned_has_the_macs_of_ghost_and_is_said_to_be_untrained(images: Tensor) -> None:
    pytest.importorskip("torch_pruning")
    net = make_net()
    small = convert(net, ratio=2, example_inputs=images, initialiser="first")
    forms = compare_deployed(
        net, small, example_inputs=images, data=[images], config=FormsConfig(int8=False, pruning=True, repeats=5)
    )
    assert [form.name for form in forms.forms] == ["original", "Ghost", "pruned"]
    assert 0.8 * forms["Ghost"].macs < forms["pruned"].macs <= forms["Ghost"].macs
    assert forms["pruned"].params < forms["original"].params
    assert "norms as they were; not trained again" in str(forms)
    assert forms["pruned"].top1 is None  # no targets
    assert 0 <= forms["pruned"].agreement <= 1  # type: ignore[operator]


class Maps(nn.Module):
    """No class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_others_are_measured_too_and_without_class_scores_accuracy_is_left_out(images: Tensor) -> None:
    config = FormsConfig(int8=False, repeats=5)
    forms = compare_deployed(
        Maps(), Maps(), example_inputs=images, data=[images], others={"third": Maps()}, config=config
    )
    assert [form.name for form in forms.forms] == ["original", "Ghost", "third"]
    assert forms["Ghost"].top1 is None
    assert forms["Ghost"].agreement is None
    assert "no table of class scores" in str(forms)


def test_what_is_missing_is_named(images: Tensor) -> None:
    net = Maps()
    with pytest.raises(InputsError, match="calibration=None"):
        compare_deployed(net, net, example_inputs=images)
    floats = FormsConfig(int8=False, repeats=5)
    with pytest.raises(OptionError, match="others='Ghost'"):
        compare_deployed(net, net, example_inputs=images, others={"Ghost": net}, config=floats)
    with pytest.raises(InputsError, match="0 examples"):
        compare_deployed(net, net, example_inputs=images, data=[], config=floats)
    with pytest.raises(OptionError, match="repeats=1"):
        FormsConfig(repeats=1)
    with pytest.raises(OptionError, match="threads=0"):
        FormsConfig(threads=0)
