"""Measured sensitivity: what is lost where it matters counts, and what is found is kept."""

import pytest
import torch
from torch import nn

import ghostify
from ghostify.errors import InputsError, NothingToConvertError, OptionError
from ghostify.measurements import recall
from ghostify.planning import influence
from ghostify.planning.influence import influences
from ghostify.spec import GhostSpec
from ghostify.tracing import Example, trace

IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TwoWays(nn.Module):
    """Two convolutions alike, of which the answers depend on one a hundred times as much."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.loud, self.quiet = nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3)
            self.head = nn.Linear(16, 5)
        self.quiet.load_state_dict(self.loud.state_dict())

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.loud(x) + 0.01 * self.quiet(x)).mean((2, 3)))


def measured(model, images=IMAGES, **specs):
    facts = trace(model, images[:2])
    return influences(facts, {name: GhostSpec(ratio) for name, ratio in specs.items()}, [Example.of(images)])


def test_a_loss_counts_by_what_the_answers_make_of_it():
    found = measured(TwoWays(), loud=2, quiet=2)
    assert found["loud"] > 1_000 * found["quiet"] > 0


def test_it_is_the_divergence_of_the_network_with_this_unit_alone():
    """Beside a conversion of the one site with the same channels and kernels: least squares on the same images."""
    model = TwoWays()
    found = measured(model, loud=2)["loud"]
    plan = ghostify.plan(model, ratio=2, skip="quiet", example_inputs=IMAGES[:2])
    small = ghostify.apply(plan, model, calibration=IMAGES, initialiser="least-squares")
    old, new = (one.eval()(IMAGES).div(4).log_softmax(1) for one in (model, small))
    divergence = torch.nn.functional.kl_div(new, old, log_target=True, reduction="batchmean").item()
    lost = 1 - small.ghostify_plan.replaced[0].explained
    assert found == pytest.approx(divergence / lost, rel=0.2)  # they sample other pixels


def test_the_budget_spares_what_matters():
    model = TwoWays()
    for sensitivity, spared in (("measured", True), ("explained", False)):
        plan = ghostify.plan(model, budget={"macs": 0.7}, calibration=IMAGES, sensitivity=sensitivity)
        loud, quiet = (next(made for made in plan if made.site.name == name) for name in ("loud", "quiet"))
        assert (loud.macs_after > 1.3 * quiet.macs_after) == spared
    assert all(made.damage is None for made in plan.replaced)
    assert plan.macs_after <= 0.7 * plan.macs


def test_damages_are_told_and_summed():
    plan = ghostify.plan(TwoWays(), budget={"macs": 0.8}, calibration=IMAGES, sensitivity="measured")
    assert all(made.damage >= 0 for made in plan.replaced)
    assert f"damage {sum(made.damage for made in plan.replaced):.4g}: " in plan.budget[-1]
    assert ghostify.Plan.from_json(plan.to_json()) == plan


def test_what_was_found_is_kept_and_goes_on_where_it_stopped(monkeypatch, cache):
    model = TwoWays()
    first = measured(model, loud=2, quiet=2)
    (file,) = (cache / "influence").iterdir()
    kept = recall(influence._ADAPTER, file)
    assert kept == first
    tried = []
    stand_in = influence._stand_in
    monkeypatch.setattr(influence, "_stand_in", lambda site, *rest: tried.append(site.name) or stand_in(site, *rest))
    assert measured(model, loud=2, quiet=2) == first
    assert tried == []
    file.write_bytes(influence._ADAPTER.dump_json({"loud": 7.0}))  # stopped after the first
    assert measured(model, loud=2, quiet=2) == {"loud": 7.0, "quiet": first["quiet"]}
    assert tried == ["quiet"]
    file.write_text("[broken")
    assert measured(model, loud=2, quiet=2) == first
    assert measured(model, IMAGES + 1, loud=2, quiet=2) != first  # other images
    model.head.weight.data.mul_(2)
    assert measured(model, loud=2, quiet=2) != first  # other weights
    assert len(list((cache / "influence").iterdir())) == 3


def test_another_forward_with_the_same_weights_is_measured_anew(monkeypatch):
    first, other = measured(TwoWays(), loud=2, quiet=2), TwoWays()
    monkeypatch.setattr(other, "forward", lambda x: TwoWays.forward(other, x.flip(1)))
    assert measured(other, loud=2, quiet=2) != first


def test_answers_that_are_no_numbers_are_told():
    """A class that is ruled out by a score of minus infinity made every damage 0."""
    model = TwoWays()
    model.head.bias.data[0] = -torch.inf
    with pytest.raises(InputsError, match=r"answers of TwoWays .* not finite, with loud .*sensitivity='explained'"):
        measured(model, loud=2, quiet=2)


def test_maps_that_are_no_class_scores_are_compared_too():
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 2, 1)).eval()
    assert measured(dense, **{"1": 2})["1"] > 0


def test_a_model_of_half_precision_is_measured_too():
    half, whole = (
        measured(model, IMAGES.to(model.stem.weight.dtype), loud=2) for model in (TwoWays().bfloat16(), TwoWays())
    )
    assert half["loud"] == pytest.approx(whole["loud"], rel=0.3)


def test_nothing_is_measured_where_no_layer_may_change():
    with pytest.raises(NothingToConvertError):
        ghostify.frontier(TwoWays(), points=2, calibration=IMAGES, sensitivity="measured", skip="*")


def test_the_model_is_left_as_it_was():
    model = TwoWays().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(model, loud=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.loud._forward_hooks


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": {"macs": 0.7}, "calibration": IMAGES, "sensitivity": "felt"}, "sensitivity='felt' is unknown"),
        ({"budget": {"macs": 0.7}, "sensitivity": "measured"}, "needs a budget, and calibration"),
        ({"keep": 0.9, "calibration": IMAGES, "sensitivity": "measured"}, "needs a budget, and calibration"),
    ],
)
@pytest.mark.parametrize("verb", [ghostify.plan, ghostify.convert])
def test_options_that_cannot_be_used(verb, options, told):
    with pytest.raises(OptionError, match=told):
        verb(TwoWays(), example_inputs=IMAGES[:2], **options)
