"""Models that do what a converter does not expect, each converted right, or refused with the cause."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from odd_models import Base, X, converted, error, made
from torch import nn

import ghostify
from ghostify.conversion import INITIALISERS
from ghostify.errors import ConversionError, InputsError


def test_norms_whose_scales_are_all_zero():
    model = made()
    nn.init.zeros_(model.b2.weight)
    assert error(converted(model), model) < 0.2


def test_calibration_batches_of_several_sizes():
    sizes = [torch.randn(4, 8, 12, 12), torch.randn(4, 8, 16, 20), torch.randn(2, 8, 12, 12)]
    model = made()
    assert error(converted(model, calibration=sizes), model) < 0.5


def test_planning_does_not_count_as_a_power_iteration():
    model = made().train()
    nn.utils.parametrizations.spectral_norm(model.c1)
    state = copy.deepcopy(model.state_dict())
    ghostify.plan(model, example_inputs=X)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_functions_that_call_the_original_are_found_out():
    class Closures(Base):
        def __init__(self):
            super().__init__()
            self.stages = [lambda x: self.c0(x), lambda x: F.relu(self.b1(self.c1(x)))]

        def forward(self, x):
            for stage in self.stages:
                x = stage(x)
            return self.head(x.mean((2, 3)))

    model = made(Closures).train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionError, match=r"site='c1' is not called in the converted model.*constructor"):
        converted(model, initialiser="first")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_a_forward_leaves_behind_stays_away_from_the_copy():
    class Counts(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.latest, self.queue = None, collections.deque(maxlen=3)

        def forward(self, x):
            self.calls += 1
            self.latest = x
            self.queue.append(1)
            return self.body(x if x.sum() > -1e9 else -x)  # no graph

    model = made(Counts)
    small = converted(model)
    for each in (model, small):
        assert (float(each.calls), each.latest, list(each.queue)) == (0, None, [])


def test_models_that_draw_random_numbers_are_converted_alike_each_time():
    class Noisy(Base):
        def forward(self, x):
            return self.body(x + 0.01 * torch.randn_like(x))

    before = torch.get_rng_state()
    one, two = (converted(made(Noisy), seed=1) for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    torch.set_rng_state(before)
    model = Noisy()
    state = torch.get_rng_state()
    converted(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("shuffle", "its forward makes other than its 16 channels"),
        ("normed", "some of its filters alone give other maps than they give together"),
        ("softmax", "some of its filters alone give other maps than they give together"),
    ],
)
def test_convolutions_whose_channels_depend_on_each_other_are_kept(kind, reason):
    class Odd(nn.Conv2d):
        def forward(self, x):
            if kind == "normed":
                return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)
            maps = super().forward(x)
            return F.pixel_shuffle(maps, 2) if kind == "shuffle" else maps.softmax(1)

    torch.manual_seed(0)
    after = nn.Conv2d(4 if kind == "shuffle" else 16, 16, 3)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), Odd(16, 16, 3), after, nn.Flatten(), nn.LazyLinear(2)
    )
    model(X)
    small = converted(model)
    reasons = {d.site.name: d.reason for d in small.ghostify_plan}
    assert reasons["2"] == reason
    assert type(small[2]) is Odd


def test_norms_that_share_parameters_stay_outside_the_unit():
    class Reads(Base):
        def forward(self, x):
            return self.body(x) * self.b1.weight.mean()

    spec = ghostify.GhostSpec(2, placement="paper")
    tied = made()
    tied.b2.weight = tied.b1.weight
    small = converted(tied, spec=spec)
    assert small.b2.weight is small.b1.weight
    assert {d.reason for d in small.ghostify_plan.replaced} == {"placement linear: its norm shares parameters"}
    small = converted(made(Reads), spec=spec)
    reasons = {d.site.name: d.reason for d in small.ghostify_plan.replaced}
    assert reasons == {"c1": "placement linear: its norm is read directly, too", "c2": ""}


class Branches(Base):
    def forward(self, x):
        x = F.relu(self.c0(x))
        x = self.c1(x) if x.mean() > 0.2 else x
        try:
            x = self.c2(x)
        except Exception:
            x = -x
        return self.head(x.mean((2, 3)))


def test_calibration_batches_of_which_only_some_reach_a_site():
    batches = [0.01 * X, X, 2 * X]
    reached = []

    def fit(conversion):
        for visit in INITIALISERS["least-squares"].__globals__["_visits"](conversion, conversion.facts.model):
            reached.append((visit.decision.site.name, len(visit.inputs)))

    model = made(Branches)
    converted(model, calibration=batches, initialiser=fit)
    assert reached == [("c1", 2), ("c2", 3)]


def test_a_plan_is_applied_without_inputs_whatever_the_arguments_are_called():
    class Positional(Base):
        def forward(self, x, /, *, flag=True):
            return self.body(x)

    class Any(Base):
        def forward(self, *args):
            return self.body(args[0])

    for kind in (Positional, Any):
        model = made(kind)
        ghostify.apply(ghostify.plan(model, example_inputs=X), model)


def test_calibration_with_other_arguments_than_the_example():
    class Masked(Base):
        def forward(self, x, mask=None):
            return self.body(x if mask is None else x * mask)

    example = {"x": X, "mask": torch.ones(8, 1, 12, 12)}
    with pytest.raises(InputsError, match="calibration gives the arguments x, and example_inputs gives x, mask"):
        converted(made(Masked), example_inputs=example)
    with pytest.raises(InputsError, match="does not fit the model's forward"):
        converted(made(Masked), calibration=[{"y": X}])


def test_a_copy_that_makes_its_modules_anew_is_refused():
    class Anew(Base):
        def __deepcopy__(self, memo):
            return Anew()

    with pytest.raises(ConversionError, match="is not replaced in a copy of Anew"):
        converted(made(Anew))


def test_extra_state_of_a_convolution_that_is_no_tensor():
    class Extra(nn.Conv2d):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Conv2d(8, 16, 3), Extra(16, 16, 3), nn.Conv2d(16, 4, 1))
    assert [d.site.name for d in converted(model).ghostify_plan.replaced] == ["1"]


def test_few_numbers_make_no_large_kernels():
    """One image, one pixel: features that do not vary explain nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()
    small = converted(model, calibration=X[:1], overrides={"3": ghostify.GhostSpec(2, dw_size=1)})
    kernels = small[3].cheap_operation.kernels()
    assert float(kernels.abs().max()) < 10
    assert error(small, model) < 2


def test_frozen_layers_become_frozen_units():
    small = converted(made().requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in small.parameters())


class Blocks(Base):
    """Residual additions of maps with a batch, or of the one map in it."""

    def __init__(self, single):
        super().__init__()
        self.single = single

    def forward(self, x):
        x = F.relu(self.c0(x))
        x = x[0] if self.single else x
        x = F.relu(x + self.c1(x))
        x = F.relu(x + self.c2(x)).mean((-2, -1))
        return self.head(x)[None] if self.single else self.head(x)


def test_one_map_without_a_batch_inside_the_model():
    singles = (made(Blocks, single=single) for single in (True, False))
    # Other options for one of the two layers of the stream, or with batches they would share an order.
    options = {"example_inputs": X[:1], "calibration": [X[:1], X[1:2]], "overrides": {"c2": 4}}
    one, other = (converted(model, **options) for model in singles)
    assert torch.equal(one.c1.primary_conv.weight, other.c1.primary_conv.weight)
    assert torch.allclose(one.c2.primary_conv.weight, other.c2.primary_conv.weight, atol=1e-4)
