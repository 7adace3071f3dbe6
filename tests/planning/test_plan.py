"""What a plan decides and says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostify
from ghostify import GhostSpec, Plan
from ghostify.errors import InputsError, NothingToConvertError, OptionError, PatternError, PlanError, TraceError
from ghostify.nn.cifar import resnet20

X = torch.zeros(1, 3, 32, 32)


class Zoo(nn.Module):
    """One convolution for every reason to keep one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.tiny = nn.Conv2d(16, 1, 1)
        self.narrow = nn.Conv2d(1, 16, 1)
        self.twice_same = nn.Conv2d(16, 16, 3, padding=1)
        self.twice_other = nn.Conv2d(16, 16, 3, padding=1)
        self.unused = nn.Conv2d(16, 16, 3)
        self.tied = nn.Conv2d(16, 16, 3, padding=1)
        self.tied_too = nn.Conv2d(16, 16, 3, padding=1)
        self.tied_too.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.read = nn.Conv2d(16, 16, 3, padding=1)
        self.hooked = nn.Conv2d(16, 16, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.flat = nn.Conv1d(16, 16, 3, padding=1)
        self.alias = self.plain = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 16, 3)

    def forward(self, x):
        x = self.narrow(self.tiny(self.depthwise(self.stem(x))))
        x = self.twice_same(self.twice_same(x))
        x = self.twice_other(x) + F.interpolate(self.twice_other(F.max_pool2d(x, 2)), scale_factor=2)
        x = self.tied_too(self.tied(x))
        x = self.read(self.normed(x)) + F.conv2d(x, self.read.weight, padding=1)
        x = self.flat(self.hooked(x).flatten(2)).unflatten(2, (8, 8))
        return self.head(self.plain(x))


def test_every_reason():
    torch.manual_seed(0)
    plan = ghostify.plan(Zoo(), example_inputs=torch.randn(1, 3, 8, 8))
    reasons = {decision.site.name: decision.reason for decision in plan}
    assert plan.trace_way == "fx"
    assert {decision.site.name for decision in plan.replaced} == {"twice_same", "flat", "alias"}
    assert reasons["stem"] == "first layer"
    assert reasons["depthwise"] == "depthwise: cheap already"
    assert reasons["tiny"] == "too few channels: 1 a group at ratio 2 leaves no ghost"
    assert reasons["narrow"] == "too small to pay: 32 parameters would become 96"
    assert reasons["twice_other"] == "called 2 times with different shapes"
    assert reasons["unused"] == "not reached by the example inputs"
    assert reasons["tied"] == "its weight is shared with tied_too"
    assert "parametrization" in reasons["normed"]
    assert "read directly" in reasons["read"]
    assert "hooks" in reasons["hooked"]
    assert reasons["head"] == "output layer"


def test_a_site_called_twice_and_one_with_an_alias_stay_one():
    torch.manual_seed(0)
    model = Zoo().eval()
    x = torch.randn(1, 3, 8, 8)
    small = ghostify.convert(model, example_inputs=x)
    assert small.alias is small.plain
    assert isinstance(small.alias, ghostify.GhostConv2d)
    site = next(d for d in small.ghostify_plan if d.site.name == "twice_same")
    assert len(site.site.calls) == 2
    assert site.macs_before == 2 * 16 * 16 * 9 * 64


def test_an_override_does_not_outrank_an_obstacle():
    torch.manual_seed(0)
    names = ["depthwise", "twice_other", "unused", "tied", "normed", "read", "hooked", "narrow"]
    plan = ghostify.plan(Zoo(), example_inputs=torch.randn(1, 3, 8, 8), overrides=dict.fromkeys(names, 2))
    decisions = {decision.site.name: decision for decision in plan}
    assert not any(decisions[name].replaced for name in names)
    assert all("override" not in decisions[name].reason for name in names)


def test_macs_can_be_the_reason_where_parameters_are_not():
    """Parameters of a subclass's own count in its favour; its MACs do not shrink."""

    class Scaled(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = nn.Parameter(torch.ones(args[1], 50))

        def forward(self, x):
            return super().forward(x) * self.scale.mean(1)[:, None, None]

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(4, 8, 1), nn.Conv2d(8, 16, 3))
    plan = ghostify.plan(model, example_inputs=X, overrides={"2": 2})
    assert list(plan)[1].reason == f"too small to pay: {8 * 4 * 1024:,} MACs would become {(4 * 4 + 4 * 9) * 1024:,}"


