"""A model as it is deployed: batch norms inside the convolutions, Ghost units in their folded form."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ghostify.errors import ConversionError
from ghostify.nn.folded import PLAIN, affine, can_fold, folded
from ghostify.nn.ghost import GhostConv
from ghostify.spec import Plan, Site
from ghostify.tracing import Example, ExampleInputs, copier_memo, difference, evaluating, tensors_in, trace, unwrapped
from ghostify.tracing.example import require_module
from ghostify.tracing.graph import Follower, follower_of
from ghostify.tracing.sites import has_hooks

# Of the largest output: sums in another order differ by rounding, and a deep network carries that on.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 0.1
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold(model: nn.Module, *, example_inputs: ExampleInputs | Example) -> nn.Module:
    """Copy a model for inference: the same outputs from fewer operations.

    A batch norm that alone reads a convolution goes into its weight. A Ghost unit, with the norm behind it,
    becomes convolutions with one map for each channel and one concatenation, see
    [ghostify.nn.folded][ghostify.nn.folded]. Gates (fusion ``mul``) and units around grouped or transposed
    convolutions stay as they are. The result is in evaluation mode, and cannot be trained or
    stored as an artefact; keep the model that it was made from.

    Args:
        model: Any model, converted or not; left as found.
        example_inputs: A batch ``(n, c, h, w)``, or arguments as a tuple or a dict, to compare outputs on.

    Returns:
        A copy of the caller's own class.

    Raises:
        ConversionError: The outputs differ by more than rounding.
        InputsError: There are no example inputs.
        TraceError: The model does not run on them.

    Example:
        >>> from ghostify import convert
        >>> from ghostify.nn.cifar import resnet20
        >>> x = torch.randn(2, 3, 32, 32)
        >>> small = convert(resnet20(), ratio=2, example_inputs=x)
        >>> deployed = fold(small, example_inputs=x)
        >>> bool(torch.allclose(deployed(x), small.eval()(x), atol=1e-3))
        True
    """
    require_module(model, "model")
    model = unwrapped(model)  # the plan knows the names inside torch's wrappers
    example = Example.of(example_inputs)
    if not any(isinstance(part, _ConvNd) for part in model.modules()):
        return copy.deepcopy(model, copier_memo(model)).eval()  # there is nothing to fold
    facts = trace(model, example, lift=False)
    plan = getattr(model, "ghostify_plan", None)
    sites = tuple(decision.site for decision in plan) if isinstance(plan, Plan) else facts.sites
    before = example.run(model)
    with torch.inference_mode(False), evaluating(model):
        deployed = folded_copy(model, sites, _followers(sites, facts.graph, model))
    after = example.run(deployed)
    largest, dtype = _largest(before)
    parted = difference(after, before)
    if not parted <= _TOLERANCES.get(dtype, _COARSE) * max(largest, 1e-6):
        raise ConversionError(
            f"The folded {type(model).__name__} gives other outputs (largest difference {parted:.3g}, of "
            f"{largest:.3g} at most). Deploy it unfolded (ExportConfig(fold=False)), and please report the model."
        )
    return deployed


def folded_copy(model: nn.Module, sites: Iterable[Site], followers: Mapping[str, Follower]) -> nn.Module:
    """The copy that [fold][ghostify.fold] makes, unchecked.

    Args:
        model: In evaluation mode.
        sites: Its convolutions, or what stands in their places.
        followers: By the name of the site what reads the norm behind it.
    """
    memo = {id(old): new for old, new in _replacements(model, sites, followers)}
    return copy.deepcopy(model, {**copier_memo(model), **memo}).eval()


def _replacements(
    model: nn.Module, sites: Iterable[Site], followers: Mapping[str, Follower]
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """What takes whose place."""
    modules = dict(model.named_modules())
    for site in sites:
        module = modules.get(site.name)
        if module is None or site.obstacle or has_hooks(module):
            continue
        follower = followers.get(site.name, Follower())
        name = site.chain.norm if site.chain is not None and not follower.bare else None
        norm = modules.get(name) if name else None
        rest = None if norm is None else _without_norm(norm, dims=len(site.kernel_size))
        if isinstance(module, GhostConv) and can_fold(module):
            yield from _unit(module, norm, rest, follower, modules)
        elif norm is not None and rest is not None and type(module) in (*PLAIN, *_TRANSPOSED):
            yield module, fuse_conv_bn_eval(module, norm, transpose=module.transposed)
            yield norm, rest


def _unit(
    unit: GhostConv,
    norm: nn.Module | None,
    rest: nn.Module | None,
    follower: Follower,
    modules: dict[str, nn.Module],
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """What takes the place of a unit, of the norm behind it, and of the activation behind that.

    A norm stays where it is if what reads it is better run together with it: an addition, or an
    activation that cannot go before the concatenation, because it is called elsewhere, too.
    """
    stays = follower.adds or (follower.activation and not follower.own)
    if norm is None or rest is None or (stays and isinstance(rest, nn.Identity)):
        yield unit, folded(unit)
        return
    behind = modules[follower.activation.removeprefix("module:")] if follower.own and not follower.adds else None
    after = copy.deepcopy(behind)
    if not isinstance(rest, nn.Identity):  # the norm holds an activation itself
        after, behind = rest, None
    for part in () if after is None else after.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010 - the primary map is read again
    yield unit, folded(unit, norm, after)
    yield norm, nn.Identity()
    if behind is not None:
        yield behind, nn.Identity()


def _followers(sites: Iterable[Site], graph: fx.Graph | None, model: nn.Module) -> dict[str, Follower]:
    known = ((site, site.chain.norm) for site in sites if site.chain is not None and site.chain.norm is not None)
    return {} if graph is None else {site.name: follower_of(norm, graph, model) for site, norm in known}


def _without_norm(norm: nn.Module, *, dims: int) -> nn.Module | None:
    """What a norm does besides (timm's hold an activation, too), or ``None`` if that cannot be told."""
    if has_hooks(norm) or getattr(norm, "running_mean", None) is None:
        return None
    parts = [
        copy.deepcopy(part) for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)
    ]
    rest = nn.Sequential(*parts) if parts else nn.Identity()
    scale, shift = (numbers.view(1, -1, *(1,) * dims) for numbers in affine(norm))
    x = torch.randn(2, scale.numel(), *(2,) * dims, generator=torch.Generator().manual_seed(0)).to(scale)
    whole = copy.deepcopy(norm).cpu().double()(x)
    return rest.eval() if torch.allclose(copy.deepcopy(rest).cpu().double().eval()(scale * x + shift), whole) else None


def _largest(outputs: Any) -> tuple[float, torch.dtype]:
    """The largest finite value of a run's tensors, and the coarsest of their types."""
    made = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    values = [leaf[torch.isfinite(leaf)].abs() for leaf in made]
    largest = max((float(value.max()) for value in values if value.numel()), default=0.0)
    return largest, min((leaf.dtype for leaf in made), key=lambda dtype: dtype.itemsize, default=torch.float32)
