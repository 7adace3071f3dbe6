"""The controls of examples/cifar10.py, and the page that it makes."""

import argparse
import importlib.util
import json
import sys

import pytest
import torch

import ghostify
from benchmarks.controls import narrowed, plain
from benchmarks.pages import read_rows
from benchmarks.results import CASE, hardware, write_page
from examples import cifar10
from ghostify.nn.cifar import BasicBlock
from ghostify.tracing.counting import count_macs, count_params

IMAGES = torch.randn(2, 3, 32, 32)
PAGE = "before\n<!-- begin: examples.cifar10 -->\n<!-- end: examples.cifar10 -->\nafter\n"


def ghost_macs(model, ratio):
    return ghostify.plan(model, ratio=ratio, example_inputs=IMAGES).macs_after


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("vgg16", 14.99), ("mobilenet_v2", 2.24)])
def test_networks_are_those_of_the_papers(name, millions):
    if name == "mobilenet_v2" and not importlib.util.find_spec("torchvision"):
        pytest.skip("needs torchvision")
    model = plain(name).eval()
    assert count_params(model) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model(IMAGES).shape == (2, 10)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_a_narrow_network_has_the_macs_of_a_ghost_network(ratio):
    macs = ghost_macs(plain("resnet20"), ratio)
    small = narrowed("resnet20", macs, IMAGES)
    assert count_macs(small, IMAGES[:1]).macs == pytest.approx(macs, rel=0.01)
    assert small.eval()(IMAGES).shape == (2, 10)


