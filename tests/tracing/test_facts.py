"""The facts about convolutions, and that finding them leaves no mark."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

import ghostify
from ghostify.errors import PlanError, TraceError
from ghostify.nn.cifar import resnet20
from ghostify.tracing import fingerprint, trace

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def by_name(model, inputs=X):
    return {site.name: site for site in trace(model, inputs).sites}


def test_the_facts_of_a_site():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, (3, 1), (2, 1), groups=4, bias=False)).eval()
    site = by_name(model)["1"]
    assert (site.kind, site.in_channels, site.out_channels, site.groups, site.bias) == ("Conv2d", 8, 12, 4, False)
    assert (site.kernel_size, site.stride, site.order) == ((3, 1), (2, 1), 1)
    assert (site.params, site.channel_params) == (12 * 2 * 3, 2 * 3)
    assert [(call.input_shape, call.output_shape, call.rows) for call in site.calls] == [((8, 10, 10), (12, 4, 10), 1)]


def test_sites_come_in_order_of_execution_not_of_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(8, 8, 3)
            self.never = nn.Conv2d(8, 8, 3)
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.last(self.first(x))

    assert [(site.name, site.order) for site in trace(Backwards(), X).sites] == [
        ("first", 0),
        ("last", 1),
        ("never", -1),
    ]


def test_the_chain_behind_a_site():
    model = resnet20()
    sites = by_name(model)
    assert sites["layer1.0.conv1"].chain.norm == "layer1.0.bn1"
    assert sites["layer1.0.conv1"].chain.activation == "function:relu"
    assert sites["layer1.0.conv2"].chain.norm == "layer1.0.bn2"
    assert sites["layer1.0.conv2"].chain.activation is None  # the addition comes first
    assert not any(site.chain.is_output for site in sites.values())


@pytest.mark.parametrize(
    ("norm", "activation", "obstacle"),
    [
        (nn.BatchNorm2d(8), nn.ReLU(), ""),
        (nn.BatchNorm2d(8), nn.Hardswish(), ""),
        (nn.BatchNorm2d(8, affine=False), nn.ReLU(), "its norm has no scale and shift"),
        (nn.GroupNorm(2, 8), nn.ReLU(), "its norm is a GroupNorm"),
        (nn.BatchNorm2d(8), nn.PReLU(), "its activation PReLU cannot be copied"),
    ],
)
def test_why_norm_and_activation_cannot_move_inside(norm, activation, obstacle):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), norm, activation, nn.Conv2d(8, 8, 1))
    assert by_name(model)["1"].chain.paper_obstacle == obstacle
    plan = ghostify.plan(model, spec=ghostify.GhostSpec(placement="paper"), example_inputs=X)
    assert [(d.site.name, d.spec.placement, d.reason) for d in plan.replaced] == [
        ("1", *(("linear", f"placement linear: {obstacle}") if obstacle else ("paper", "")))
    ]


def test_one_norm_behind_two_convolutions_stays_outside():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.c(self.norm(self.b(self.norm(self.a(x)))))

    chain = by_name(Shared())["b"].chain
    assert (chain.norm, chain.paper_obstacle) == (None, "its norm norm is used 2 times")


class Marking(nn.Module):
    """Does everything to itself that a forward can do, and fails for wide images."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("later", None)
        self.last = "nothing"
        self.cache, self.list, self.set = {"old": 1}, [1, 2], {3}

    def forward(self, x):
        self.calls += 1
        self.cache["new"] = self.cache["old"] = x
        self.list[0] = x
        self.list.append(x)
        self.set.add(4)
        self.later = x.mean()
        self.last, self.new = x, x
        self.norm.train()
        x = self.norm(self.conv(self.stem(x))) + torch.rand(())
        if x.shape[-1] > 20:
            raise ValueError("too wide")
        return self.head(x)


