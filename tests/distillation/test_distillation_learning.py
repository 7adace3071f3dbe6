"""How a student learns: in parts, in several processes, with averages, and when it stops."""

import copy
import logging
import multiprocessing
import os
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ghostify
from ghostify.distillation import DistillConfig, FeatureTaps, ImageBatches, distill
from ghostify.distillation import loop as loop_module
from ghostify.distillation import processes as processes_module
from ghostify.distillation.batches import Batch
from ghostify.distillation.learning import swapped_norms
from ghostify.distillation.processes import Processes, read_epoch
from ghostify.errors import InputsError, OptionError, TrainingError


def network(seed: int, norm: type[nn.Module] | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norms = [] if norm is None else [norm(6)]
        return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), *norms, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))


def batches(count: int = 50, **options) -> ImageBatches:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return ImageBatches(
        pixels, labels, **{"batch_size": 16, "shuffle": True, "mean": (0.5,), "std": (0.25,), **options}
    )


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(a[name], b[name], atol=tolerance) for name in a)


def test_a_batch_in_parts_teaches_the_same() -> None:
    whole, parts = network(2), network(2)
    losses = []
    for student, accumulate in [(whole, 1), (parts, 3)]:
        config = DistillConfig(lr=0.05, accumulate=accumulate, hard_weight=0.5, precision="fp32")
        losses.append(distill(student, teacher=network(1), data=batches(), epochs=2, config=config).history[-1].loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert close(whole.state_dict(), parts.state_dict())
    assert not close(whole.state_dict(), network(2).state_dict(), 1e-3)


@pytest.mark.parametrize("freeze", [True, False])
def test_norms_that_are_frozen_keep_their_statistics_and_learn_the_rest(freeze: bool) -> None:
    student, start = network(2, nn.BatchNorm2d), network(2, nn.BatchNorm2d)
    config = DistillConfig(lr=0.05, freeze_norms=freeze, precision="fp32")
    distill(student, teacher=network(1), data=batches(), val=batches(), epochs=2, config=config)
    assert torch.equal(student[1].running_mean, start[1].running_mean) == freeze
    assert torch.equal(student[1].running_var, start[1].running_var) == freeze
    assert not torch.equal(student[1].weight, start[1].weight)
    assert all(module.training for module in student.modules())


def test_the_average_is_what_is_scored_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, torch.Tensor]] = []
    update = loop_module.Learner.update

    def noted(learner: loop_module.Learner) -> None:
        update(learner)
        steps.append({name: value.clone() for name, value in learner.student.state_dict().items()})

    monkeypatch.setattr(loop_module.Learner, "update", noted)
    student = network(2)
    distill(student, teacher=network(1), data=batches(), epochs=2, out=tmp_path, config=DistillConfig(lr=0.05, ema=0.7))
    average = {name: value.clone() for name, value in steps[0].items()}
    for later in steps[1:]:
        get_ema_multi_avg_fn(0.7)(list(average.values()), list(later.values()), 1)
    assert close(student.state_dict(), average, 1e-6)
    assert not close(student.state_dict(), steps[-1], 1e-4)


@pytest.mark.parametrize("decay", [0.9, 0.9995])
def test_the_average_of_a_ghost_network_keeps_the_order_of_its_channels(decay: float) -> None:
    original = nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 4))
    images = next(iter(batches()))[0]
    student = ghostify.convert(original, skip=["0"], example_inputs=images, initialiser="weights")
    student[1].set_order(torch.arange(64).flip(0))
    start = copy.deepcopy(student).eval()
    config = DistillConfig(lr=1e-9, ema=decay, weight_decay=0.0, precision="fp32")
    distill(student, teacher=original, data=batches(), epochs=3, config=config)
    assert torch.equal(student[1].channel_order, start[1].channel_order)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(images), start(images), rtol=1e-4, atol=1e-4)


def test_frozen_norms_need_norms_and_see_no_rows_of_others() -> None:
    with pytest.raises(OptionError, match=r"freeze_norms=True: student \(Sequential\) has no batch norm"):
        distill(network(2), teacher=network(1), data=batches(), config=DistillConfig(freeze_norms=True))
    with pytest.raises(OptionError, match="freeze_norms=True with sync_norms=True"):
        DistillConfig(freeze_norms=True, sync_norms=True)


