"""Storing a converted model as JSON and safetensors, and reading it without running code."""

from __future__ import annotations

import math
import os
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ghostify.conversion import as_planned, rebuild
from ghostify.deployment.manifest import (
    PLAN_FILE,
    WEIGHTS_FILE,
    Content,
    TensorEntry,
    dtype_of,
    ghostify_version,
    read_bytes,
    read_manifest,
    sha256,
    write_manifest,
)
from ghostify.errors import ArtefactError, GhostifyError, OutputError
from ghostify.files import atomic_folder
from ghostify.nn.folded import FoldedGhost
from ghostify.nn.ghost import ORDERS, GhostConv
from ghostify.spec import Plan
from ghostify.states import versioned
from ghostify.tracing import count_params, fingerprint, is_site, unwrapped

# The safetensors header: 8 bytes of length, then about this much JSON for every tensor beside its name.
_HEADER_BYTES_PER_TENSOR = 512


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Store a converted model as a folder of two files: its plan as JSON, its weights as safetensors.

    The folder appears complete or not at all; an artefact that is there already is replaced.
    Weights are stored in their own types, contiguous, tensors with several names once.

    Args:
        model: What ``ghostify.convert`` or ``ghostify.apply`` returned, trained or not.
        path: The folder.

    Returns:
        The folder.

    Raises:
        ArtefactError: The model carries no plan or is not what its plan says any more, or holds state that is no
            plain tensor.
        OutputError: The folder cannot be written, or holds other files.
    """
    model = unwrapped(model)
    plan = model_plan(model)
    _check_unchanged(model, plan)
    folder = Path(path)
    check_replaceable(folder)
    entries, tensors = _collect(model)
    try:
        data = safetensors.torch.save(tensors)
    except Exception as error:  # a type that the format does not know
        raise ArtefactError(f"{type(model).__name__} cannot be stored as safetensors: {error}") from error
    content = Content(
        ghostify=ghostify_version(),
        base=_class(model),
        plan=plan,
        tensors=entries,
        weights_bytes=len(data),
        weights_sha256=sha256(data),
    )
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS_FILE).write_bytes(data)
        write_manifest(temporary / PLAN_FILE, content)
    return folder


def load(path: str | os.PathLike[str], *, base: nn.Module) -> nn.Module:
    """Read a stored model; nothing that is read can run code.

    Args:
        path: The folder that ``ghostify.save`` wrote.
        base: A model of the class that was converted, with the same options; its weights do not
            matter, and it is left untouched.

    Returns:
        The converted model in evaluation mode on the CPU, of ``base``'s class.

    Raises:
        ArtefactError: The artefact is missing, damaged, foreign, of a newer version, or belongs to
            another base model.
    """
    folder = Path(path)
    if not isinstance(base, nn.Module):
        raise ArtefactError(
            f"base={base!r} is no model. Pass an instance of the class that was converted, as in base=resnet18()."
        )
    content = read_manifest(folder)
    try:
        base = as_planned(content.plan, base)
    except GhostifyError as error:
        raise ArtefactError(f"path={str(folder)!r}: its plan does not fit base={_class(base)}: {error}") from error
    _check_base(folder, content, base)
    _check_announced_size(folder, content)
    try:
        model = rebuild(content.plan, base)
    except Exception as error:  # beside PlanMismatchError, whatever a plan that was not made by ghostify breaks
        raise ArtefactError(f"path={str(folder)!r}: its plan does not fit base={_class(base)}: {error}") from error
    _check_state(folder, content, model)
    state = _read_weights(folder, content)
    _check_orders(folder, state, model)
    try:
        # In place, not load_state_dict(assign=True): assignment would part tensors that the model ties.
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in state:
                tensor.data = tensor.data.to("cpu", state[name].dtype)
        model.cpu()  # buffers outside the state
        model.load_state_dict(versioned(state, model), strict=True)
    except RuntimeError as error:
        raise ArtefactError(f"path={str(folder)!r}: its tensors do not fit base={_class(base)}: {error}") from error
    return model.eval()


def model_plan(model: nn.Module) -> Plan:
    """The plan that a converted model carries.

    Raises:
        ArtefactError: It carries none.
    """
    plan = getattr(model, "ghostify_plan", None)
    if not isinstance(plan, Plan):
        raise ArtefactError(
            f"{_class(model)} carries no plan, so it was not made by ghostify. Convert it first: "
            "small = ghostify.convert(model, ...); ghostify.save(small, path)."
        )
    return plan


def _check_unchanged(model: nn.Module, plan: Plan) -> None:
    """What `load` makes of a base model and the plan must be this model, or it could never be read again."""
    if any(isinstance(module, FoldedGhost) for module in model.modules()):
        raise ArtefactError(f"{_class(model)} is folded for inference: save the model that fold(…) was given.")
    units = {name: module.spec for name, module in model.named_modules() if isinstance(module, GhostConv)}
    planned = {decision.site.name: decision.spec for decision in plan.replaced}
    wrong = [name for name in {**planned, **units} if planned.get(name) != units.get(name)]
    if wrong:
        name = wrong[0]
        changed = f"{name!r} is a Ghost unit of {units.get(name, 'no kind')}, planned was {planned.get(name, 'none')}"
    elif (params := count_params(model)) != plan.params_after:
        changed = f"it has {params:,} parameters, planned were {plan.params_after:,}"
    else:
        return
    raise ArtefactError(
        f"{_class(model)} was changed after its conversion: {changed}, so it could not be loaded again. Change the "
        "original and convert that, or store this model's state_dict yourself."
    )


def _collect(model: nn.Module) -> tuple[dict[str, TensorEntry], dict[str, Tensor]]:
    """Describe every tensor of the state, and copy each once."""
    entries: dict[str, TensorEntry] = {}
    tensors: dict[str, Tensor] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ArtefactError(
                f"{_class(model)}: {name!r} is no plain tensor with values, which alone can be stored without pickle. "
                "Remove it from the model's state."
            )
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        shared = first_name.setdefault(key, name) if value.numel() else name
        entries[name] = TensorEntry.of(value, None if shared == name else shared)
        if shared == name:
            # A clone, since two tensors may be overlapping views of one storage, which the format refuses.
            tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return entries, tensors


def check_replaceable(folder: Path) -> None:
    """Saving replaces a folder, so it must hold nothing but an artefact.

    Raises:
        OutputError: It holds other files, or is a file.
    """
    if folder.is_file():
        raise OutputError(f"path={str(folder)!r} is a file, and a model is stored as a folder. Name a new folder.")
    if folder.is_dir():
        others = sorted(file.name for file in folder.iterdir() if file.name not in (PLAN_FILE, WEIGHTS_FILE))
        if others:
            raise OutputError(
                f"path={str(folder)!r} holds other files ({', '.join(others[:3])}), which saving would remove. "
                "Name a new folder."
            )


def _check_base(folder: Path, content: Content, base: nn.Module) -> None:
    plan, found = content.plan, fingerprint(base)
    if any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers())):
        raise ArtefactError(f"base={_class(base)} is on the meta device and holds no memory. Make it on the CPU.")
    if found != plan.fingerprint:
        raise ArtefactError(
            f"path={str(folder)!r} was made from another model than base={_class(base)}: {content.base} with "
            f"fingerprint {plan.fingerprint[:12]}, not {_class(base)} with {found[:12]}. {_differences(content, base)} "
            "Pass the unconverted model, made with the same options."
        )


def _differences(content: Content, base: nn.Module) -> str:
    """The first layers in which a base model parts from the one that was converted."""
    modules, state = dict(base.named_modules()), base.state_dict()
    lines = []
    for decision in content.plan.replaced:
        site, conv = decision.site, modules.get(decision.site.name)
        if not is_site(conv, site):
            lines.append(f"{site.name} is {conv or 'missing'}, stored a {site.kind} {site.shape}")
    # What lies in a replaced site, or in its norm, has other names and shapes in the base.
    moved = {decision.site.name for decision in content.plan.replaced}
    moved |= {d.site.chain.norm for d in content.plan.replaced if d.site.chain and d.site.chain.norm}
    units = {id(modules[name]) for name in moved if name in modules}
    moved |= {name for name, module in base.named_modules(remove_duplicate=False) if id(module) in units}
    for name in [*content.tensors, *(name for name in state if name not in content.tensors)]:
        if any(name.startswith(f"{part}.") for part in moved):
            continue
        stored = content.tensors[name].shape if name in content.tensors else "missing"
        own = tuple(state[name].shape) if name in state else "missing"
        if stored != own:
            lines.append(f"{name} is {own}, stored {stored}")
    if not lines:
        return "They differ in options of a convolution, such as its padding."
    return f"First differences: {'; '.join(lines[:3])}{f'; and {len(lines) - 3} more' if len(lines) > 3 else ''}."


def _check_announced_size(folder: Path, content: Content) -> None:
    """Before anything is allocated: what is announced must fit the bytes that are there."""
    file = folder / WEIGHTS_FILE
    where = f"path={str(folder)!r}"
    if not file.is_file():
        raise ArtefactError(f"{where} holds no {WEIGHTS_FILE}: it is incomplete. Copy the whole folder again.")
    size = file.stat().st_size
    if size != content.weights_bytes:
        raise ArtefactError(
            f"{where}: {WEIGHTS_FILE} has {size:,} bytes, {content.weights_bytes:,} were written: it is truncated or "
            "was changed. Copy it again from where it was saved."
        )
    stored = content.stored()
    payload = 0
    for name, entry in content.tensors.items():
        dtype = dtype_of(entry.dtype)
        if dtype is None:
            raise ArtefactError(f"{where}: tensor {name!r} has the unknown dtype={entry.dtype!r}. Upgrade torch.")
        twin = stored.get(entry.same_as) if entry.same_as is not None else None
        if entry.same_as is None:
            payload += math.prod(entry.shape) * dtype.itemsize
        elif twin is None or (twin.shape, twin.dtype) != (entry.shape, entry.dtype):
            raise ArtefactError(f"{where}: tensor {name!r} is to share {entry.same_as!r}, which is not stored alike.")
    header = 8 + sum(_HEADER_BYTES_PER_TENSOR + 6 * len(name) for name in stored)
    if not payload <= size <= payload + header:
        raise ArtefactError(f"{where}: {PLAN_FILE} announces other tensors than {size:,} bytes of weights can hold.")


def _check_state(folder: Path, content: Content, model: nn.Module) -> None:
    """The tensors announced must be those that the plan gives this base model."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    announced = {name: entry.shape for name, entry in content.tensors.items()}
    for order, channels in _orders(model).items():
        # The index is there only where channels were reordered.
        own.pop(order, None)
        if announced.get(order) == (channels,):
            del announced[order]
    wrong = [name for name in {**own, **announced} if own.get(name) != announced.get(name)]
    if wrong:
        name = wrong[0]
        raise ArtefactError(
            f"path={str(folder)!r}: {len(wrong)} tensors are not those of its plan on base={_class(model)}; first "
            f"{name!r}: stored {announced.get(name, 'nothing')}, expected {own.get(name, 'nothing')}."
        )


