"""What is no network, or stands in another's place, is said at the door of every verb."""

import pytest
import torch

import ghostify
from ghostify.nn.cifar import resnet20

X = torch.zeros(1, 3, 32, 32)
NET = resnet20()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: ghostify.plan(None, example_inputs=X), "model=None is no torch.nn.Module"),
        (lambda: ghostify.plan(X, example_inputs=X), r"model=tensor\(.* is no torch.nn.Module"),
        (lambda: ghostify.convert(resnet20, example_inputs=X), "model=<function res.* is no torch.nn.Module"),
        (lambda: ghostify.apply(NET, ghostify.plan(NET, example_inputs=X)), r"(?s)plan=CifarResNet\(.* is no Plan"),
        (lambda: ghostify.distill(None, teacher=NET, data=[X]), "student=None"),
        (lambda: ghostify.distill(NET, teacher="resnet20", data=[X]), "teacher='resnet20'"),
        (lambda: ghostify.compare(None, NET, example_inputs=X), "original=None"),
        (lambda: ghostify.compare(NET, X, example_inputs=X), "compressed=tensor"),
        (lambda: ghostify.save("small", NET), "model='small'"),
        (lambda: ghostify.load("small", base=None), "base=None"),
        (lambda: ghostify.export_onnx("small.onnx", NET, example_inputs=X), "model='small.onnx'"),
    ],
)
def test_wrong_kinds_of_arguments_are_named(call, told):
    with pytest.raises(ghostify.GhostifyError, match=told) as caught:
        call()
    assert len(str(caught.value)) < 300