@pytest.mark.parametrize("ratio", [1.1, 1.5, 2, 3.7, 16])
@pytest.mark.parametrize("dw_size", [1, 3, 5])
@pytest.mark.parametrize("fusion", ["concat", "add", "mul"])
def test_no_site_is_ever_made_dearer(ratio, dw_size, fusion):
    spec = GhostSpec(ratio, dw_size, fusion)
    plan = ghostify.plan(resnet20(), spec=spec, example_inputs=X, overrides={"*": spec})
    assert plan.replaced
    for decision in plan.replaced:
        assert decision.params_after < decision.params_before
        assert decision.macs_after < decision.macs_before
    for decision in plan:
        if not decision.replaced:
            assert decision.reason
            assert (decision.params_after, decision.macs_after) == (decision.params_before, decision.macs_before)


def test_overrides_outrank_skip_and_habits_and_the_last_match_wins():
    plan = ghostify.plan(
        resnet20(),
        ratio=2,
        example_inputs=X,
        skip=["layer1.*", "layer3.*"],
        overrides={"conv1": 4, "layer1.0.*": GhostSpec(3, 5), "layer1.0.conv2": None},
    )
    specs = {decision.site.name: decision.spec for decision in plan}
    assert specs["conv1"] == GhostSpec(4)
    assert specs["layer1.0.conv1"] == GhostSpec(3, 5)
    assert specs["layer1.0.conv2"] is None
    assert specs["layer1.1.conv1"] is None
    assert specs["layer2.0.conv1"] == GhostSpec(2)


def test_a_plan_is_data():
    plan = ghostify.plan(resnet20(), example_inputs=X)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="not a ghostify plan"):
        Plan.from_json(plan.to_json().replace('"model"', '"modell"', 1))
    site = '"site":{' if '"site":{' in plan.to_json() else '"site": {'
    for inside in (site, '"spec": {'):
        assert inside in plan.to_json()
        with pytest.raises(PlanError, match="extra"):
            Plan.from_json(plan.to_json().replace(inside, inside + '"extra": 1,', 1))
    with pytest.raises(PlanError, match="ratio"):
        Plan.from_json(plan.to_json().replace('"ratio": 2.0', '"ratio": 0.5', 1))
    assert "layer3.2.conv2" in str(plan)
    assert "18 of 19 convolutions" in str(plan)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"ratio": 0.9}, OptionError, "ratio=0.9"),
        ({"ratio": "2"}, OptionError, "ratio='2'"),
        ({"overrides": {"conv1": True}}, OptionError, "neither a ratio"),
        ({"overrides": {"conv1": 0.5}}, OptionError, "ratio=0.5"),
        ({"skip": ["layer1.*", "leyer2.*"]}, PatternError, "leyer2.*layer2"),
        ({"example_inputs": ()}, InputsError, "no tensor"),
        ({"ratio": 2, "spec": GhostSpec(2)}, OptionError, "both given"),
        ({"overrides": {"conv1": "x"}}, OptionError, "neither a ratio"),
        ({"example_inputs": None}, InputsError, "example_inputs=None"),
        ({"example_inputs": "image"}, InputsError, "type str"),
        ({"example_inputs": torch.zeros(1, 4, 32, 32)}, TraceError, r"shape \(1, 4, 32, 32\)"),
        ({"example_inputs": torch.zeros(0, 3, 32, 32)}, InputsError, "empty"),
        ({"skip": "layre1.*"}, PatternError, "layer1"),
        ({"overrides": {"layer9.*": 2}}, PatternError, "overrides='layer9"),
        ({"skip": "layer*"}, NothingToConvertError, "skipped by 'layer"),
    ],
)
def test_bad_input_is_told_before_anything_happens(options, error, told):
    with pytest.raises(error, match=told):
        ghostify.plan(resnet20(), **{"example_inputs": X, **options})


def test_a_model_without_convolutions():
    with pytest.raises(PlanError, match="no convolution"):
        ghostify.plan(nn.Linear(3, 3), example_inputs=torch.zeros(1, 3))


def test_the_model_is_left_bit_identical():
    model = resnet20().train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for x in (X, torch.zeros(1, 4, 32, 32)):
        try:
            ghostify.plan(model, example_inputs=x)
        except TraceError:
            assert x.shape[1] == 4
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
