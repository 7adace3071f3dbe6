"""What an error in a site's channels costs at the output."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ghostify
from ghostify.conversion import initialisers, sensitivity
from ghostify.tracing import Example

IMAGES = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Means(nn.Module):
    """Outputs are linear in the means of a site's channels."""

    def __init__(self, logits):
        super().__init__()
        self.stem, self.site = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.logits = nn.Linear(8, 12), logits

    def forward(self, x):
        made = self.head(self.site(torch.relu(self.stem(x))).relu_().mean((2, 3)))
        return made if self.logits else (made, made[:, :1])


def metric_of(model, images=IMAGES):
    plan = ghostify.plan(model, example_inputs=images[:1], overrides={"site": ghostify.GhostSpec(dw_size=1)})
    found = sensitivity.channel_metrics(model, plan, [Example.of(images)], torch.Generator().manual_seed(0))
    return found["site"]


def expected(model, curvature):
    """The same by the chain rule, image by image."""
    with torch.no_grad():
        maps = model.site(torch.relu(model.stem(IMAGES)))
        passed = (maps > 0).flatten(2).double()  # what the activation lets through
        both = torch.einsum("bnp,bmp->bnm", passed, passed)
        weight = model.head.weight.double()
        total = (weight.T @ curvature(model(IMAGES)) @ weight * both).sum(0)
        return total / total.diagonal().mean()


def undamped(metric):
    share = 1 - sensitivity._DIAGONAL_SHARE
    diagonal = metric.diagonal() - sensitivity._LEAST_WEIGHT
    return ((metric - torch.diag(metric.diagonal())) / share + torch.diag(diagonal)).double()


def test_of_logits_it_is_the_curvature_of_the_softened_divergence():
    torch.manual_seed(0)
    model = Means(logits=True).eval()
    nn.init.normal_(model.head.weight, std=3)

    def curvature(logits):
        p = (logits.double() / 4).softmax(1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    wanted = expected(model, curvature)
    assert (undamped(metric_of(model)) - wanted).norm() < 0.25 * wanted.norm()


def test_of_other_outputs_it_is_that_of_squared_errors():
    torch.manual_seed(0)
    model = Means(logits=False).eval()

    def curvature(outputs):
        twice = torch.ones(12, dtype=torch.double)
        twice[0] = 2  # both outputs hold it
        return torch.diag(twice)

    wanted = expected(model, curvature)
    assert (undamped(metric_of(model)) - wanted).norm() < 0.25 * wanted.norm()


def test_the_model_is_left_as_it_was_and_may_be_frozen():
    torch.manual_seed(0)
    model = Means(logits=True).train()
    free = metric_of(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.allclose(metric_of(model.requires_grad_(False)), free, atol=1e-6)


def test_the_default_start_uses_it(monkeypatch):
    torch.manual_seed(0)
    model = Means(logits=True).eval()
    model.head.weight.data[:, 4:] *= 0.01

    def missed():
        small = ghostify.convert(model, calibration=IMAGES, overrides={"site": ghostify.GhostSpec(4, dw_size=1)})
        with torch.no_grad():
            return float((small(IMAGES) - model(IMAGES)).square().mean())

    weighed = missed()
    monkeypatch.setattr(initialisers, "channel_metrics", lambda *_: {})
    assert weighed < missed()


def test_what_a_checkpoint_computes_again_counts_once():
    class Checkpointed(Means):
        def forward(self, x):
            maps = checkpoint(lambda x: self.site(torch.relu(x)).relu_(), self.stem(x), use_reentrant=False)
            return self.head(maps.mean((2, 3)))

    torch.manual_seed(0)
    plain, saving = Means(logits=True).eval(), Checkpointed(logits=True).eval()
    saving.load_state_dict(plain.state_dict())
    assert torch.allclose(metric_of(saving), metric_of(plain), atol=1e-6)


def test_a_model_without_a_gradient_is_told_of():
    class Hard(Means):
        def forward(self, x):
            made = torch.sigmoid(self.site(torch.relu(self.stem(x))))
            return self.head(made.mul_(2).mean((2, 3)))  # the sigmoid's gradient needs what is overwritten

    with pytest.warns(UserWarning, match="What errors cost at the output of Hard is not known"):
        ghostify.convert(Hard(True), calibration=IMAGES[:32])
