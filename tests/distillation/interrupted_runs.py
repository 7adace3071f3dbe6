"""Runs that are stopped half-way, for the tests of going on."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ghostify.distillation import DistillConfig, ImageBatches, distill

EPOCHS, STEPS = 3, 6


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 4),
        )


def batches(**options) -> ImageBatches:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16 * STEPS, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (len(pixels),), generator=generator)
    return ImageBatches(
        pixels, labels, **{"batch_size": 16, "shuffle": True, "mean": (0.5,), "std": (0.25,), **options}
    )


class Loader:
    """Data that draw their order from the global random numbers, and know nothing of beginning in the middle."""

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        everything = list(batches(shuffle=False))
        for index in torch.randperm(STEPS).tolist():
            pixels, labels = everything[index]
            yield pixels + 0.1 * torch.randn_like(pixels), labels


class Interrupted:
    """Data that do something at one batch of one epoch."""

    def __init__(self, data, epoch: int, step: int, act) -> None:
        self.data, self.at, self.act, self.epoch = data, (epoch, step), act, 1

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch + 1
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __iter__(self):
        for step, batch in enumerate(self.data):
            if (self.epoch, step) == self.at:
                self.act()
            yield batch


class Interrupting:
    """The same for a loader, whose parts can be seen."""

    def __init__(self, loader, epoch: int, step: int) -> None:
        self.loader, self.at, self.passes = loader, (epoch, step), -1  # the first pass looks at one batch

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.passes += 1
        for step, batch in enumerate(self.loader):
            if (self.passes, step) == self.at:
                stop()
            yield batch


def run(out: Path, data=None, *, resume: bool = False, config: DistillConfig | None = None) -> dict[str, torch.Tensor]:
    """Run to the end, and give the student's weights and the last ones: the best may be those that it came with."""
    student, data = network(2), batches() if data is None else data
    config = config or CONFIG
    distill(student, teacher=network(1), data=data, val=batches(), epochs=EPOCHS, out=out, config=config, resume=resume)
    last = load_file(out / "last.safetensors")
    return {**student.state_dict(), **{f"last {name}": value for name, value in last.items()}}


CONFIG = DistillConfig(lr=0.05, state_every=1)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop() -> None:
    raise KeyboardInterrupt
