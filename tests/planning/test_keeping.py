"""Ratios by quality, and what a layer's Ghost unit could still express."""

import pytest
import torch
from torch import nn

import ghostify
from ghostify.errors import InputsError, NothingToConvertError, OptionError
from ghostify.nn.cifar import resnet20
from ghostify.planning import explained
from ghostify.planning.choice import choose_layout
from ghostify.planning.keeping import RATIOS
from ghostify.planning.statistics import Moments
from ghostify.tracing import Example, trace
from ghostify.tracing.calibration import calibration_chunks

IMAGES = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Copies(nn.Module):
    """A layer whose second half of filters are copies, scaled and shifted by a pixel, and one without any."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.copies, self.unlike = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            weight = torch.zeros(16, 8, 3, 3)
            weight[:8, :, :, :2] = torch.randn(8, 8, 3, 2)
            weight[8:, :, :, 1:] = -2 * weight[:8, :, :, :2]
            self.copies.weight.copy_(weight)
            self.copies.bias.zero_()
            self.unlike.weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0].view(16, 16, 1, 1))

    def forward(self, x):
        x = torch.relu(self.copies(torch.tanh(self.stem(x))))
        return self.head(self.unlike(x).mean((2, 3)))


def made(kind=Copies):
    torch.manual_seed(0)
    return kind().eval()


def test_copies_are_found_and_what_is_unlike_stays():
    plan = ghostify.plan(made(), keep=0.98, calibration=IMAGES, spec=ghostify.GhostSpec(dw_size=3))
    found = {d.site.name: d for d in plan}
    assert found["copies"].spec.ratio == 2
    assert found["copies"].explained > 0.97
    assert found["unlike"].spec is None
    assert found["unlike"].reason.startswith("would keep ")
    assert found["unlike"].reason.endswith("at ratio 1.1")
    assert found["stem"].reason == "first layer"
    small = ghostify.apply(plan, made(), calibration=IMAGES)
    assert small.ghostify_plan.decisions[1].error < 0.05


def test_the_shares_are_those_that_the_initialiser_finds():
    model = made(resnet20)
    plan = ghostify.plan(model, keep=0.5, calibration=IMAGES, overrides={"layer1.0.conv1": 2.5, "layer2.*": None})
    assert {d.spec.ratio for d in plan.replaced} <= {*RATIOS, 2.5}
    assert plan.decisions[1].spec.ratio == 2.5
    assert plan.decisions[1].explained is None
    small = ghostify.apply(plan, model, calibration=IMAGES, initialiser="least-squares")
    for planned, started in zip(plan.replaced, small.ghostify_plan.replaced, strict=True):
        if planned.explained is not None:
            assert planned.explained >= 0.5
            assert planned.explained == pytest.approx(started.explained, abs=0.05)
        assert 0 <= started.error < 1
    assert "explained" in str(plan)
    assert "error" in str(small.ghostify_plan)
    assert ghostify.Plan.from_json(plan.to_json()) == plan


def test_more_to_keep_means_lower_ratios():
    model = made(resnet20)
    macs = [ghostify.plan(model, keep=keep, calibration=IMAGES).macs_after for keep in (0.3, 0.7, 0.9)]
    assert macs == sorted(macs)
    assert macs[0] < macs[2]
    with pytest.raises(NothingToConvertError, match="would keep"):
        ghostify.plan(model, keep=1.0, calibration=IMAGES)


def test_sites_in_several_passes_are_measured_alike(monkeypatch):
    facts, spec = trace(made(resnet20), IMAGES[:1]), ghostify.GhostSpec(2)
    chunks = [Example.of(IMAGES[:32]), Example.of(IMAGES[32:])]
    passes = []
    facts.model.register_forward_hook(lambda *_: passes.append(1))
    whole = dict(explained.site_shares(facts, facts.sites, spec, chunks))
    assert len(passes) == 2
    monkeypatch.setattr(explained, "_MEMORY", 100_000)
    parts = dict(explained.site_shares(facts, facts.sites, spec, chunks))
    assert len(passes) > 6
    assert [site.name for site in whole] == [site.name for site in facts.sites]
    assert all(torch.equal(share, parts[site]) for site, share in whole.items())


def test_a_kept_share_is_what_its_layout_keeps():
    shares = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    shares[0, 3], shares[1, 2] = 0.5, 1.5
    spec = ghostify.GhostSpec(2)
    layout = choose_layout(shares, spec)
    assert explained.kept_share(shares, layout, spec) == pytest.approx((4 + 3 + 1.5 + 0.5) / 10)
    assert explained.kept_share(shares, torch.tensor([0, 1, 3, 2]), spec) == pytest.approx((4 + 3 + 0.5 + 1.5) / 10)
    assert explained.kept_share(shares, torch.tensor([0, 1, 2, 3]), spec) == pytest.approx(7 / 10)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": 1.5, "calibration": IMAGES}, "keep=1.5 is no share"),
        ({"keep": True, "calibration": IMAGES}, "keep=True is no share"),
        ({"keep": 0.9}, "keep=0.9 needs calibration"),
        ({"keep": 0.9, "calibration": IMAGES, "ratio": 2}, "keep=0.9 and ratio=2 are both given"),
        ({"calibration": IMAGES}, "without keep"),
    ],
)
def test_options_that_do_not_go_together(options, told):
    with pytest.raises(OptionError, match=told):
        ghostify.plan(made(), example_inputs=IMAGES[:1], **options)


def test_convert_keeps_too():
    small = ghostify.convert(made(), keep=0.98, calibration=IMAGES)
    assert [d.spec.ratio for d in small.ghostify_plan.replaced] == [2]


def test_sites_of_which_little_is_left_are_warned_of():
    with pytest.warns(UserWarning, match=r"1 of 2 Ghost units start with more than 50% .* missed: unlike \(\d+%\)"):
        ghostify.convert(made(), ratio=4, calibration=IMAGES, overrides={"copies": 2}, initialiser="least-squares")


class Sometimes(nn.Module):
    """Runs its second layer on small batches alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        y = self.one(self.stem(x))
        return self.head((self.two(y) if len(x) < 4 else y).mean((2, 3)))