def test_a_shortcut_pads_an_odd_number_of_channels():
    block = BasicBlock(3, 6, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(block(x)[:, 1:4], x[:, :, ::2, ::2])


def test_a_seed_gives_a_narrow_network_its_weights():
    one, same, other = (narrowed("resnet20", 20_000_000, IMAGES, seed) for seed in (0, 0, 1))
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def finished(folder, **known):
    row = dict.fromkeys(CASE, 0) | {"network": "resnet20", "teacher": "resnet20", "method": "ghost"}
    row |= {"ratio": 2.0, "fusion": "concat"}
    row |= {"params": 139_114, "macs": 21_271_168, "epochs": 30, "start_seconds": 60.0, "seconds": 7200.0}
    row |= {"test": 90.0, "hardware": hardware("cpu", 1), "on": "here"} | known
    place = folder / "-".join(str(row[name]) for name in ("method", "seed"))
    place.mkdir(parents=True)
    (place / "row.json").write_text(json.dumps(row))


def test_the_page_has_a_line_for_all_seeds(tmp_path, capsys):
    docs, runs = tmp_path / "docs", tmp_path / "runs"
    docs.mkdir()
    (docs / "results.md").write_text(PAGE)
    finished(runs, seed=0, test=90.0)
    finished(runs, seed=1, test=91.0)
    finished(runs, method="teacher", ratio=1.0, epochs=0, test=91.7)
    (runs / "begun").mkdir()
    write_page(runs, docs)
    text = (docs / "results.md").read_text()
    assert "90.50 ± 0.71 | 2 " in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.index("teacher") < text.index("ghost")
    assert "resnet20" in (docs / "results.svg").read_text()

    (runs / "ghost-0" / "row.json").unlink()  # what was taken over once stays
    write_page(runs, docs)
    assert len(read_rows(docs / "results.json")) == 3
    assert (docs / "results.md").read_text() == text


def test_seeds_on_several_machines_are_one_line_without_times(tmp_path, capsys):
    docs, runs = tmp_path / "docs", tmp_path / "runs"
    docs.mkdir()
    (docs / "results.md").write_text(PAGE)
    finished(runs, seed=0, test=90.0, hardware="one")
    finished(runs, seed=1, test=91.0, hardware="other")
    write_page(runs, docs)
    line = next(line for line in (docs / "results.md").read_text().splitlines() if "90.50" in line)
    assert [cell.strip() for cell in line.split("|")][7:-1] == ["90.50 ± 0.71", "2", "", "", "one or other"]


def asked(monkeypatch, folder, *arguments):
    """What a command line runs."""
    ran = []
    monkeypatch.setattr(cifar10, "run", lambda case, options: ran.append(str(case)) or {})
    folders = ["--weights", str(folder), "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", ["cifar10", *folders, *arguments])
    cifar10.main()
    return ran


def test_a_setting_that_a_method_does_not_have_counts_once(monkeypatch, tmp_path):
    ran = asked(monkeypatch, tmp_path, "--method", "ghost", "pruned", "undistilled", "--fusion", "concat", "add")
    assert ran == [
        "resnet20-ghost-s2-30epochs-seed0",
        "resnet20-pruned-s2-30epochs-seed0",
        "resnet20-undistilled-s2-0epochs-seed0",
        "resnet20-ghost-s2-add-30epochs-seed0",
        "resnet20-undistilled-s2-add-0epochs-seed0",
    ]


def test_another_teacher_is_that_of_all_who_learn_from_one(monkeypatch, tmp_path):
    ran = asked(monkeypatch, tmp_path, "--teacher", "resnet56", "--method", "narrow", "labels", "undistilled")
    assert ran == [
        "resnet20-narrow-s2-by-resnet56-30epochs-seed0",
        "resnet20-labels-s2-30epochs-seed0",
        "resnet20-undistilled-s2-0epochs-seed0",
    ]


def test_a_teacher_is_trained_before_its_students(monkeypatch, tmp_path):
    assert asked(monkeypatch, tmp_path, "--network", "vgg16", "--method", "ghost", "teacher") == [
        "vgg16-teacher-s1-30epochs-seed0",
        "vgg16-ghost-s2-30epochs-seed0",
    ]


def test_all_students_have_one_teacher(monkeypatch, tmp_path):
    ran = asked(monkeypatch, tmp_path, "--network", "vgg16", "--method", "teacher", "--seeds", "1", "2")
    assert ran == ["vgg16-teacher-s1-30epochs-seed0"]


def test_no_run_at_a_time_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        asked(monkeypatch, tmp_path, "--side-by-side", "0")
    assert "--side-by-side 0: at least one run at a time" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again(monkeypatch, tmp_path):
    (tmp_path / "resnet20-ghost-s2-30epochs-seed0").mkdir()
    (tmp_path / "resnet20-ghost-s2-30epochs-seed0" / "row.json").write_text("{}")
    assert asked(monkeypatch, tmp_path, "--seeds", "0", "1") == ["resnet20-ghost-s2-30epochs-seed1"]


def test_a_teacher_is_trained_where_it_has_no_weights(monkeypatch, tmp_path):
    assert asked(monkeypatch, tmp_path, "--method", "teacher") == ["resnet20-teacher-s1-30epochs-seed0"]
    (tmp_path / "cifar10_resnet20.safetensors").touch()
    assert asked(monkeypatch, tmp_path, "--method", "teacher") == ["resnet20-teacher-s1-0epochs-seed0"]


def test_the_folder_of_another_run_is_refused(monkeypatch, tmp_path):
    case = cifar10.Case("resnet20", "resnet20", "ghost", 2.0, "concat", 30, 1024, 0, "mse", 0.05, 0.1, 128)
    options = argparse.Namespace(threads=1, device="cpu")
    cifar10.begun(case, tmp_path, options)
    cifar10.begun(case, tmp_path, options)  # goes on
    with pytest.raises(SystemExit, match="other settings"):
        cifar10.begun(cifar10.replace(case, images=512), tmp_path, options)


@pytest.mark.parametrize("method", ["random", "narrow"])
def test_the_start_of_a_run_that_goes_on_is_the_same(monkeypatch, tmp_path, method):
    case = cifar10.Case("resnet20", "resnet20", method, 2.0, "concat", 30, 2, 0, "mse", 0.05, 0.1, 128)
    teacher = plain("resnet20").eval()
    first, seconds = cifar10.start_of(case, teacher, IMAGES, tmp_path)
    assert seconds > 0
    if method == "random":  # Ghost units are not made again
        monkeypatch.setitem(cifar10.METHODS, method, None)
    again, told = cifar10.start_of(case, teacher, IMAGES, tmp_path)
    assert (told == seconds) is (method == "random")
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert torch.equal(again.eval()(IMAGES), first.eval()(IMAGES))


def test_a_run_that_goes_on_elsewhere_tells_of_both_machines(tmp_path):
    case = cifar10.Case("resnet20", "resnet20", "ghost", 2.0, "concat", 30, 1024, 0, "mse", 0.05, 0.1, 128)
    for threads in (1, 2, 1):
        made = cifar10.begun(case, tmp_path, argparse.Namespace(threads=threads, device="cpu"))
    assert made["hardware"] == f"{hardware('cpu', 1)}; {hardware('cpu', 2)}"
    assert made["on"].count("ghostify") == 2
    known = json.loads((tmp_path / "case.json").read_text())
    del known["hardware"]  # as an earlier version noted it
    (tmp_path / "case.json").write_text(json.dumps(known))
    made = cifar10.begun(case, tmp_path, argparse.Namespace(threads=1, device="cpu"))
    assert made["hardware"] == f"{hardware('cpu', 1)}; unknown"
