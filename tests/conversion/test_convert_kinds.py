"""Models as they come: wrapped, in half precision, without values, frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostify
from ghostify.errors import ArtefactError, OptionError, TraceError
from ghostify.nn.cifar import CifarResNet
from ghostify.tracing import trace

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return CifarResNet(1, width=8).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda model: compiled(nn.DataParallel(model))])
def test_wrappers_are_taken_off(wrap, tmp_path):
    plain = ghostify.convert(net(), example_inputs=X)
    small = ghostify.apply(ghostify.plan(wrap(net()), example_inputs=X), wrap(net()))
    assert type(small) is CifarResNet
    assert torch.equal(small(X), plain(X))
    again = ghostify.load(ghostify.save(wrap(small), tmp_path / "small"), base=wrap(net()))
    assert torch.equal(again(X), plain(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("calibration", [None, torch.randn(32, 3, 16, 16)])
def test_types_are_kept(dtype, calibration):
    small = ghostify.convert(net().to(dtype), example_inputs=X, calibration=calibration)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert small(X.to(dtype)).isfinite().all()


def test_memory_format_is_kept():
    model = net().to(memory_format=torch.channels_last)
    small = ghostify.convert(model, example_inputs=X, calibration=X)
    primary = small.layer1[0].conv1.primary_conv.weight
    assert primary.is_contiguous(memory_format=torch.channels_last)


def test_a_model_on_meta_is_planned_and_converted_in_structure():
    plan = ghostify.plan(net(), example_inputs=X)
    model = net().to("meta")
    assert ghostify.plan(model, example_inputs=X) == plan
    small = ghostify.apply(plan, model)
    assert small(X.to("meta")).shape == (4, 10)
    assert sum(parameter.numel() for parameter in small.parameters()) == plan.params_after
    assert all(parameter.is_meta for parameter in small.parameters())
    with pytest.raises(OptionError, match="initialiser='weights' needs values"):
        ghostify.apply(plan, model, initialiser="weights")


def test_a_base_on_meta_is_refused(tmp_path):
    stored = ghostify.save(ghostify.convert(net(), example_inputs=X), tmp_path / "small")
    with pytest.raises(ArtefactError, match="meta"):
        ghostify.load(stored, base=net().to("meta"))


def test_frozen_layers_stay_frozen():
    model = net()
    model.layer1.requires_grad_(False)
    small = ghostify.convert(model, example_inputs=X, calibration=X)
    assert not any(parameter.requires_grad for parameter in small.layer1[0].conv1.primary_conv.parameters())
    assert all(parameter.requires_grad for parameter in small.layer2.parameters())


def test_quantised_modules_get_a_clear_error():
    model = nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(TraceError, match="module '0' is a quantised Conv2d"):
        ghostify.plan(model, example_inputs=X)


class Pyramid(nn.Module):
    """Reads a dict, a list and a flag; returns a dict of tuples."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.volume = nn.Conv3d(8, 16, 3, padding=1)

    def forward(self, images, *, extra=None, deep=False):
        first = self.right(self.left(images["image"])) + extra[0]
        second = self.volume(first.unsqueeze(2)) if deep else first
        return {"maps": (first, second), "size": first.shape[-1], "nothing": None}


