"""Maps of student and teacher, layer by layer: the formulas, the twins, the order of channels, the hooks."""

import copy
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostify
from ghostify.conversion import as_planned, rewriter
from ghostify.distillation import FEATURE_LOSSES, FeatureTaps, attention_transfer, feature_mse
from ghostify.errors import OptionError, TrainingError

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution that is called twice, one before an activation in place, one with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 12, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.normed = nn.Conv2d(12, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.relu(self.plain(x))
        x = F.relu(self.norm(self.normed(x)))
        return self.head(x.mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for tensor in (model.norm.weight, model.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    for tensor in (model.norm.bias, model.norm.running_mean):
        nn.init.normal_(tensor)
    return model.eval()


def converted(model: nn.Module, **options: str) -> nn.Module:
    spec = ghostify.GhostSpec(2, dw_size=1, **options)
    return ghostify.convert(model, spec=spec, example_inputs=X, calibration=X, initialiser="sequential").eval()


def compared(student: nn.Module, teacher: nn.Module, features="sites", loss="mse") -> torch.Tensor:
    with FeatureTaps(student, teacher, features) as taps:
        teacher(X)
        student(X)
        return taps.loss(loss)


def given_by(model: nn.Module, name: str) -> torch.Tensor:
    outputs = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    model(X)
    hook.remove()
    return outputs[-1].detach()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# The losses.


def test_mse_is_the_share_of_the_teachers_variance() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5) * 2 + 1
    s, t = student.double().numpy(), teacher.double().numpy()
    expected = ((s - t) ** 2).sum() / ((t - t.mean()) ** 2).sum()
    assert feature_mse(student, teacher).item() == pytest.approx(expected, rel=1e-4)
    assert feature_mse(30 * student, 30 * teacher).item() == pytest.approx(expected, rel=1e-4)


def test_attention_is_equation_2() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 5, 2), torch.randn(4, 7, 5, 2)
    expected = []
    for s, t in zip(student.double().numpy(), teacher.double().numpy()):
        q_s, q_t = ((maps**2).sum(axis=0).ravel() for maps in (s, t))
        expected.append(np.linalg.norm(q_s / np.linalg.norm(q_s) - q_t / np.linalg.norm(q_t)))
    assert attention_transfer(student, teacher).item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_feature_losses_have_a_gradient_everywhere(name: str) -> None:
    teacher = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for start, wanted in ((teacher, teacher), (teacher * 0, teacher), (teacher, teacher * 0), (teacher * 0,) * 2):
        student = start.clone().requires_grad_()
        loss = FEATURE_LOSSES[name](student, wanted)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()
        assert (loss.item() == 0) == torch.equal(start, wanted)


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_feature_losses_compute_in_float32_under_autocast(name: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = FEATURE_LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, FEATURE_LOSSES[name](student.float(), teacher.float()))


# Twins and the order of their channels.


@pytest.mark.parametrize("fusion", ["concat", "add"])
@pytest.mark.parametrize("placement", ["linear", "paper"])
def test_a_folded_order_changes_nothing(placement: str, fusion: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    teacher = network()
    small = converted(teacher, placement=placement, fusion=fusion)
    loss = compared(small, teacher)
    assert any(d.order == "folded" and small.get_submodule(d.site.name).output_channels is not None
               for d in small.ghostify_plan.replaced)  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(rewriter, "fold_orders", lambda *_: None)
        indexed = converted(teacher, placement=placement, fusion=fusion)
    torch.testing.assert_close(loss, compared(indexed, teacher), rtol=1e-4, atol=1e-6)

    twins = {"twice": "twice", "plain": "plain", "normed": "norm" if placement == "paper" else "normed"}
    for name in ("plain", "normed"):
        expected = feature_mse(given_by(indexed, name), given_by(teacher, twins[name]))
        torch.testing.assert_close(compared(small, teacher, [name]), expected, rtol=1e-4, atol=1e-6)
    by_name = [compared(small, teacher, [name]) for name in twins]
    torch.testing.assert_close(torch.stack(by_name).mean(), loss)

    ghostify.save(small, tmp_path / "small")
    torch.testing.assert_close(compared(ghostify.load(tmp_path / "small", base=network()).eval(), teacher), loss)


def test_it_teaches() -> None:
    teacher = network()
    student = ghostify.convert(teacher, ratio=2, example_inputs=X, initialiser="first")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    losses = []
    with FeatureTaps(student, teacher) as taps:
        for _ in range(30):
            optimizer.zero_grad()
            teacher(X)
            student(X)
            loss = taps.loss()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())


def test_other_layers_are_compared_where_no_order_is_folded() -> None:
    teacher = network()
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.plain.weight)
    expected = feature_mse(given_by(student, "norm"), given_by(teacher, "norm"))
    torch.testing.assert_close(compared(student, teacher, ["norm"]), expected)
    assert compared(student, teacher, ["stem", "twice"]).item() == 0


def test_other_layers_of_a_folded_student_are_compared_without_regard_to_order() -> None:
    teacher = network()
    student = converted(teacher)
    expected = attention_transfer(given_by(student, "norm"), given_by(teacher, "norm"))
    torch.testing.assert_close(compared(student, teacher, ["norm"], "attention"), expected)
    with pytest.raises(OptionError, match=r"features='norm' cannot be compared channel by channel.*'attention'"):
        compared(student, teacher, ["norm"])


