"""The order of a Ghost unit's channels, folded into what follows: same outputs, no index."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostify
from ghostify.conversion import INITIALISERS, channel_order, rewriter
from ghostify.errors import ConversionError, PlanMismatchError
from ghostify.nn.cifar import resnet20
from ghostify.planning.choice import choose_layout
from ghostify.tracing import trace


def randomised(model):
    """With norms that do something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
    return model


def indexed(plan):
    """The same plan without folding."""
    decisions = (dataclasses.replace(d, order="index" if d.replaced else "") for d in plan)
    return dataclasses.replace(plan, decisions=tuple(decisions))


class Bottlenecks(nn.Module):
    """Two residual blocks with gates, as in an SE-ResNet; a flattened head of two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5))

    @staticmethod
    def block():
        conv = {
            "one": nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
            "two": nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)),
            "down": nn.Conv2d(24, 12, 1),
            "up": nn.Conv2d(12, 24, 1),
            "three": nn.Sequential(nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)),
        }
        return nn.ModuleDict(conv)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            y = F.relu(block["two"](block["one"](x)))
            gate = torch.sigmoid(block["up"](F.relu(block["down"](y.mean((2, 3), keepdim=True)))))
            x = F.relu(x + block["three"](y * gate))
        return self.head(x)


class Dense(nn.Module):
    """Concatenation, a norm over several streams, a grouped convolution, a transposed one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.c = nn.Conv2d(20, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.act = nn.PReLU(12)
        self.e = nn.ConvTranspose2d(12, 8, 2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = torch.tanh(self.a(x))
        x = self.norm(torch.cat([self.b(a), a], 1))
        return self.out(self.e(self.act(self.up(self.d(self.c(x))))))


@pytest.mark.parametrize("fusion", ["concat", "add"])
@pytest.mark.parametrize("placement", ["linear", "paper"])
@pytest.mark.parametrize("make", [Bottlenecks, Dense, resnet20])
def test_folded_and_indexed_compute_the_same(make, placement, fusion, monkeypatch):
    model, x = randomised(make()), torch.randn(2, 3, 16, 16)
    spec = ghostify.GhostSpec(2, dw_size=1, fusion=fusion, placement=placement)
    overrides = {"stem": 2} if make is Bottlenecks else {"a": 2} if make is Dense else None
    plan = ghostify.plan(model, example_inputs=x, spec=spec, overrides=overrides)
    folded = [d.site.name for d in plan.replaced if d.order in ("folded", "shared")]
    assert folded
    small = ghostify.apply(plan, model, calibration=x).eval()
    monkeypatch.setattr(rewriter, "fold_orders", lambda *_: None)
    slow = ghostify.apply(plan, model, calibration=x).eval()
    units = {name: small.get_submodule(name) for name in folded}
    assert all(unit.channel_order is None for unit in units.values())
    assert any(unit.output_channels is not None for unit in units.values())
    for name, unit in units.items():
        assert torch.equal(unit.layout(), slow.get_submodule(name).layout())
    with torch.no_grad():
        torch.testing.assert_close(small(x), slow(x), rtol=1e-4, atol=1e-5)
        small.train()
        slow.train()
        torch.testing.assert_close(small(x), slow(x), rtol=1e-3, atol=1e-4)


def test_what_is_folded_and_what_keeps_an_index():
    plan = ghostify.plan(Bottlenecks(), example_inputs=torch.randn(1, 3, 16, 16))
    orders = {d.site.name: d.order for d in plan}
    assert {orders[f"blocks.{i}.{name}"] for i in (0, 1) for name in ("one.0", "down")} == {"folded"}
    # The gate joins a larger stream; two units that are alike write the residual one.
    assert {orders[f"blocks.{i}.up"] for i in (0, 1)} == {"index"}
    assert {orders[f"blocks.{i}.three.0"] for i in (0, 1)} == {"shared"}
    assert orders["stem"] == orders["blocks.0.two.0"] == ""
    assert "folded" in str(plan)
    assert ghostify.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", INITIALISERS)
def test_units_that_share_an_order_choose_the_same_channels(name):
    model, x = randomised(Bottlenecks()), torch.randn(8, 3, 16, 16)
    small = ghostify.convert(model, example_inputs=x, calibration=x, initialiser=name, seed=1)
    units = [small.get_submodule(f"blocks.{i}.three.0") for i in (0, 1)]
    assert torch.equal(units[0].layout(), units[1].layout())
    assert all(unit.channel_order is None for unit in units)
    if name not in ("random", "first"):
        assert not torch.equal(units[0].layout(), torch.arange(16))


def test_the_shared_choice_is_the_best_for_all_together():
    spec = ghostify.GhostSpec(2)
    model = Bottlenecks()
    plan = ghostify.plan(model, example_inputs=torch.randn(1, 3, 16, 16), spec=spec)
    decisions = {d.site.name: d for d in plan.replaced}
    streams = trace(model, torch.randn(1, 3, 16, 16)).streams
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(16, 16, generator=generator) + torch.eye(16) for _ in range(2))
    choices = channel_order.shared_choices(decisions, streams, {"blocks.0.three.0": one, "blocks.1.three.0": other})
    both, alone, apart = (choose_layout(explained, spec) for explained in (one + other, one, other))
    assert not torch.equal(both, alone)
    assert not torch.equal(both, apart)
    assert all(torch.equal(choice.layout, both) for choice in choices.values())
    assert choices["blocks.0.three.0"].explained is one


def test_those_that_are_alike_share_though_another_is_not():
    class Three(Bottlenecks):
        def __init__(self):
            super().__init__()
            self.blocks.append(self.block())

    plan = ghostify.plan(Three(), example_inputs=torch.randn(1, 3, 16, 16), overrides={"blocks.0.three.0": 4})
    orders = {d.site.name: d.order for d in plan}
    assert [orders[f"blocks.{i}.three.0"] for i in range(3)] == ["index", "shared", "shared"]


def test_a_start_of_ones_own_may_choose_differently():
    def start(conversion):
        for seed, decision in enumerate(conversion.plan.replaced):
            layout = torch.randperm(decision.site.out_channels, generator=torch.Generator().manual_seed(seed))
            conversion.unit(decision).take_channels(conversion.original(decision), layout)

    model, x = randomised(Bottlenecks()), torch.randn(2, 3, 16, 16)
    small = ghostify.convert(model, example_inputs=x, initialiser=start)
    first, second = (small.get_submodule(f"blocks.{i}.three.0") for i in (0, 1))
    assert first.channel_order is None
    assert second.channel_order is not None  # what comes out is checked at the conversion


def test_other_specs_and_promised_shares_keep_an_index():
    model, x = randomised(Bottlenecks()), torch.randn(8, 3, 16, 16)
    plans = [
        ghostify.plan(model, example_inputs=x, overrides={"blocks.0.three.0": 4}),
        ghostify.plan(model, keep=0.05, calibration=x),
    ]
    for plan in plans:
        orders = {d.site.name: d.order for d in plan.replaced}
        assert {orders[f"blocks.{i}.three.0"] for i in (0, 1)} == {"index"}


def test_a_kept_layer_with_groups_cannot_follow():
    class Sum(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[3](self[1](x) + self[2](x))

    def planned(groups):
        model = Sum(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 2, 1))
        made = ghostify.plan(model, example_inputs=torch.randn(1, 3, 8, 8), skip="2")
        return {d.site.name: d.order for d in made}["1"]

    assert (planned(1), planned(2)) == ("folded", "index")


def test_a_folded_model_is_stored_and_read(tmp_path):
    model, x = randomised(Bottlenecks()), torch.randn(2, 3, 16, 16)
    small = ghostify.convert(model, example_inputs=x).eval()
    ghostify.save(small, tmp_path / "small")
    again = ghostify.load(tmp_path / "small", base=Bottlenecks())
    assert torch.equal(small(x), again(x))
    name = "blocks.0.one.0"
    assert torch.equal(small.get_submodule(name).layout(), again.get_submodule(name).layout())


def test_no_gather_where_the_order_is_folded(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, x = randomised(Bottlenecks()).eval(), torch.randn(2, 3, 16, 16)
    plan = ghostify.plan(model, example_inputs=x)
    gathers = []
    for made in (plan, indexed(plan)):
        small = ghostify.apply(made, model, example_inputs=x)
        ghostify.export_onnx(small, tmp_path / "small.onnx", example_inputs=x)
        nodes = onnx.load(tmp_path / "small.onnx").graph.node
        gathers.append(sum(node.op_type == "Gather" for node in nodes))
    orders = [d.order for d in plan.replaced]
    assert gathers == [orders.count("index"), len(orders)]
    assert "shared" in orders


def test_outputs_that_change_are_an_error(monkeypatch):
    monkeypatch.setattr(channel_order, "_permute_inputs", lambda module, order: None)
    with pytest.raises(ConversionError, match="changed the outputs by"):
        ghostify.convert(randomised(Bottlenecks()), example_inputs=torch.randn(2, 3, 16, 16))


def test_a_plan_cannot_ask_for_what_the_graph_does_not_show():
    model, x = randomised(Dense()), torch.randn(2, 3, 16, 16)
    plan = ghostify.plan(model, example_inputs=x, spec=ghostify.GhostSpec(2, dw_size=1), overrides={"out": 2})
    assert plan.decisions[-1].order == "index"
    wrong = (*plan.decisions[:-1], dataclasses.replace(plan.decisions[-1], order="folded"))
    with pytest.raises(PlanMismatchError, match="site='out'"):
        ghostify.apply(dataclasses.replace(plan, decisions=wrong), model, example_inputs=x)


def test_outputs_in_a_dataclass_are_compared_too(monkeypatch):
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = randomised(Bottlenecks())

        def forward(self, x):
            return Output(self.net(x))

    model, images = Wrapped().eval(), torch.randn(2, 3, 16, 16)
    ghostify.convert(model, example_inputs=images)
    monkeypatch.setattr(channel_order, "_permute_inputs", lambda *args: None)
    with pytest.raises(ConversionError, match="Folding the channel order"):
        ghostify.convert(model, example_inputs=images)


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_public_method_hands_out_keeps_its_order(packed):
    @dataclasses.dataclass
    class Features:
        maps: torch.Tensor

    class Backbone(nn.Module):
        """As timm's: users call forward_features themselves."""

        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)
            self.head = nn.Linear(16, 5)

        def forward_features(self, x):
            maps = torch.relu(self.last(torch.relu(self.inner(torch.relu(self.stem(x))))))
            return Features(maps) if packed else maps

        def forward(self, x):
            made = self.forward_features(x)
            return self.head((made.maps if packed else made).mean((2, 3)))

    torch.manual_seed(0)
    model, images = Backbone(), torch.randn(32, 3, 16, 16)
    plan = ghostify.plan(model, example_inputs=images[:1])
    assert [decision.order for decision in plan.replaced] == ["folded", "index"]
    assert not {"forward_features", "forward"} & vars(model).keys()  # as it was
    folded, kept = (ghostify.apply(some, model, calibration=images) for some in (plan, indexed(plan)))
    made, wanted = (some.forward_features(images) for some in (folded, kept))
    assert torch.allclose(made.maps if packed else made, wanted.maps if packed else wanted, atol=1e-5)


def test_a_dataclass_that_holds_itself_and_less_than_it_says():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        itself: object = None
        later: object = dataclasses.field(init=False)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.site, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

        def forward(self, x):
            made = Output(self.head(self.site(torch.relu(self.stem(x))).mean((2, 3))))
            made.itself = made
            return made

    small = ghostify.convert(Odd(), example_inputs=torch.randn(2, 3, 8, 8))
    assert small(torch.randn(5, 3, 8, 8)).logits.shape == (5, 2)
