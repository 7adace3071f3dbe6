"""Accuracy, agreement, guards, and that both models are left as found."""

import dataclasses

import pytest
import torch
from torch import nn

from ghostify.errors import InputsError, TraceError
from ghostify.nn.cifar import CifarResNet, resnet20
from ghostify.reporting import LatencyOptions, Pair, compare
from ghostify.spec import Plan


class Scores(nn.Module):
    """Gives the scores that it was told for example number ``x[:, 0]``."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float32))

    def forward(self, x):
        return self.table[x[:, 0].long()]


def numbered(start, stop):
    return torch.arange(start, stop, dtype=torch.float32)[:, None]


FIRST = [[3, 1, 0], [0, 2, 1], [0, 1, 5], [4, 0, 0], [1, 0, 2]]  # classes 0 1 2 0 2
SECOND = [[3, 1, 0], [2, 0, 1], [0, 1, 5], [0, 0, 4], [1, 0, 2]]  # classes 0 0 2 2 2
TARGETS = torch.tensor([0, 1, 2, 0, 1])


def quick(first, second, x=None, **options):
    return compare(first, second, example_inputs=numbered(0, 1) if x is None else x, latency=None, **options)


def test_accuracy_and_agreement_by_hand():
    data = [(numbered(0, 3), TARGETS[:3]), (numbered(3, 5), TARGETS[3:])]
    found = quick(Scores(FIRST), Scores(SECOND), data=data).accuracy
    assert found.examples == 5
    assert found.classes == 3
    assert found.top1 == Pair(4 / 5, 2 / 5)
    assert found.top5 is None
    assert found.agreement == 3 / 5
    assert found.output_difference == pytest.approx((2 + 2 + 4 + 4) / 15)


def test_top5_from_ten_classes_on():
    table = torch.eye(10).flip(0).cumsum(0).tolist()  # row r: the last r + 1 classes share the highest score
    ranked = [[9 - c for c in range(10)]] * 10  # class c has rank c
    data = [(numbered(0, 10), torch.arange(10))]
    found = quick(Scores(ranked), Scores(table), data=data).accuracy
    assert found.top1.original == 1 / 10
    assert found.top5.original == 5 / 10


@pytest.mark.parametrize("data", [[numbered(0, 3), numbered(3, 5)], [[numbered(0, 5)]], iter([(numbered(0, 5),)])])
def test_inputs_alone_give_agreement_only(data):
    found = quick(Scores(FIRST), Scores(SECOND), data=data).accuracy
    assert (found.top1, found.top5, found.agreement) == (None, None, 3 / 5)


def test_scores_that_are_not_finite_count_as_wrong_and_are_told():
    broken = [row[:] for row in FIRST]
    broken[0][0] = float("nan")
    report = quick(Scores(FIRST), Scores(broken), data=[(numbered(0, 5), TARGETS)])
    assert report.accuracy.top1 == Pair(4 / 5, 3 / 5)
    assert report.accuracy.agreement == 4 / 5
    assert report.accuracy.output_difference is None
    assert any("1 of 5 examples have scores that are not finite" in remark for remark in report.remarks)
    assert "not finite" in str(report)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no example"),
        ([(numbered(0, 0), TARGETS[:0])], "holds no example"),
        ([(numbered(0, 2), TARGETS[:3])], r"targets of shape \(3,\)"),
        ([(numbered(0, 2), torch.tensor([0, 3]))], "labels from 0 to 3, and the models tell 3 classes apart"),
        ([(numbered(0, 2), torch.tensor([0.5, 0.5]))], "class numbers"),
        ([(numbered(0, 2), torch.zeros(2, 3))], "class numbers"),
        ([numbered(0, 2)[0]], "DataLoader"),
        ([(numbered(0, 2), TARGETS[:2]), numbered(2, 3)], "2 of 3 examples"),
        (["image.png"], "holds str"),
        ([numbered(90, 91)], "does not run on a batch of shape"),
    ],
)
def test_data_that_do_not_fit(data, message):
    with pytest.raises(InputsError, match=message):
        quick(Scores(FIRST), Scores(SECOND), data=data)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Conv2d(3, 2, 3), r"shape \(1, 2, 6, 6\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), r"shape \(1, 1\)"),
        (nn.MaxPool2d(2, return_indices=True), "tuple"),
    ],
)
def test_outputs_that_are_no_class_scores_leave_accuracy_out(model, why):
    x = torch.randn(1, 3, 8, 8)
    report = quick(model, model, x, data=[x])
    assert report.accuracy is None
    (remark,) = [remark for remark in report.remarks if remark.startswith("Accuracy is left out")]
    assert why.replace("\\", "") in remark
    assert remark in str(report)
    labelled = quick(model, model, x, data=[(x, torch.zeros(1, 6, 6))])  # whatever the targets are
    assert labelled.remarks == report.remarks


def test_different_output_shapes_are_refused():
    with pytest.raises(InputsError, match=r"original \(2, 10\), compressed \(2, 7\)"):
        quick(resnet20(), CifarResNet(3, 7, width=4), torch.randn(2, 3, 32, 32))


def test_a_model_that_does_not_run_is_named():
    with pytest.raises(TraceError, match="CifarResNet"):
        quick(resnet20(), resnet20(), torch.randn(2, 4, 32, 32))


class Restless(nn.Module):
    """Changes buffers in any mode, one in place and one by assignment, and draws random numbers."""

    def __init__(self, fails=False):
        super().__init__()
        self.layer = nn.Linear(1, 3)
        self.drop = nn.Dropout()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.full((3,), float("nan")))
        self.fails = fails

    def forward(self, x):
        self.calls += 1
        self.last = self.layer(x)[0]
        if self.fails and len(x) == 4:
            raise ValueError("no more")
        return self.layer(x) + 0 * torch.rand(1)


@pytest.mark.parametrize("fails", [False, True])
def test_both_models_and_the_random_state_are_left_as_found(fails):
    models = Restless(), Restless(fails)
    models[0].drop.eval()
    modes = [module.training for model in models for module in model.modules()]
    state = [value.numpy().tobytes() for model in models for value in model.state_dict().values()]
    buffers = [id(buffer) for model in models for buffer in model.buffers()]
    images = torch.randn(8, 1)
    random = torch.get_rng_state()

    def run():
        return compare(
            *models,
            example_inputs=numbered(0, 1),
            data=torch.utils.data.DataLoader(images, batch_size=4, shuffle=True),
            latency=LatencyOptions(repeats=5, warmup=1),
        )

    if fails:
        with pytest.raises(InputsError, match="no more"):
            run()
    else:
        run()
    assert [module.training for model in models for module in model.modules()] == modes
    assert [value.numpy().tobytes() for model in models for value in model.state_dict().values()] == state
    assert [id(buffer) for model in models for buffer in model.buffers()] == buffers
    assert torch.equal(torch.get_rng_state(), random)


def test_numbers_of_two_networks():
    report = quick(resnet20(), CifarResNet(3, width=8), torch.randn(2, 3, 32, 32))
    assert (report.original.params, report.original.macs) == (269_722, 40_551_040)
    assert report.compressed.params == sum(p.numel() for p in CifarResNet(3, width=8).parameters())
    assert report.original.flops == 81_102_080
    assert report.latency is None
    assert report.remarks == ()


def test_operations_outside_the_definition_are_remarked():
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    report = quick(layer, layer, torch.randn(1, 5, 16))
    assert any(remark.startswith("Outside this definition of MACs, ghost: aten.") for remark in report.remarks)


def test_a_model_without_any_macs_is_remarked():
    report = quick(nn.ReLU(), nn.ReLU(), torch.randn(1, 3))
    assert report.original.macs == 0
    assert any("No convolution or linear layer" in remark for remark in report.remarks)
    assert "Infinity" not in report.to_json()


def plan_of(params, params_after, macs, macs_after, shape=(1, 1)):
    del params_after, macs_after  # without decisions they equal the totals
    return Plan(
        model="Scores",
        fingerprint="",
        trace_way="fx",
        trace_note="",
        input_shapes=(shape,),
        params=params,
        macs=macs,
        uncounted={},
        decisions=(),
    )


def test_the_plan_is_the_given_one_or_the_one_carried():
    model, carried, given = Scores(FIRST), plan_of(15, 15, 0, 0), plan_of(15, 15, 0, 0, shape=(2, 1))
    assert quick(model, model).plan is None
    model.ghostify_plan = "something else"
    assert quick(model, model).plan is None
    model.ghostify_plan = carried
    assert quick(model, model).plan is carried
    report = quick(model, model, plan=given)
    assert report.plan is given
    assert any("for inputs of shape 2×1" in remark for remark in report.remarks)


def test_a_plan_of_another_model_is_remarked():
    model = Scores(FIRST)
    assert not any("plan" in remark for remark in quick(model, model, plan=plan_of(15, 15, 0, 0)).remarks)
    remarks = quick(model, model, plan=plan_of(16, 16, 0, 0)).remarks
    assert any("The plan counts 16 → 16 params, and the models have 15 → 15" in remark for remark in remarks)


@dataclasses.dataclass
class Record:
    epoch: int
    loss: float
    val_accuracy: float | None = None
    grad_norm: float = 1.0


class Run:
    history = (Record(0, 2.0), Record(1, 1.0, 0.5))


@pytest.mark.parametrize(
    "history",
    [
        Run(),
        Run.history,
        [{"epoch": 0, "loss": 2.0, "other": "x"}, {"epoch": 1, "loss": 1.0, "val_accuracy": 0.5}],
    ],
)
def test_a_history_in_any_form(history):
    first, second = quick(Scores(FIRST), Scores(SECOND), history=history).history
    assert (first.epoch, first.loss, first.val_accuracy) == (0, 2.0, None)
    assert (second.epoch, second.loss, second.val_accuracy, second.lr) == (1, 1.0, 0.5, None)


def test_a_history_without_numbers_or_with_nan():
    (epoch,) = quick(Scores(FIRST), Scores(SECOND), history=[{"loss": float("nan")}]).history
    assert (epoch.epoch, epoch.loss) == (1, None)
