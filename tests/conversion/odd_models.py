"""A small residual model to make odd ones of, and how far a conversion is from it."""

import torch
import torch.nn.functional as F
from torch import nn

import ghostify

X = torch.randn(8, 8, 12, 12, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """Two residual convolutions; what differs from model to model is the forward."""

    def __init__(self):
        super().__init__()
        self.c0 = nn.Conv2d(8, 16, 3, padding=1)
        self.c1, self.b1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.c2, self.b2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def body(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + self.b1(self.c1(x)))
        x = F.relu(x + self.b2(self.c2(x)))
        return self.head(x.mean((2, 3)))

    def forward(self, x):
        return self.body(x)


def made(kind=Base, **kwargs):
    torch.manual_seed(0)
    return kind(**kwargs).eval()


def converted(model, **options):
    return ghostify.convert(model, **{"example_inputs": X, "calibration": X} | options)


def error(small, model, x=X):
    with torch.no_grad():
        return float((small.eval()(x) - model.eval()(x)).norm() / model(x).norm())


class CallsAFunction(Base):
    """A convolution of its body is called as a function."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)) / 12)

    def body(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + self.b1(F.conv2d(x, self.weight, padding=1)))
        return self.head((x + self.b2(self.c2(x))).mean((2, 3)))


class TakesOffItsMean(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, 8))

    def forward(self, x):
        return self.body(x - self.mean.view(1, -1, 1, 1))
