"""A run that is stopped, killed or damaged goes on, and ends as if nothing had happened."""

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from interrupted_runs import CONFIG, EPOCHS, STEPS, Interrupted, Interrupting, Loader, batches, network, run, same, stop
from torch import nn

from ghostify.distillation import DistillConfig, distill, loop
from ghostify.distillation.state import Progress, read_state, write_state
from ghostify.distillation.stopping import watched_signals
from ghostify.errors import OptionError, OutputError


def loud(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Its gradients are too large for the factor that half precision begins with."""
    return 6 * (student.float() - teacher.float()).square().mean()


CONFIGS = {
    "sgd": CONFIG,
    "adamw": DistillConfig(lr=0.01, optimizer="adamw", state_every=1),
    "half": DistillConfig(lr=0.05, precision="fp16", loss=loud, state_every=1),
    "all": DistillConfig(lr=0.05, ema=0.9, mixup=0.3, accumulate=2, hard_weight=0.3, state_every=1),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", [batches, Loader])
def test_a_stopped_run_ends_as_one_that_was_never_stopped(tmp_path: Path, name: str, make) -> None:
    config = CONFIGS[name]
    whole = run(tmp_path / "whole", make(), config=config)
    for epoch, step in [(1, 3), (2, 0), (3, 5)]:
        out = tmp_path / f"{epoch}-{step}"
        with pytest.raises(KeyboardInterrupt):
            run(out, Interrupted(make(), epoch, step, stop), config=config)
        assert same(run(out, make(), resume=True, config=config), whole)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole = run(tmp_path)
    assert same(run(tmp_path, Interrupted(batches(), 2, 0, stop), resume=True), whole)


def test_channels_last_weights_get_their_memory_back(tmp_path: Path) -> None:
    def started(data, *, resume: bool) -> dict[str, torch.Tensor]:
        student = network(2)
        torch.manual_seed(0)
        student.insert(3, nn.Conv2d(6, 6, 3))
        student.to(memory_format=torch.channels_last)
        distill(student, teacher=network(1), data=data, epochs=EPOCHS, out=tmp_path, config=CONFIG, resume=resume)
        return student.state_dict()

    whole = started(batches(), resume=False)
    with pytest.raises(KeyboardInterrupt):
        started(Interrupted(batches(), 2, 2, stop), resume=False)
    assert same(started(batches(), resume=True), whole)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """As a terminal has them; where tests run in the background of a script, SIGINT is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_waits_for_the_step_and_writes_the_state(
    tmp_path: Path, number: int, error: type, usual_signals: None
) -> None:
    config = DistillConfig(lr=0.05)  # no state is due by itself
    whole = run(tmp_path / "whole", config=config)
    before = signal.getsignal(number)
    with pytest.raises(error) as caught:
        run(tmp_path / "run", Interrupted(batches(), 2, 2, lambda: os.kill(os.getpid(), number)), config=config)
    assert number != signal.SIGTERM or caught.value.code == 143
    assert signal.getsignal(number) is before
    assert sorted(p.name for p in (tmp_path / "run/state").iterdir())[-1] == "000002-000000003.safetensors"
    assert same(run(tmp_path / "run", resume=True, config=config), whole)


def test_without_a_folder_signals_are_left_alone() -> None:
    seen = []
    data = Interrupted(batches(), 1, 0, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    distill(network(2), teacher=network(1), data=data, epochs=1)
    assert set(seen) == {signal.getsignal(signal.SIGTERM)}


def test_it_runs_in_a_thread_of_its_own(tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert (tmp_path / "best.safetensors").exists()


def killed_run(out: Path, begun) -> None:
    torch.set_num_threads(1)
    begun.set()
    run(out, resume=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are rounded otherwise by more threads, and the children have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_ten_times_at_any_moment_it_ends_the_same(tmp_path: Path, one_thread: None) -> None:
    # A server that has imported everything and used no thread yet: its forks are quick and sound.
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["ghostify", "torch._dynamo"])  # optimisers import the latter
    whole = run(tmp_path / "whole")
    chance, out = random.Random(0), tmp_path / "run"
    kills = 0
    while kills < 10:
        begun = fresh.Event()
        child = fresh.Process(target=killed_run, args=(out, begun))
        child.start()
        assert begun.wait(60)
        time.sleep(chance.uniform(0.01, 0.12))
        alive = child.is_alive()
        child.kill()
        child.join()
        if not alive:  # it was done already: what it wrote is compared below, and another one is killed
            assert child.exitcode == 0
            assert same(run(out, resume=True), whole)
            out = tmp_path / f"run{kills}"
            continue
        kills += 1
    assert same(run(out, resume=True), whole)
    assert not [p for p in (out / "state").iterdir() if p.suffix != ".safetensors"]
    assert not list(out.glob(".last.*"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "foreign"])
def test_a_damaged_state_is_told_of_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupted(batches(), 2, 3, stop))
    newest = max((tmp_path / "run/state").iterdir())
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[-5] ^= 4
    newest.write_bytes(
        {"flipped": content, "truncated": content[:-100], "emptied": b"", "foreign": b"not a state"}[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert same(run(tmp_path / "run", resume=True), whole)
    assert f"{newest} is damaged" in caplog.text


def test_what_would_be_lost_or_mixed_up_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(batches(), 2, 3, stop))
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    with pytest.raises(OutputError, match=r"holds a run that is not finished\. Pass resume=True"):
        run(tmp_path)
    with pytest.raises(OptionError, match=r"momentum=0.5, and the run in .* was begun with 0.9"):
        run(tmp_path, resume=True, config=DistillConfig(momentum=0.5, lr=0.01))
    assert "from here on" not in caplog.text
    again = {"epochs": EPOCHS, "out": tmp_path, "config": CONFIG, "resume": True}
    with pytest.raises(OptionError, match=r"teacher's weights=.*was begun with"):
        distill(network(2), teacher=network(3), data=batches(), val=batches(), **again)
    wider = nn.Sequential(*network(2), nn.Linear(4, 4))
    with pytest.raises(OptionError, match=r": student's shapes: 7.weight=\[4, 4\], and .* with None\. Pass") as told:
        distill(wider, teacher=network(1), data=batches(), val=batches(), **again)
    assert len(str(told.value)) < 300 + len(str(tmp_path))
    with pytest.raises(OptionError, match=r"resume=True needs the folder of the run"):
        distill(network(2), teacher=network(1), data=batches(), resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == kept


def test_what_nothing_can_go_on_from_is_refused_and_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(batches(), 2, 3, stop))
    kept = (tmp_path / "history.json").read_bytes()
    states = list((tmp_path / "state").iterdir())
    for path in states:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"all 3 states in .* are damaged"):
        run(tmp_path, resume=True)
    for path in states:
        path.unlink()
    with pytest.raises(
        OutputError, match=r"holds no state to go on from, and history.json beside it tells of 1 epochs"
    ):
        run(tmp_path, resume=True)
    assert (tmp_path / "history.json").read_bytes() == kept


@pytest.mark.parametrize("moment", ["RunLog.epoch", "States.write", "write_weights", "write_history"])
def test_killed_while_an_epoch_is_written_down_it_loses_no_row(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillConfig(lr=0.05)
    whole = run(tmp_path / "whole", config=config)
    *held_by, name = moment.split(".")
    owner = getattr(loop, held_by[0]) if held_by else loop
    there, calls = getattr(owner, name), []

    def killed(*args, **options) -> None:
        calls.append(1)
        if "write" in name and not (tmp_path / "run/epochs.csv").exists():
            return there(*args, **options)  # the start
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", config=config)
    assert calls
    assert same(run(tmp_path / "run", resume=True, config=config), whole)
    for file in ("epochs.csv", "steps.csv"):
        rows = [(tmp_path / part / file).read_text().splitlines() for part in ("whole", "run")]
        assert [row.split(",")[:5] for row in rows[0]] == [row.split(",")[:5] for row in rows[1]]


def test_an_error_in_the_data_loses_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def unreadable() -> None:
        raise OSError("disk is gone")

    config = DistillConfig(lr=0.05)  # no state is due by itself
    whole = run(tmp_path / "whole", config=config)
    with pytest.raises(OSError, match="disk is gone"):
        run(tmp_path / "run", Interrupted(batches(), 2, 4, unreadable), config=config)
    assert max((tmp_path / "run/state").iterdir()).stem == "000002-000000004"
    assert f"with resume=True (--resume) it goes on from {tmp_path / 'run/state'}" in caplog.text
    assert same(run(tmp_path / "run", resume=True, config=config), whole)


def test_a_signal_ends_a_validation(tmp_path: Path, usual_signals: None) -> None:
    config, passes = DistillConfig(lr=0.05), []

    class Watched:
        def __len__(self) -> int:
            return STEPS

        def __iter__(self) -> Iterator[torch.Tensor]:
            passes.append(0)
            for pixels, labels in batches():
                if len(passes) == 2 + EPOCHS:  # looked at, the start, … the last epoch
                    os.kill(os.getpid(), signal.SIGTERM)
                passes[-1] += 1
                yield pixels, labels

    def validated(out: Path, val, *, resume: bool = False) -> dict[str, torch.Tensor]:
        student, options = network(2), {"epochs": EPOCHS, "config": config, "out": out, "resume": resume}
        distill(student, teacher=network(1), data=batches(), val=val, **options)
        return student.state_dict()

    whole = validated(tmp_path / "whole", batches())
    with pytest.raises(SystemExit):
        validated(tmp_path / "run", Watched())
    assert passes[-1] == 1
    assert same(validated(tmp_path / "run", batches(), resume=True), whole)


def test_a_repeated_sigterm_changes_nothing_and_one_process_hears_a_second_sigint(usual_signals: None) -> None:
    for alone in (True, False):
        with watched_signals(watch=True, alone=alone) as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt) if alone else nullcontext():
                os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so(usual_signals: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with watched_signals(watch=True, alone=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("sampled", [False, True])
def test_a_loader_with_a_generator_of_its_own_goes_on(tmp_path: Path, sampled: bool) -> None:
    def loader() -> torch.utils.data.DataLoader:
        images = torch.utils.data.TensorDataset(*next(iter(batches(batch_size=16 * STEPS))))
        own = torch.Generator().manual_seed(5)
        if sampled:
            sampler = torch.utils.data.RandomSampler(images, generator=own)
            return torch.utils.data.DataLoader(images, batch_size=16, sampler=sampler)
        return torch.utils.data.DataLoader(images, batch_size=16, shuffle=True, generator=own)

    whole = run(tmp_path / "whole", Interrupting(loader(), 9, 9))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupting(loader(), 2, 3))
    assert same(run(tmp_path / "run", Interrupting(loader(), 9, 9), resume=True), whole)


def test_a_machine_that_computes_otherwise_is_told_of(tmp_path, caplog, monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(batches(), 2, 3, stop), config=DistillConfig(precision="fp32"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    run(tmp_path, batches(), resume=True, config=DistillConfig(precision="auto"))
    assert "from here on precision='bf16'; the run was begun with 'fp32'" in caplog.text


def test_other_data_are_told_of_when_a_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(batches(), 2, 3, stop))
    run(tmp_path, batches(), resume=True)
    assert "another batch" not in caplog.text
    other = batches()
    other.images = 255 - other.images
    run(tmp_path, other, resume=True)
    assert "data begins with another batch than when the run was begun" in caplog.text
    with pytest.raises(OptionError, match="batches of val=None"):
        distill(network(2), teacher=network(1), data=batches(), epochs=EPOCHS, out=tmp_path, config=CONFIG, resume=True)


def test_only_two_states_are_kept_and_a_state_says_everything(tmp_path: Path) -> None:
    (tmp_path / ".000001-000000000.a1b2c3d4.safetensors").write_bytes(b"half of a st")  # of a process that was killed
    for epoch, step in [(1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3)]:
        write_state(tmp_path, Progress(epoch=epoch, step=step), {"a": torch.arange(step)}, {"lr": 0.1})
    kept = ["000003-000000000", "000003-000000002", "000003-000000003"]  # and that of the last complete epoch
    assert sorted(path.stem for path in tmp_path.iterdir()) == kept
    progress, tensors = read_state(tmp_path, {"lr": 0.1})
    assert progress == Progress(epoch=3, step=3)
    assert tensors["a"].tolist() == [0, 1, 2]


def test_a_state_of_an_earlier_version_is_gone_on_from(tmp_path, caplog) -> None:
    write_state(tmp_path, Progress(epoch=2, step=1), {}, {"lr": 0.1})
    for graphs in (False, True):
        progress, _ = read_state(tmp_path, {"lr": 0.1, "cuda_graphs": graphs})
        assert progress.epoch == 2
    assert not caplog.text
    write_state(tmp_path, Progress(epoch=3, step=1), {}, {"lr": 0.1, "cuda_graphs": True})
    read_state(tmp_path, {"lr": 0.1, "cuda_graphs": False})
    assert "from here on cuda_graphs=False; the run was begun with True" in caplog.text
