"""An artefact of an earlier day must load today, in a fresh process, without calibration data, and answer the same.

`stored/` was made by running this file (`python tests/deployment/test_stored_artefact.py`) with ghostify 0.1.0 and
torch 2.13.0. It is made anew only when the format changes on purpose: then the version in `manifest.py` goes up and
CHANGELOG.md says that older artefacts cannot be read.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deployment_nets import make_net
from torch import Tensor

from ghostify.conversion import convert
from ghostify.deployment import load, save
from ghostify.spec import GhostSpec

STORED = Path(__file__).parent / "stored"


def fixed_input() -> Tensor:
    """Two images ``(2, 3, 12, 12)`` of plain arithmetic, the same with every version of torch."""
    return (torch.arange(2 * 3 * 12 * 12, dtype=torch.float32).reshape(2, 3, 12, 12) * 0.37).sin()


def make() -> None:
    """Write the artefact and what it answers; the start is `alternating`, so channels are reordered."""
    net = make_net(width=6)
    calibration = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    net(calibration)  # statistics of the norms that are not the initial ones
    specs = {"features.2": GhostSpec(2), "features.5": GhostSpec(1.5, fusion="add")}
    small = convert(net, overrides=specs, example_inputs=calibration[:1], calibration=calibration)
    save(small, STORED / "artefact")
    with torch.no_grad():
        answers = small.eval()(fixed_input())
    (STORED / "expected.json").write_text(
        json.dumps([[round(x, 7) for x in row] for row in answers.tolist()], indent=1)
    )


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, ghostify
from deployment_nets import make_net
from test_stored_artefact import STORED, fixed_input
small = ghostify.load(STORED / "artefact", base=make_net(width=6, seed=7))
with torch.no_grad():
    print(json.dumps(small(fixed_input()).tolist()))
"""


def test_a_stored_artefact_answers_as_on_the_day_it_was_made() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = torch.tensor(json.loads((STORED / "expected.json").read_text()))
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-4, atol=1e-5)


def test_saving_it_again_writes_the_same_weights(tmp_path: Path) -> None:
    again = save(load(STORED / "artefact", base=make_net(width=6)), tmp_path / "again")
    assert (again / "weights.safetensors").read_bytes() == (STORED / "artefact/weights.safetensors").read_bytes()


def test_it_is_small_and_holds_what_can_go_wrong() -> None:
    assert sum(file.stat().st_size for file in STORED.rglob("*") if file.is_file()) <= 20_000
    plan = load(STORED / "artefact", base=make_net(width=6)).ghostify_plan
    assert {decision.spec.fusion for decision in plan.replaced} == {"concat", "add"}
    tensors = json.loads((STORED / "artefact/plan.json").read_text())["content"]["tensors"]
    assert any(name.endswith("output_channels") for name in tensors)


def test_another_answer_would_be_seen(tmp_path: Path) -> None:
    """The expected numbers depend on the weights: with others they are not met."""
    shutil.copytree(STORED / "artefact", tmp_path / "artefact")
    small = load(tmp_path / "artefact", base=make_net(width=6))
    with torch.no_grad():
        small.stem.weight.mul_(1.01)
        answers = small(fixed_input())
    expected = torch.tensor(json.loads((STORED / "expected.json").read_text()))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    make()