def test_several_calls_are_compared_one_by_one() -> None:
    teacher = network()
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.twice.bias)
    seen = []

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((s - t).abs().mean())
        return seen[-1]

    total = compared(student, teacher, ["twice"], loss)
    assert len(seen) == 2
    assert seen[0] != seen[1]
    torch.testing.assert_close(total, (seen[0] + seen[1]) / 2)


def test_maps_are_taken_before_an_activation_changes_them_in_place() -> None:
    teacher = network()
    student = copy.deepcopy(teacher)
    seen = []
    compared(student, teacher, ["plain"], lambda s, t: seen.extend([s, t]) or s.sum())
    assert all(bool((maps < 0).any()) for maps in seen)


def test_a_functional_convolution_has_its_twin_in_the_lifted_teacher() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.conv2d(self.stem(x), self.weight).mean((2, 3)))

    teacher = Functional().eval()
    student = ghostify.convert(teacher, ratio=2, example_inputs=X)
    with pytest.raises(OptionError, match=r"is no module of teacher \(Functional.*as_planned"):
        FeatureTaps(student, teacher)
    assert compared(student, as_planned(student.ghostify_plan, teacher)) > 0


# What is held, and for how long.


def test_nothing_is_left_behind() -> None:
    teacher = network()
    student = copy.deepcopy(teacher)
    held = []

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert s.requires_grad
        assert not t.requires_grad
        held.extend([weakref.ref(s), weakref.ref(t)])
        return (s - t).sum()

    with FeatureTaps(student, teacher, ["plain"]) as taps:
        assert hooks(student) == hooks(teacher) == 2
        teacher(X)
        student(X)
        taps.loss(loss).backward()
        assert all(reference() is None for reference in held)
    assert hooks(student) == hooks(teacher) == 0

    with pytest.raises(ZeroDivisionError), FeatureTaps(student, teacher, ["plain"]):
        raise ZeroDivisionError
    assert hooks(student) == hooks(teacher) == 0


def test_only_the_last_forward_counts() -> None:
    teacher = network()
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.stem.weight)
    expected = compared(student, teacher, ["plain"])
    with FeatureTaps(student, teacher, ["plain"]) as taps:
        for x in (2 * X, -X, X):
            teacher(x)
        student(-X)
        student(X)
        torch.testing.assert_close(taps.loss(), expected)
        with pytest.raises(TrainingError, match="features='plain' ran 0 times in student and 0 times in teacher"):
            taps.loss()


def test_a_compiled_student_gives_the_same() -> None:
    teacher = network()
    student = converted(teacher).train()
    expected = compared(student, teacher)
    with FeatureTaps(student, teacher) as taps:
        compiled = torch.compile(student, backend="eager")
        for _ in range(2):
            teacher(X)
            compiled(X)
            torch.testing.assert_close(taps.loss(), expected)


def test_the_network_inside_a_wrapper_is_found() -> None:
    teacher = network()
    student = converted(teacher)
    torch.testing.assert_close(compared(nn.DataParallel(student), teacher), compared(student, teacher))


def test_autocast_does_no_harm() -> None:
    teacher = network()
    student = converted(teacher)
    expected = compared(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = compared(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


# What cannot be compared.


class Halves(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., :4])


class Thrice(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.twice(torch.zeros(1, 8, 4, 4))
        return super().forward(x)


class Answers(nn.Linear):
    give = staticmethod(lambda scores: scores.argmax(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.give(super().forward(x))


class Pairs(Answers):
    give = staticmethod(lambda scores: (scores, scores))


def answering(head: type[nn.Linear]) -> nn.Module:
    model = Net()
    model.head = head(16, 5)
    return model


@pytest.mark.parametrize(
    ("student", "features", "loss", "error", "message"),
    [
        (Net, "sites", "mse", TrainingError, r"features='sites' compares Ghost units, and student \(Net\) has none"),
        (Net, [], "mse", OptionError, r"features=\[\] names no layer"),
        (Net, ["plane"], "mse", OptionError, r"features='plane' is no module of student \(Net\)"),
        (Net, "plane", "mse", OptionError, "features='plane' is no module of student"),
        (Net, ["plain"], "msee", OptionError, "feature_loss='msee' is unknown. Pass 'mse', 'attention' or a function"),
        (Net, ["head"], "attention", OptionError, r"feature_loss='attention' .* shape \(3, 5\) have none"),
        (Halves, ["plain"], "mse", TrainingError, r"\(3, 12, 8, 4\) in student and \(3, 12, 8, 8\) in teacher"),
        (Thrice, ["twice"], "mse", TrainingError, "features='twice' ran 3 times in student and 2 times in teacher"),
        (lambda: answering(Answers), ["head"], "mse", TrainingError, r"gives a tensor of torch\.int64 in student"),
        (lambda: answering(Pairs), ["head"], "mse", TrainingError, "features='head' gives a tuple in student"),
    ],
)
def test_what_cannot_be_compared(student, features, loss, error, message) -> None:
    with pytest.raises(error, match=message):
        compared(student(), Net(), features, loss)


def test_a_name_of_the_student_alone_and_a_unit_without_its_plan() -> None:
    teacher = network()
    student = converted(teacher, placement="paper")
    with pytest.raises(OptionError, match=r"features='plain.primary_conv' is no module of teacher \(Net\)"):
        FeatureTaps(student, teacher, ["plain.primary_conv"])
    del student.ghostify_plan
    with pytest.raises(TrainingError, match=r"features='normed' is a Ghost unit .* takes the plan"):
        FeatureTaps(student, teacher)
