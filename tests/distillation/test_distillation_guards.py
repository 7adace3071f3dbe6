"""Bad input is named before work starts; a run that breaks off keeps its last good state."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ghostify.distillation import DistillConfig, distill
from ghostify.distillation import checkpoint as checkpoint_module
from ghostify.errors import InputsError, NonFiniteLossError, OptionError, OutputError, TrainingError

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def pair() -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Outputs(nn.Module):
    """A model that gives whatever it is told to."""

    def __init__(self, give) -> None:
        super().__init__()
        self.inner, self.give = nn.Linear(4, 3), give

    def forward(self, x: torch.Tensor):
        return self.give(self.inner(x))


def own(loss) -> DistillConfig:
    return DistillConfig(loss=loss)


class Empty:
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, OptionError, "epochs=0"),
        ({"epochs": 1.5}, OptionError, "epochs=1.5"),
        ({"data": []}, InputsError, "data is empty"),
        ({"val": []}, InputsError, "val is empty"),
        ({"data": Empty()}, InputsError, "data is empty: it has a length but yields no batch"),
        ({"data": iter([X])}, InputsError, "used up after one pass"),
        ({"val": (x for x in [X])}, InputsError, "val is a generator, which is used up"),
        ({"data": X}, InputsError, r"data is a tensor of shape \(8, 4\)"),
        ({"data": 7}, InputsError, "data is a int"),
        ({"data": ["a"]}, InputsError, "data yields a str"),
        ({"data": [(X, Y, Y)]}, InputsError, r"data yields a tuple of 3 \(Tensor, Tensor, Tensor\)"),
        ({"data": [X[:0]]}, InputsError, "a batch without examples"),
        ({"data": [torch.randn(8, 5)]}, TrainingError, r"teacher \(Sequential\) does not run .* \(8, 5\)"),
        ({"config": DistillConfig(hard_weight=0.5)}, OptionError, "hard_weight=0.5 needs labels"),
        (
            {"data": [(X, Y + 1)], "config": DistillConfig(hard_weight=0.5)},
            InputsError,
            r"data yields labels from 1 to 3, and the models tell 3 classes apart \(0 to 2\)",
        ),
        ({"val": [(X, Y - 1)]}, InputsError, "val yields labels from -1 to 1"),
        ({"val": [(X, Y), (X, Y + 1)]}, InputsError, "val yields labels from 1 to 3"),
        ({"val": [(X, Y[:4])]}, InputsError, r"labels of shape \(4,\)"),
        ({"teacher": nn.Linear(4, 5)}, TrainingError, r"scores of shape \(8, 3\) and teacher \(8, 5\)"),
        ({"teacher": Outputs(lambda z: (z, z))}, TrainingError, r"teacher \(Outputs\) gives a tuple"),
        ({"student": Outputs(lambda z: {"logits": z})}, TrainingError, r"student \(Outputs\) gives a dict"),
        ({"student": Outputs(lambda z: z.sum(1))}, TrainingError, r"a Tensor of shape \(8,\); class scores"),
        ({"teacher": Outputs(lambda z: z / 0)}, TrainingError, "teacher .* scores that are not finite"),
        (
            {"config": own(lambda a, b, t: (a - b).mean(1)), "val": [X]},
            OptionError,
            r"gives a tensor of shape \(8,\), and",
        ),
        ({"config": own(lambda a, b, t: (a - b).mean().item())}, OptionError, "gives a float, and one number"),
        ({"config": own(nn.MSELoss())}, OptionError, "loss='MSELoss' does not run on class scores .*TypeError"),
        ({"student": nn.Linear(4, 3).requires_grad_(False)}, TrainingError, "none with requires_grad=True"),
        ({"student": nn.Linear(4, 3, device="meta")}, TrainingError, "several devices: cpu, meta"),
    ],
)
def test_bad_input_is_named_before_the_student_is_touched(options: dict, error: type, message: str) -> None:
    student, teacher = pair()
    call = {"student": student, "teacher": teacher, "data": [X], "epochs": 1, **options}
    before = state(call["student"])
    with pytest.raises(error, match=message):
        distill(call.pop("student"), **call)
    assert student[0].weight.grad is None
    if "student" not in options:
        assert same(state(student), before)


def test_a_model_cannot_teach_itself() -> None:
    student, teacher = pair()
    with pytest.raises(TrainingError, match="student is teacher"):
        distill(student, teacher=student, data=[X])
    student[0] = teacher[0]
    with pytest.raises(TrainingError, match=r"shares 2 tensors with teacher \(the first is '0.weight'\)"):
        distill(student, teacher=teacher, data=[X])
    shallow = copy.copy(teacher)
    with pytest.raises(TrainingError, match="shares 2 tensors"):
        distill(shallow, teacher=teacher, data=[X])


def test_labels_that_vanish_or_leave_the_range_later_are_found_when_they_come() -> None:
    student, teacher = pair()
    before = state(student)
    config = DistillConfig(hard_weight=0.5)
    with pytest.raises(InputsError, match=r"a batch without labels, and hard_weight=0\.5"):
        distill(student, teacher=teacher, data=[(X, Y), X], epochs=1, config=config)
    with pytest.raises(InputsError, match="labels from 1 to 3"):
        distill(student, teacher=teacher, data=[(X, Y), (X, Y + 1)], epochs=1, config=config)
    assert same(state(student), before)


def test_labels_out_of_range_do_not_matter_where_they_are_not_used() -> None:
    student, teacher = pair()
    assert distill(student, teacher=teacher, data=[(X, Y + 100)], epochs=1).best_epoch == 1


class Spoilt:
    """Good batches, and from a given epoch on a last one that breaks the run."""

    def __init__(self, epoch: int, bad) -> None:
        self.first_bad, self.bad, self.epoch = epoch, bad, 0

    def __len__(self) -> int:
        return 3

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (X, X + 1)
        yield self.bad() if self.epoch >= self.first_bad else X


def interrupt() -> torch.Tensor:
    raise KeyboardInterrupt


def normed() -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))


@pytest.mark.parametrize("steps_per_look", [1, 2, 20])
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_per_look: int
) -> None:
    monkeypatch.setattr("ghostify.distillation.loop._steps_per_look", lambda device: steps_per_look)
    student, teacher = normed()
    start = state(student)
    data = Spoilt(2, lambda: X * float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"epoch=3, step=3, lr=.*the batch itself holds NaN.*end of epoch 2"):
        distill(student, teacher=teacher, data=data, epochs=4, out=tmp_path)
    kept = state(student)
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert not same(kept, start)
    assert same(load_file(tmp_path / "last.safetensors"), kept)
    assert len(json.loads((tmp_path / "history.json").read_text())["epochs"]) == 2
    assert sorted(os.listdir(tmp_path)) == [
        "best.safetensors",
        "epochs.csv",
        "history.json",
        "last.safetensors",
        "state",
        "steps.csv",
    ]
    assert max(path.stem for path in (tmp_path / "state").iterdir()) == "000003-000000000"
    assert all(module.training for module in (*student.modules(), *teacher.modules()))
    assert all(p.grad is None for p in student.parameters())


def test_after_a_bad_batch_a_run_goes_on_from_the_last_complete_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(out: Path, data, **options) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        student, teacher = normed()
        distill(student, teacher=teacher, data=data, epochs=4, out=out, **options)
        return state(student)

    whole = run(tmp_path / "whole", Spoilt(9, None))
    torn = {"out": tmp_path / "run", "config": DistillConfig(state_every=1)}
    with pytest.raises(NonFiniteLossError, match=r"so does .*last.safetensors'. With resume=True the run goes on"):
        run(data=Spoilt(2, lambda: X * float("nan")), **torn)
    with pytest.raises(OutputError, match="holds a run that is not finished"):
        run(data=Spoilt(9, None), **torn)
    assert same(run(data=Spoilt(9, None), resume=True, **torn), whole)
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())["epochs"]) == 4

    calmer = {"out": tmp_path / "calmer"}
    with pytest.raises(NonFiniteLossError):
        run(data=Spoilt(2, lambda: X * float("nan")), **calmer)
    run(data=Spoilt(9, None), resume=True, config=DistillConfig(lr=0.01), **calmer)
    assert "from here on lr=0.01; the run was begun with 0.05" in caplog.text


def test_a_late_look_still_names_the_step_and_does_not_blame_the_batch_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ghostify.distillation.loop._steps_per_look", lambda device: 20)
    student, teacher = normed()
    before = state(student)
    data = [X, X * float("nan"), X, X]
    with pytest.raises(NonFiniteLossError, match=r"epoch=1, step=2, .*the student diverged or a batch is not finite"):
        distill(student, teacher=teacher, data=data, epochs=1)
    assert same(state(student), before)


def test_a_student_that_diverges_at_once_gets_its_start_back_and_the_cause_is_named() -> None:
    student, teacher = normed()
    before = state(student)
    config = DistillConfig(lr=1e30, loss="mse", clip_norm=None, precision="fp32")
    with pytest.raises(NonFiniteLossError, match=r"Lower lr to 3.3e\+29 or set clip_norm=5.0.*weights that it came"):
        distill(student, teacher=teacher, data=[X, X, X], epochs=3, config=config)
    assert same(state(student), before)


@pytest.mark.parametrize("val", [None, [(X, Y)]])
def test_a_last_step_that_breaks_the_student_is_no_good_state(tmp_path: Path, val) -> None:
    """Its loss was still finite: only what comes after the step shows it."""
    student, teacher = pair()
    before = state(student)
    config = DistillConfig(lr=1e38, loss="mse", clip_norm=None, precision="fp32", warmup=0.0)
    with pytest.raises(NonFiniteLossError, match=r"scores are not finite after epoch=1.*weights that it came with"):
        distill(student, teacher=teacher, data=[(1e6 * X, Y)], val=val, epochs=1, config=config, out=tmp_path)
    assert same(state(student), before)
    assert same(load_file(tmp_path / "best.safetensors"), before)


def test_a_student_without_numbers_is_never_the_best() -> None:
    """All of class 0: a NaN's argmax would be right. The loss function at hand says nothing of it."""

    def blind(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return student.nan_to_num().mean()

    student, teacher = pair()
    late = X * 1e30  # finite on the data, infinite on these
    student[0].weight.data *= 1e30
    with pytest.raises(TrainingError, match="student gives scores on val that are NaN or infinite, before any"):
        distill(student, teacher=teacher, data=[X], val=[X, late], config=DistillConfig(loss=blind))


def test_a_teacher_without_numbers_on_val_is_named() -> None:
    student, teacher = pair()
    with pytest.raises(NonFiniteLossError, match="val: 24 of the teacher's scores are NaN or infinite"):
        distill(student, teacher=teacher, data=[X], val=[X, X * float("nan")])


def test_a_batch_that_the_student_cannot_train_on_is_named() -> None:
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(TrainingError, match=r"student does not run on a batch of data of shape \(1, 4\): ValueError"):
        distill(student, teacher=nn.Linear(4, 3), data=[X, X[:1]])


def test_a_wrong_length_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Short(list):
        def __len__(self) -> int:
            return 1

    student, teacher = pair()
    distill(student, teacher=teacher, data=Short([X, X, X]), epochs=2)
    assert caplog.text.count("data says that it has 1 batches and yields 3") == 1


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is() -> None:
    def steep(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return (student - student.detach()).abs().sqrt().mean()  # 0, with the gradient 0 / 0

    student, teacher = pair()
    for clip_norm in (5.0, None):
        with pytest.raises(NonFiniteLossError, match="epoch=1, step=1"):
            distill(student, teacher=teacher, data=[X], config=DistillConfig(loss=steep, clip_norm=clip_norm))


def test_a_teacher_that_breaks_later_is_named() -> None:
    student, _ = pair()
    teacher = Outputs(lambda z: z.masked_fill(z.abs().max() > 100, float("nan")))
    with pytest.raises(NonFiniteLossError, match=r"step=2.*the teacher's scores are not finite"):
        distill(student, teacher=teacher, data=[X, X * 1e6])


def test_an_interrupt_keeps_the_last_complete_epoch_and_nothing_half_written(tmp_path: Path) -> None:
    student, teacher = normed()
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher=teacher, data=Spoilt(1, interrupt), epochs=3, out=tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "best.safetensors",
        "epochs.csv",
        "history.json",
        "last.safetensors",
        "state",
        "steps.csv",
    ]
    assert same(load_file(tmp_path / "last.safetensors"), state(student))
    assert len(json.loads((tmp_path / "history.json").read_text())["epochs"]) == 1


def test_an_interrupt_while_writing_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint_module.write_weights(path, {"w": torch.ones(3)})

    def stopped(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_module.write_weights(path, {"w": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["last.safetensors"]
    assert torch.equal(load_file(path)["w"], torch.ones(3))


def test_an_unwritable_folder_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    student, teacher = pair()
    before, steps = state(student), []

    class Counted(Spoilt):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for batch in (X, X + 1, X):
                steps.append(batch)
                yield batch

    with pytest.raises(OutputError, match="cannot be written"):
        distill(student, teacher=teacher, data=Counted(9, None), out=tmp_path / "file" / "run")
    assert len(steps) == 1  # the batch that is looked at
    assert same(state(student), before)


def test_data_that_can_be_gone_through_twice_only_by_appearance(tmp_path: Path) -> None:
    class Once:
        left = [[X], [X], []]

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(self.left.pop(0))

    student, teacher = pair()
    with pytest.raises(InputsError, match="no batch in epoch 2"):
        distill(student, teacher=teacher, data=Once(), epochs=3)


def test_tied_and_extra_state_are_stored(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 3)
            self.register_buffer("index", torch.arange(4))
            self.register_buffer("absent", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.b(self.a(x[:, self.index])))

        def get_extra_state(self) -> dict:
            return {"note": 1}

        def set_extra_state(self, extra: dict) -> None:
            assert extra == {"note": 1}

    student = Odd()
    distill(student, teacher=pair()[0], data=[X], epochs=2, out=tmp_path)
    assert student.a.weight is student.b.weight
    stored = load_file(tmp_path / "best.safetensors")
    assert torch.equal(stored["b.weight"], student.a.weight)
    assert torch.equal(stored["index"], torch.arange(4))
