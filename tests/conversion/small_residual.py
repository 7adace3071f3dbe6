"""A small residual network, images for it, and how far a conversion is from it."""

import torch
from torch import nn

from ghostify.nn.cifar import CifarResNet
from ghostify.tracing import evaluating

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def net():
    """A small residual network whose norms have seen something."""
    torch.manual_seed(0)
    model = CifarResNet(1, width=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def error(small, model):
    with torch.no_grad(), evaluating(small, model):
        return float((small(X) - model(X)).square().mean() / model(X).var())