def test_several_inputs_and_structured_outputs():
    torch.manual_seed(0)
    model = Pyramid().eval()
    inputs = {"images": {"image": X}, "extra": [torch.ones(1)], "deep": True}
    before = copy.deepcopy(model.state_dict())
    small = ghostify.convert(model, example_inputs=inputs, overrides={"volume": 2, "right": 2}, initialiser="first")
    made = small({"image": X}, extra=[torch.ones(1)], deep=True)
    assert made["size"] == 16
    assert made["maps"][1].shape == (4, 16, 1, 16, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {decision.site.name for decision in small.ghostify_plan.replaced} == {"right", "volume"}


class Functional(nn.Module):
    """Convolutions that are called as functions: with its own weights, and with an inner owner's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.owner = nn.Module()
        self.owner.weight = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.owner.bias = nn.Parameter(torch.randn(16))
        self.kernel = nn.Parameter(torch.randn(16, 8, 3, 3) / 9)
        self.twice = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(F.conv2d(self.stem(x), self.owner.weight, self.owner.bias, padding=1))
        x = F.conv_transpose2d(x, self.kernel, None, stride=2, groups=2)
        x = self.norm(F.conv2d(x, self.twice, padding="same") + F.conv2d(x, self.twice, padding=1))
        return self.head(x.mean((2, 3)))


def test_functional_convolutions_become_modules_of_a_graph(tmp_path):
    torch.manual_seed(0)
    model = Functional().eval()
    plan = ghostify.plan(model, ratio=2, example_inputs=X)
    assert plan.lifted == ("owner", "kernel_conv")
    assert {decision.site.name for decision in plan.replaced} == {"owner", "kernel_conv"}
    assert plan.params == sum(parameter.numel() for parameter in model.parameters())
    assert "become modules of a torch.fx.GraphModule" in str(plan)
    small = ghostify.apply(plan, model, calibration=torch.randn(64, 3, 16, 16))
    assert isinstance(small, torch.fx.GraphModule)
    assert type(small.owner).__name__ == type(small.kernel_conv).__name__ == "GhostConv2d"
    assert sum(parameter.numel() for parameter in small.parameters()) == plan.params_after
    assert ghostify.tracing.count_macs(small, X).macs == plan.macs_after
    again = ghostify.load(ghostify.save(copy.deepcopy(small), tmp_path / "small"), base=model)
    assert torch.equal(again(X), small(X))
    assert not small.training
    assert not model.training
    small.train()
    assert not model.norm.training
    kept = ghostify.convert(model, example_inputs=X, overrides={"owner": 1.1, "kernel_conv": None})
    assert {"owner.weight", "owner.bias"}.isdisjoint(kept.state_dict())
    assert "kernel_conv.weight" in kept.state_dict()


def test_lifting_alone_computes_the_same_and_keeps_keys():
    torch.manual_seed(0)
    model = Functional().eval()
    facts = trace(model, X)
    assert torch.equal(facts.model(X), model(X))
    assert {"owner.weight", "owner.bias", "kernel_conv.weight", "twice"} <= set(facts.model.state_dict())
    assert facts.model.owner.weight is model.owner.weight


def test_a_model_keeps_its_class_where_no_functional_convolution_is_replaced():
    torch.manual_seed(0)
    small = ghostify.convert(
        Functional().eval(), example_inputs=X, overrides={"owner": None, "kernel_conv": None, "stem": 2}
    )
    assert type(small) is Functional
    assert small.ghostify_plan.lifted == ()


class ScaledInput(nn.Conv2d):
    """A number for every *input* channel, of which there are as many as output channels."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.rand(self.in_channels))

    def forward(self, x):
        return super().forward(x * self.scale.view(-1, 1, 1))


class ScaledOutput(ScaledInput):
    def forward(self, x):
        return nn.Conv2d.forward(self, x) * self.scale.view(-1, 1, 1)


def test_numbers_of_input_channels_are_not_taken_for_those_of_output_channels():
    def model(kind):
        return nn.Sequential(nn.Conv2d(3, 16, 3), kind(16, 16, 3), nn.Flatten(), nn.Linear(2304, 2)).eval()

    small = ghostify.convert(model(ScaledOutput), example_inputs=X, initialiser="first")
    assert small[1].primary_conv.scale.shape == (8,)
    with pytest.raises(ghostify.GhostifyError, match="some of its filters alone give other maps than they give toget"):
        ghostify.convert(model(ScaledInput), example_inputs=X)


class Versioned(nn.Module):
    """As torchvision's MNASNet: a state without its version is refused."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.net = CifarResNet(1, width=8)

    def forward(self, x):
        return self.net(x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_that_ask_for_their_version_are_loaded_and_distilled(tmp_path):
    model = Versioned().eval()
    small = ghostify.convert(model, example_inputs=X)
    again = ghostify.load(ghostify.save(small, tmp_path / "small"), base=model)
    assert torch.equal(again(X), small(X))
    ghostify.distill(small, teacher=model, data=[X], val=[X], epochs=1)


class Marked(nn.Module):
    """As torchvision's quantizable models before they are quantised: an addition is a module."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.add = torch.ao.nn.quantized.FloatFunctional()
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.add.add(x, self.conv(x)).mean((2, 3)))


def test_a_float_model_that_could_be_quantised_is_converted():
    assert len(ghostify.convert(Marked().eval(), example_inputs=X).ghostify_plan.replaced) == 1


class Detector(nn.Module):
    """How many things it finds depends on values."""

    def __init__(self, listed):
        super().__init__()
        self.net, self.listed = CifarResNet(1, width=8, num_classes=64), listed

    def forward(self, x):
        scores = self.net(x).flatten()
        found = scores[scores > scores.mean()][:, None]
        return [{"scores": found}] if self.listed else found


def test_numbers_of_things_found_may_differ_and_other_shapes_may_not():
    torch.manual_seed(0)
    model = Detector(listed=True).eval()
    small = ghostify.convert(model, example_inputs=X, initialiser="random")
    assert small(X)[0]["scores"].shape != model(X)[0]["scores"].shape
    report = ghostify.compare(model, small, example_inputs=X, latency=None)
    assert report.compressed.params < report.original.params
    with pytest.raises(ghostify.errors.ConversionError, match="returns tensors of shapes"):
        ghostify.convert(Detector(listed=False).eval(), example_inputs=X, initialiser="random")
