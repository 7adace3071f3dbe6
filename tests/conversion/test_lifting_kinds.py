"""Convolutions as functions in models of many kinds: all are lifted, and do what they did."""

import copy
import enum
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from odd_models import CallsAFunction, X, converted, error, made
from torch import nn

import ghostify
from ghostify.errors import PlanError
from ghostify.tracing import trace


class Mode(enum.Enum):
    PLAIN, DOUBLE = 1, 2


class HasALayerList(CallsAFunction):
    def forward(self, x, layers=()):
        return self.body(x)


class HasOptions(CallsAFunction):
    def forward(self, x, options={}):  # noqa: B006 - as people write it
        return {"scores": self.body(x), **options}


class HasAScale(CallsAFunction):
    def forward(self, x, scale=torch.tensor(2.0)):  # noqa: B008
        return self.body(x * scale)


class HasAMode(CallsAFunction):
    def forward(self, x, mode=Mode.DOUBLE, *, mask=None):
        return self.body(x * 2 if mode is Mode.DOUBLE and mask is None else x)


class HasAnUnusedNorm(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.extra = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.body(x)


class HasACompiledPart(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.compiled = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.ReLU()))

    def forward(self, x):
        return self.compiled(self.body(x))


class HoldsAList(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.all = [self.weight]

    def forward(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + self.b1(F.conv2d(x, self.all[0], padding=1)))
        return self.head((x + self.b2(self.c2(x))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(
    "kind",
    [HasALayerList, HasOptions, HasAScale, HasAMode, HasAnUnusedNorm, HasACompiledPart, HoldsAList],
)
@torch.no_grad()
def test_the_graph_answers_as_the_model(kind):
    model = made(kind)
    lifted = trace(model, X).model
    assert lifted is not model
    for training in (False, True):
        one, two = copy.deepcopy((model.train(training), lifted.train(training)))
        for answers in zip(
            *(out.values() if isinstance(out, dict) else [out] for out in (one(X), two(X))), strict=True
        ):
            torch.testing.assert_close(*answers)
    assert isinstance(lifted(X), dict) == (kind is HasOptions)
    assert converted(model.eval()).ghostify_plan.lifted == ("weight_conv",)


def test_what_the_example_does_not_give_is_no_argument_of_the_graph():
    lifted = trace(made(HasAMode), X).model
    with pytest.raises(TypeError, match="argument 'mode'"):
        lifted(X, mode=Mode.PLAIN)


def test_a_default_that_is_a_tuple_is_no_obstacle_to_a_graph():
    class HasASize(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))

        def forward(self, x, size=(3, 3)):
            return F.adaptive_avg_pool2d(self.convs(x), size)

    assert ghostify.plan(made(HasASize), example_inputs=X).trace_way == "fx"


class MakesLargeNumbers(CallsAFunction):
    """In half precision what it makes stays as exact as it was, and so does a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.most = torch.full((1, 8, 1, 1), 1e5)

    def forward(self, x):
        return self.body((x.float() * self.most / torch.tensor(1e5) * 1.001).to(x.dtype))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_tensors_that_are_no_buffers_keep_their_precision_and_are_not_stored(way):
    model = made(MakesLargeNumbers)
    lifted = way(trace(model, X).model)
    assert lifted.state_dict().keys() - model.state_dict().keys() == {"weight_conv.weight"}
    assert torch.equal(model(X), lifted(X))
    model.bfloat16()
    lifted.bfloat16()
    assert torch.equal(model(X.bfloat16()), lifted(X.bfloat16()))
    assert way(lifted).most.dtype == torch.float32


class Convolution(nn.Module):
    """As many write it: a module that holds the weight, and nothing else."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / 12)
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1)


class HoldsConvolutions(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.own = Convolution(16)
        self.weight = None

    def body(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + self.b1(self.own(x)))
        return self.head((x + self.b2(self.c2(x))).mean((2, 3)))

    def forward(self, x):
        return self.body(x)


def test_a_module_that_is_a_convolution_of_ones_own_is_replaced(tmp_path):
    model = made(HoldsConvolutions)
    small = converted(model)
    assert small.ghostify_plan.lifted == ("own",)
    assert {decision.site.name for decision in small.ghostify_plan.replaced} == {"own", "c2"}
    assert type(small.own).__name__ == "GhostConv2d"
    assert error(small, model) < 0.2
    lifted = trace(model, X).model
    assert lifted.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(lifted(X), model(X))
    again = ghostify.load(ghostify.save(small, tmp_path / "small"), base=made(HoldsConvolutions)).eval()
    assert torch.equal(again(X), small(X))


def test_a_network_of_such_modules_alone_is_converted():
    torch.manual_seed(0)
    model = nn.Sequential(Convolution(8), nn.ReLU(), Convolution(8), nn.ReLU(), Convolution(8)).eval()
    plan = converted(model).ghostify_plan
    assert plan.lifted == ("0", "2", "4")
    assert [decision.site.name for decision in plan.replaced] == ["2"]


def add_one(module, args, output):
    return output + 1


def no_gradient(module, wanted, given):
    return tuple(None if gradient is None else gradient * 0 for gradient in wanted)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_hooks_on_a_converted_model_are_kept(way):
    small = converted(made(HasAnUnusedNorm))
    before = small(X)
    small.register_forward_hook(add_one)
    assert torch.equal(way(small)(X), before + 1)
    small.register_full_backward_hook(no_gradient)
    way(small)(x := X.clone().requires_grad_()).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_of_a_compiled_model_are_not_the_model(way):
    lifted = trace(made(HasAnUnusedNorm), X).model
    lifted.compile(backend="eager")
    again = way(lifted)
    again.head.bias.add_(1)
    torch.testing.assert_close(again(X), lifted(X) + 1)


class CannotBeTraced(CallsAFunction):
    def forward(self, x):
        return self.body(x if x.sum() < 1e9 else -x)


def test_where_there_is_no_graph_the_user_is_told_what_stays():
    with pytest.warns(
        UserWarning, match=r"CannotBeTraced calls as functions stay as they are: there is no graph \(Trac"
    ):
        assert not ghostify.plan(made(CannotBeTraced), example_inputs=X).lifted

    class OnlyFunctions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x):
            return F.conv2d(x if x.sum() < 1e9 else -x, self.weight)

    with pytest.raises(PlanError, match=r"has no convolution module.*there is no graph"):
        ghostify.plan(OnlyFunctions(), example_inputs=X)


class BranchesInside(Convolution):
    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


def test_a_convolution_of_ones_own_that_cannot_be_traced_stays():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)), BranchesInside(8)).eval()
    with pytest.warns(UserWarning, match="stay as they are: 3: FX cannot trace what is inside"):
        plan = ghostify.plan(model, example_inputs=X)
    assert plan.trace_way == "fx"
    assert [decision.site.name for decision in plan.decisions] == ["0", "1", "2"]