def test_it_stops_where_patience_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    accuracies = iter([0.1, 0.5, 0.4, 0.3, 0.9])

    def dictated(student: nn.Module, **_) -> loop_module.Scores:
        return loop_module.Scores(loss=1.0, agreement=0.5, accuracy=next(accuracies), teacher_accuracy=0.9)

    monkeypatch.setattr(loop_module, "validate", dictated)
    config = DistillConfig(lr=0.05, patience=2)
    with caplog.at_level(logging.INFO):
        run = distill(network(2), teacher=network(1), data=batches(), val=batches(), epochs=9, config=config)
    assert (len(run.history), run.best_epoch) == (3, 1)
    assert "no epoch was better on val than epoch 1" in caplog.text
    with pytest.raises(OptionError, match="patience=2 needs validation data"):
        distill(network(2), teacher=network(1), data=batches(), config=config)


def test_features_teach_where_scores_say_nothing() -> None:
    def nothing(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return 0 * student.sum()

    def error(student: nn.Module) -> float:
        x = next(iter(batches()))[0]
        return float((student[0](x) - network(1)[0](x)).square().mean())

    student = network(2)
    before = error(student)
    config = DistillConfig(lr=0.1, loss=nothing, features=("0",))
    distill(student, teacher=network(1), data=batches(), epochs=10, config=config)
    assert error(student) < 0.2 * before


def test_maps_of_an_average_are_not_held_and_no_teacher_is_copied_with_it() -> None:
    student, teacher = network(2), network(1)
    with FeatureTaps(student, teacher, ("0",)) as taps:
        average = copy.deepcopy(student)
        for x, _ in batches():  # as in a validation
            average(x)
        assert taps._taps[0].given == []
        assert not any(hasattr(hook, "__self__") for hook in average._forward_pre_hooks.values())


def test_a_teacher_that_guesses_is_found_before_the_first_step() -> None:
    class Untouched(nn.Linear):
        def train(self, mode: bool = True) -> "Untouched":
            assert not mode, "training began"
            return super().train(mode)

    student = nn.Sequential(nn.Flatten(), Untouched(64, 4))
    with pytest.raises(
        TrainingError, match=r"teacher is right on .* % of 400 answers of val, and guessing is on 25.0 %"
    ):
        distill(student, teacher=network(1), data=batches(), val=batches(400))


@pytest.mark.parametrize("loss", ["kd", "dist"])
def test_one_score_has_no_probability_to_learn(loss: str) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    student, teacher = nn.Linear(4, 1), nn.Linear(4, 1)
    with pytest.raises(OptionError, match=rf"loss='{loss}' compares .* one score, .* Pass loss='mse'"):
        distill(student, teacher=teacher, data=[x], config=DistillConfig(loss=loss))
    run = distill(student, teacher=teacher, data=[x], val=[x], epochs=9, config=DistillConfig(loss="mse"))
    assert run.history[-1].val_loss < 0.5 * run.start.loss


def test_synchronised_norms_share_everything_and_are_gone_afterwards() -> None:
    student = network(2, nn.BatchNorm2d)
    norm = student[1]
    with pytest.raises(OptionError, match="sync_norms=True: torch synchronises batch norms on GPUs only"):
        distill(student, teacher=network(1), data=batches(), config=DistillConfig(sync_norms=True))
    with swapped_norms(student):
        assert isinstance(student[1], nn.SyncBatchNorm)
        assert student[1].weight is norm.weight
        assert student[1].running_mean is norm.running_mean
    assert student[1] is norm


def test_rows_of_all_processes_are_the_batch() -> None:
    for size in range(9):
        rows = [list(range(size))[Processes(rank, 4).rows(size)] for rank in range(4)]
        assert [row for part in rows for row in part] == list(range(size))


def test_processes_that_found_different_states_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(places: list[torch.Tensor], own: torch.Tensor) -> None:
        for place, value in zip(places, [[5, 2], [5, 2], found], strict=True):
            place.copy_(torch.tensor(value))

    monkeypatch.setattr(processes_module.dist, "all_gather", gather)
    found = [5, 2]
    Processes(1, 3).check_position(5, 2, torch.device("cpu"))
    found = [1, 0]  # on a machine that does not see the folder
    with pytest.raises(TrainingError, match=r"process 2 goes on at epoch=1, step=0, and process 0 at epoch=5, step=2"):
        Processes(1, 3).check_position(5, 2, torch.device("cpu"))


@pytest.mark.parametrize("first", range(5))
def test_all_processes_take_part_in_every_step_wherever_they_go_on(first: int) -> None:
    data = batches(49)  # the last batch has one image, for two processes
    for rank in range(2):
        items = list(read_epoch(data, 1, first, processes=Processes(rank, 2), seed=0, device=torch.device("cpu")))
        assert [item.step for item in items] == list(range(first, 4))
        assert [item.counts for item in items] == [rank == 0 or step < 3 for step in range(first, 4)]


class FrozenNorm(nn.BatchNorm2d):
    """A norm that never trains, for it would see the rows of its own process alone."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        return super().train(False)


class Plain:
    """Data that know nothing of processes."""

    def __iter__(self):
        return iter(batches(49))


def in_two_processes(work, *args) -> None:
    """Run ``work(*args)`` as each of two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fresh = multiprocessing.get_context("spawn")  # OpenMP's threads do not outlive a fork
    children = [fresh.Process(target=one_of_two, args=(rank, port, work, *args)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0]


def one_of_two(rank: int, port: int, work, *args) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    work(rank, *args)


FROZEN = DistillConfig(lr=0.05, precision="fp32", state_every=2)


def learned(rank: int, sources: dict, out: Path) -> None:
    for name, data in sources.items():
        student, folder = network(2, FrozenNorm), out / name
        run = distill(student, teacher=network(1), data=data, val=batches(), epochs=2, config=FROZEN, out=folder)
        torch.save((student.state_dict(), run.history, run.start), folder / f"{rank}.pt")


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    sources = {"shards": batches(49), "rows": Plain()}  # the last batch has one image, for two processes
    in_two_processes(learned, sources, tmp_path)
    for name, data in sources.items():
        student = network(2, FrozenNorm)
        run = distill(student, teacher=network(1), data=data, val=batches(), epochs=2, config=FROZEN)
        for rank in range(2):
            weights, history, start = torch.load(tmp_path / name / f"{rank}.pt", weights_only=False)
            assert close(weights, student.state_dict())
            assert start.accuracy == run.start.accuracy
            for mine, theirs in zip(history, run.history, strict=True):
                assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
                assert mine.val_accuracy == theirs.val_accuracy
        assert (tmp_path / name / "best.safetensors").exists()


def refused(rank: int) -> None:
    images = torch.utils.data.TensorDataset(torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    halves = torch.utils.data.DistributedSampler(images, num_replicas=2, rank=rank)
    loader = torch.utils.data.DataLoader(images, batch_size=8, sampler=halves)
    with pytest.raises(InputsError, match="process 1 reads another first batch of data"):
        distill(network(2, FrozenNorm), teacher=network(1), data=loader, epochs=1, config=FROZEN)


@pytest.mark.parametrize("other", ["size", "values", "order", "same"])
def test_processes_compare_their_first_batches(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    gathered: list[torch.Tensor] = []

    def gather(everyones: list[torch.Tensor], own: torch.Tensor) -> None:
        gathered.append(own)
        for everyone, value in zip(everyones, [gathered[0], own], strict=True):
            everyone.copy_(value)

    monkeypatch.setattr(processes_module.dist, "all_gather", gather)
    inputs = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mine = {"size": inputs[:7], "values": inputs + 1, "order": inputs.flip(0), "same": inputs.clone()}[other]
    Processes(0, 2).check_data(Batch(inputs, None), "data")
    with nullcontext() if other == "same" else pytest.raises(InputsError, match="process 1 reads another first batch"):
        Processes(1, 2).check_data(Batch(mine, None), "data")


class WithSpare(nn.Module):
    """A network with a head that its answer does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = network(2, FrozenNorm), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class TakesTurns(WithSpare):
    """A network whose second head takes part in every other call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        answer = self.body(x)
        return answer + self.spare(answer) if self.calls % 2 else answer


def taking_turns(rank: int) -> None:
    """With a gradient from the first part, and none in the last one, where processes share what they have."""
    student = TakesTurns()
    with pytest.raises(TrainingError, match=r"did not depend on in this step \(spare.weight, spare.bias\)"):
        distill(student, teacher=network(1), data=batches(), epochs=1, config=replace(FROZEN, accumulate=2))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in student.parameters())


def with_spare(rank: int) -> None:
    student = WithSpare()
    with pytest.raises(TrainingError, match=r"student has 2 parameters .*\(spare.weight, spare.bias\), and several"):
        distill(student, teacher=network(1), data=batches(), epochs=1, config=FROZEN)
    student.spare.requires_grad_(False)
    assert distill(student, teacher=network(1), data=batches(), epochs=1, config=FROZEN).history


def both(rank: int) -> None:
    refused(rank)
    with_spare(rank)
    taking_turns(rank)


def test_shared_out_data_and_idle_parameters_are_refused_where_processes_are_several() -> None:
    pytest.importorskip("accelerate")
    assert distill(WithSpare(), teacher=network(1), data=batches(), epochs=1, config=FROZEN).history
    in_two_processes(both)
