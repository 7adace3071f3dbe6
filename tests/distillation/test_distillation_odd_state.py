"""Models whose state is sparse, or has no shape yet."""

import pytest
import torch
from torch import nn

from ghostify.distillation import distill
from ghostify.errors import TrainingError

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Mixes(nn.Module):
    """Its state holds a sparse tensor."""

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.register_buffer("matrix", torch.eye(3).to_sparse(), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.matrix, self.inner(x).t()).t()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_lazy_parameters_are_named(role) -> None:
    for lazy, name in ((nn.LazyLinear(3), "weight"), (nn.LazyBatchNorm1d(affine=False), "1.running_mean")):
        model = lazy if name == "weight" else nn.Sequential(nn.Linear(4, 3), lazy)
        models = {"student": nn.Linear(4, 3), "teacher": nn.Linear(4, 3)} | {role: model}
        with pytest.raises(TrainingError, match=f"{role}'s '{name}' is lazy and has no shape yet"):
            distill(**models, data=[X])


def test_sparse_tensors_take_part_but_are_not_stored(tmp_path) -> None:
    distill(Mixes(), teacher=Mixes(), data=[X], epochs=1)
    distill(Mixes(persistent=False), teacher=Mixes(), data=[X], epochs=1, out=tmp_path / "kept out")
    with pytest.raises(TrainingError, match="student's state holds 'matrix', a sparse tensor"):
        distill(Mixes(), teacher=Mixes(), data=[X], epochs=1, out=tmp_path / "in it")
    assert not (tmp_path / "in it").exists()