class IsReordered(nn.Module):
    """What reads its Ghost unit is no layer that could take channels in another order."""

    def __init__(self):
        super().__init__()
        self.c0 = nn.Conv2d(8, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(16, 8, 3, 3) / 12)
        self.c2 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.c0(x).relu()
        return self.c2(x + F.conv2d(x, self.weight, padding=1, groups=2))


def test_ghost_units_of_a_lifted_model_keep_their_order_of_channels(tmp_path):
    small = converted(made(IsReordered))
    assert {"channel_order"} <= small.weight_conv._buffers.keys()
    for again in (
        ghostify.load(ghostify.save(small, tmp_path / "small"), base=made(IsReordered)).eval(),
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
    ):
        assert again.state_dict().keys() == small.state_dict().keys()
        assert torch.equal(again(X), small(X))


def test_what_hangs_on_gradients_still_hangs_there():
    model, seen = made(HasAnUnusedNorm), []
    # As DistributedDataParallel does.
    nodes = [parameter.view_as(parameter).grad_fn.next_functions[0][0] for parameter in model.parameters()]
    for node in nodes:
        node.register_hook(lambda *_: seen.append(1))
    model(X).sum().backward()
    before = len(seen)
    assert ghostify.plan(model, example_inputs=X).lifted
    model(X).sum().backward()
    assert len(seen) == 2 * before > 0


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))

    def forward(self, x, seen=[]):  # noqa: B006 - as people write it
        seen.append(x.mean())
        return self.convs(x)


def test_a_default_that_a_forward_changes_gets_no_stand_ins():
    model = made(Remembers)
    ghostify.plan(model, example_inputs=X)
    assert {type(value) for value in Remembers.forward.__defaults__[0]} == {torch.Tensor}


class HoldsBoth(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.bad, self.good = BranchesInside(16), Convolution(16)
        self.register_buffer("number", torch.ones(8).to(torch.uint16))

    def forward(self, x):
        x = F.relu(self.good(self.bad(F.relu(self.c0(x)))))
        x = F.relu(x + self.b1(F.conv2d(x, self.weight, padding=1)))
        return self.head((x + self.b2(self.c2(x))).mean((2, 3)))


def test_what_cannot_be_traced_does_not_keep_others_from_being_lifted():
    told = r"some convolutions that HoldsBoth calls as functions stay as they are: bad \(bad: FX cannot trace what is"
    with pytest.warns(UserWarning, match=told):
        small = converted(made(HoldsBoth))
    assert small.ghostify_plan.lifted == ("good", "weight_conv")
    again = ghostify.apply(small.ghostify_plan, made(HoldsBoth), calibration=X)
    assert torch.equal(again.eval()(X), small(X))


class HoldsAParameterList(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.all = nn.ParameterList([self.weight])
        del self.weight

    def forward(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + self.b1(F.conv2d(x, self.all[0], padding=1)))
        return self.head((x + self.b2(self.c2(x))).mean((2, 3)))


def test_weights_in_a_list_of_torchs_are_lifted():
    assert ghostify.plan(made(HoldsAParameterList), example_inputs=X).lifted == ("all.0_conv",)


class HoldsALock(HasAnUnusedNorm):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_planned():
    with pytest.warns(UserWarning, match=r"stay as they are: HoldsALock cannot be copied \(TypeError: cannot pickle"):
        assert not ghostify.plan(made(HoldsALock), example_inputs=X).lifted


class IsForGrayImages(HasAnUnusedNorm):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x):
        return super().forward(
            F.conv2d(x[:, :1], self.first * 1, padding=1) + F.conv2d(x[:, :1], self.first, padding=1)
        )


def test_a_convolution_of_one_channel_is_not_depthwise():
    with pytest.warns(UserWarning, match="some convolutions that IsForGrayImages calls as functions stay .* its own"):
        assert ghostify.plan(made(IsForGrayImages), example_inputs=X).lifted == ("weight_conv",)


class BlursAtTheEnd(HasAnUnusedNorm):
    """A depthwise convolution is cheap already: nobody needs to be told that it stays."""

    def __init__(self):
        super().__init__()
        self.blur = nn.Parameter(torch.ones(8, 1, 3, 3) / 9, requires_grad=False)

    def forward(self, x):
        x = F.conv2d(F.conv2d(x, self.blur, padding=1, groups=8), self.blur, padding=1, groups=8)
        return super().forward(x)


def test_nothing_is_said_of_depthwise_convolutions(recwarn):
    assert ghostify.plan(made(BlursAtTheEnd), example_inputs=X).lifted == ("weight_conv",)
    assert not [warning for warning in recwarn if "as functions" in str(warning.message)]