def _read_weights(folder: Path, content: Content) -> dict[str, Tensor]:
    """Every tensor of the state by name; those that share memory are one object."""
    data = read_bytes(folder / WEIGHTS_FILE)
    where = f"path={str(folder)!r}: {WEIGHTS_FILE}"
    if sha256(data) != content.weights_sha256:
        raise ArtefactError(
            f"{where} was changed after it was written: its checksum differs. Copy it again from where it was saved."
        )
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the reader has its own errors, and the bytes may be anybody's
        raise ArtefactError(f"{where} cannot be read as safetensors: {error}") from error
    announced = content.stored()
    found = {name: TensorEntry.of(tensor) for name, tensor in tensors.items()}
    wrong = [name for name in {**announced, **found} if announced.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise ArtefactError(
            f"{where} holds other tensors than {PLAN_FILE} announces; first {name!r}: "
            f"{found.get(name, 'nothing')}, announced {announced.get(name, 'nothing')}."
        )
    return {name: tensors[entry.same_as or name] for name, entry in content.tensors.items()}


def _check_orders(folder: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """A channel order must be a permutation: it indexes memory each time the model runs."""
    for name, channels in _orders(model).items():
        order = state.get(name)
        if order is not None and (
            order.dtype != torch.int64 or not torch.equal(order.sort()[0], torch.arange(channels))
        ):
            raise ArtefactError(f"path={str(folder)!r}: {name!r} is no permutation of {channels} channels.")


def _orders(model: nn.Module) -> dict[str, int]:
    """Name and length of the channel orders that every Ghost unit may have."""
    named = model.named_modules(remove_duplicate=False)  # the state names a tensor under every alias of its module
    units = ((name, module) for name, module in named if isinstance(module, GhostConv))
    return {f"{name}.{order}" if name else order: unit.out_channels for name, unit in units for order in ORDERS}


def _class(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