def test_a_layer_that_the_calibration_inputs_do_not_reach_stays():
    images = torch.randn(8, 3, 8, 8)
    plan = ghostify.plan(Sometimes(), keep=0.01, calibration=images, example_inputs=images[:1])
    two = next(made for made in plan if made.site.name == "two")
    assert (two.spec, two.reason) == (None, "not reached by the calibration inputs")


@pytest.mark.parametrize("options", [{"budget": {"macs": 0.7}}, {"keep": 0.5, "calibration": torch.randn(8, 3, 8, 8)}])
def test_weights_that_are_no_numbers_are_told(options):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 2))
    model[1].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputsError, match=r"What 1 of Sequential makes is not finite: its weights .*hold NaN"):
        ghostify.plan(model, example_inputs=torch.zeros(1, 3, 8, 8), **options)


def test_shares_do_not_drown_in_a_mean_far_from_zero():
    torch.manual_seed(0)
    values = torch.randn(4000, 6, dtype=torch.float64)
    values[:, 3:] = values[:, :3] @ torch.randn(3, 3, dtype=torch.float64) + 0.1 * values[:, 3:]
    far = values + torch.tensor([3000.0, 0.0, -50.0, 0.0, 3000.0, 7.0], dtype=torch.float64)
    for wanted, given in (((far, far[:, :2])), ((values, values[:, :2]))):
        parts = [(a.float(), y.float()) for a, y in zip(wanted.split(1000), given.split(1000), strict=True)]
        moments = Moments.of(parts[2:], onto=Moments.of(parts[:2]))
        a, y = torch.cat([a for a, _ in parts]).double(), torch.cat([y for _, y in parts]).double()
        assert torch.allclose(moments.centred()[0], torch.cov(a.T, correction=0), rtol=1e-3, atol=1e-3)
        assert torch.allclose(moments.centred()[1], (a - a.mean(0)).T @ (y - y.mean(0)) / len(a), rtol=1e-3, atol=1e-3)
        for found, exact in zip(moments.plain(), (a.T @ a / len(a), a.T @ y / len(a)), strict=True):
            assert torch.allclose(found, exact, rtol=1e-6, atol=1e-3)
        assert torch.allclose(moments.mean_a, a.mean(0))
        assert torch.allclose(moments.mean_y, y.mean(0))


@pytest.mark.parametrize(
    "calibration",
    [
        torch.randn(8, 1, 16, 16),
        torch.zeros(8, 3, 16, 16, dtype=torch.uint8),
        [IMAGES, torch.randn(8, 4, 16, 16)],
        [{"y": IMAGES}],
    ],
)
@pytest.mark.parametrize("example_inputs", [IMAGES[:1], None])
def test_calibration_that_does_not_fit_is_told_of(calibration, example_inputs):
    with pytest.raises(InputsError, match="calibration does not fit the model"):
        ghostify.plan(made(), keep=0.5, example_inputs=example_inputs, calibration=calibration)


@pytest.mark.parametrize(
    "options",
    [{"keep": 1.5}, {"keep": 0.9, "ratio": 2}, {"keep": 0.9, "skip": 3}, {"keep": 0.9, "overrides": {"*": 0}}],
)
@pytest.mark.parametrize("verb", [ghostify.plan, ghostify.convert])
def test_options_are_looked_at_before_the_images(options, verb):
    def images():
        pytest.fail("the images were read")
        yield IMAGES

    with pytest.raises(OptionError):
        verb(made(), calibration=images(), **options)


def test_no_more_images_are_used_than_asked_for():
    model, many = made(), torch.randn(300, 3, 16, 16)
    assert [chunk.batch for chunk in calibration_chunks([many], model, 70)] == [64, 6]
    assert [chunk.batch for chunk in calibration_chunks([many], model, 70, whole=True)] == [300]
    assert [chunk.batch for chunk in calibration_chunks(many.split(32), model, 70)] == [32, 32, 32]
    pictures = list(torch.randn(3, 3, 2000, 1000))  # as detectors take them: not to be cut through their channels
    (chunk,) = calibration_chunks([{"images": pictures}], model)
    assert [picture.shape for picture in chunk.kwargs["images"]] == [picture.shape for picture in pictures]