@pytest.mark.parametrize("width", [12, 40])
def test_no_mark_is_left_on_a_model_that_marks_itself(width):
    model = Marking().train()
    model.conv.eval()
    model.conv.weight.requires_grad_(False)
    hook = model.stem.register_forward_hook(lambda *_: None)
    modes = [module.training for module in model.modules()]
    attributes = [(set(vars(module)), set(module._buffers)) for module in model.modules()]
    tensors = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    x = torch.randn(2, 3, 12, width)
    random = torch.get_rng_state()
    given = x.clone()
    if width == 40:
        with pytest.raises(TraceError, match="too wide"):
            ghostify.convert(model, example_inputs=x)
    else:
        ghostify.convert(model, example_inputs=x, calibration=x)
    assert [module.training for module in model.modules()] == modes
    assert [(set(vars(module)), set(module._buffers)) for module in model.modules()] == attributes
    now = model.state_dict(keep_vars=True)
    assert now.keys() == tensors.keys()
    assert all(now[name] is same and torch.equal(same, value) for name, (same, value) in tensors.items())
    assert model.last == "nothing"
    assert model.later is None
    assert (model.cache, model.list, model.set) == ({"old": 1}, [1, 2], {3})
    assert not model.conv.weight.requires_grad
    assert list(model.stem._forward_hooks) == [hook.id]
    assert not model.conv._forward_hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert torch.is_grad_enabled()


def test_fx_that_takes_another_branch_is_not_believed():
    class ByMode(nn.Module):
        """Calls a convolution more often in Python than its graph tells: the count depends on a state that runs on."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.a(x)
            for _ in range(1 if isinstance(x, torch.fx.Proxy) else 2):
                x = self.b(x)
            return x

    facts = trace(ByMode(), X)
    assert facts.way == "recorded"
    assert facts.note == "its graph calls b 1 times, the run 2 times"
    assert len(facts.sites[1].calls) == 2


class OneByOne(nn.Module):
    """Goes through its batch image by image, which FX cannot follow."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x):
        return torch.stack([self.net(image) for image in x])


@pytest.mark.parametrize("batch", [1, 4])
def test_maps_without_a_batch_count_once_for_every_image(batch):
    model, x = OneByOne(), torch.randn(batch, 3, 12, 12)
    plan = ghostify.plan(model, example_inputs=x)
    assert plan.trace_way == "recorded"
    assert plan.macs == sum(decision.macs_before for decision in plan) == 27 * 8 * 100 + 72 * 8 * (64 + 36)
    small = ghostify.convert(model, example_inputs=x, calibration=x)
    assert ghostify.tracing.count_macs(small, x).macs == plan.macs_after


class OwnKind(_ConvNd):
    def __init__(self):
        super().__init__(3, 8, (3, 3), (1, 1), (0, 0), (1, 1), False, (0, 0), 1, True, "zeros")

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("model", "obstacle"),
    [
        (nn.Conv2d(3, 8, 3), "it is the whole model"),
        (nn.Sequential(OwnKind()), "OwnKind: not a kind of torch.nn.Conv1d to 3d"),
        (nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))), "computed anew"),
    ],
)
def test_obstacles(model, obstacle):
    assert obstacle in trace(model, X).sites[0].obstacle


def test_a_convolution_called_by_keyword_is_kept():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.b(input=self.a(x))

    assert by_name(Keyword())["b"].obstacle == "it is called in another way than conv(x)"


def test_models_that_cannot_be_traced_at_all():
    with pytest.raises(TraceError, match="lazy"):
        trace(nn.Sequential(nn.LazyConv2d(8, 3)), X)
    with pytest.raises(TraceError, match="compiled"):
        trace(torch.jit.trace(nn.Sequential(nn.Conv2d(3, 8, 3)), X), X)
    with pytest.raises(PlanError, match="no convolution module"):
        trace(nn.Sequential(nn.Flatten()), X)


def test_the_fingerprint_knows_structure_and_no_values():
    assert fingerprint(resnet20()) == fingerprint(resnet20().double())
    assert fingerprint(resnet20()) != fingerprint(resnet20(num_classes=11))
