"""From a name to a model: ``timm:resnet18``, ``torchvision:mobilenet_v2``, ``package.module:factory``."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from ghostify._torchvision import import_torchvision
from ghostify.deployment.onnx_in import read_model
from ghostify.errors import ArtefactError, ModelNotFoundError, OptionError, first_line
from ghostify.extras import require
from ghostify.states import versioned

_FORMS = (
    "Names look like timm:resnet18, torchvision:mobilenet_v2, package.module:factory, path/to/file.py:factory or "
    "path/to/file.onnx."
)
_IMAGENET = (3, 224, 224)


def load_model(
    name: str, *, pretrained: bool = False, weights: str | os.PathLike[str] | None = None, **factory_kwargs: Any
) -> nn.Module:
    """Make the model that a name stands for.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``package.module:ATTRIBUTE`` or
            ``path/to/file.py:ATTRIBUTE``. The attribute is a function or class that makes a model,
            or a model, which is copied. Modules are also looked for in the current folder. Or
            ``onnx:PATH``, or a path that ends in ``.onnx``: a plain CNN in an ONNX file, weights included.
        pretrained: Take the library's own trained weights, which it downloads; a factory of your
            own is called with ``pretrained=True``.
        weights: A file of trained weights to load instead: ``.safetensors``, or anything that
            ``torch.load`` reads without running code (a state dict, alone or under ``state_dict``
            or ``model``).
        **factory_kwargs: Passed on to the library or factory, as in ``num_classes=10``.

    Returns:
        The model, on the CPU.

    Raises:
        ModelNotFoundError: Nothing has this name, or its trained weights cannot be had.
        ArtefactError: The file of weights is missing, damaged, or belongs to another model; or the ONNX file
            cannot be read.
        OptionError: The model cannot be built with these options.
        MissingExtraError: The library is not installed.

    Example:
        >>> type(load_model("ghostify.nn.cifar:resnet20", num_classes=100)).__name__
        'CifarResNet'
    """
    source, separator, rest = ("onnx", ":", name.removeprefix("onnx:")) if is_onnx(name) else name.rpartition(":")
    if not separator or not source or not rest:
        raise ModelNotFoundError(f"name={name!r} names no model. {_FORMS}")
    if pretrained and weights is not None:
        raise OptionError(
            f"pretrained=True and weights={str(weights)!r} exclude each other: both say where the weights of "
            f"{name!r} come from. Give one of them."
        )
    make = _LIBRARIES.get(source)
    model = make(rest, pretrained, factory_kwargs) if make else _from_python(source, rest, pretrained, factory_kwargs)
    if weights is not None:
        _load_weights(model, Path(weights), name)
    return model


def is_onnx(name: str) -> bool:
    """Whether a name stands for an ONNX file, which holds its weights."""
    return name.startswith("onnx:") or name.lower().endswith(".onnx")


def input_shape(model: nn.Module, name: str = "") -> tuple[int, ...] | None:
    """The shape of one example that the model takes, ``(c, h, w)``, where it is known.

    Args:
        model: The model.
        name: The name that it was loaded by.

    Returns:
        The shape without the batch dimension, or ``None`` where nothing says it.

    Example:
        >>> input_shape(load_model("ghostify.nn.cifar:resnet20"))
        (3, 32, 32)
    """
    if type(model).__module__ == "ghostify.nn.cifar":
        return (3, 32, 32)
    config = getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        channels, *sides = config["input_size"]
        # timm's configuration describes its trained weights: in_chans=1 changes the model, not this entry.
        first = dict(model.named_modules()).get(str(config.get("first_conv")))
        return (getattr(first, "in_channels", channels), *sides)
    if is_onnx(name) and isinstance(model, fx.GraphModule):
        (shape, *others) = model.meta.get("input_shapes") or [None]
        sides = () if shape is None else shape[1:]
        return None if others or not sides or None in sides else sides
    if name.startswith("torchvision:"):
        if any(isinstance(module, nn.Conv3d) for module in model.modules()):
            return None  # a model of videos, whose number of frames is the user's
        return (3, 299, 299) if "inception" in name.lower() else _IMAGENET
    return None


def _from_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import_torchvision()  # timm imports it
    timm = require("timm", extra="models")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return _build(
        f"timm:{name}", timm.create_model, pretrained, {"model_name": name, "pretrained": pretrained, **kwargs}
    )


def _from_torchvision(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    models = import_torchvision().models
    known = models.list_models()
    if name.lower() not in known:
        raise _unknown("torchvision", name, known)
    builder = models.get_model_builder(name)
    options = {"weights": "DEFAULT" if pretrained else None, **kwargs}
    # Without this, a segmentation or detection model without weights would still download its backbone's.
    if "weights_backbone" in inspect.signature(builder).parameters:
        options.setdefault("weights_backbone", None)
    return _build(f"torchvision:{name}", builder, pretrained, options)


def _from_python(source: str, attribute: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    name = f"{source}:{attribute}"
    module = _import(source, name)
    try:
        found = getattr(module, attribute)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _unknown(source, attribute, public) from None
    if isinstance(found, nn.Module):
        if pretrained or kwargs:
            given = ", ".join(["pretrained"] * pretrained + list(kwargs))
            raise OptionError(f"name={name!r} is a model already, so {given} cannot be passed to it. Name a factory.")
        return copy.deepcopy(found)
    if not callable(found):
        raise ModelNotFoundError(
            f"name={name!r} is a {type(found).__name__}. Name a function or class that makes a model, or a model."
        )
    return _build(name, found, pretrained, {**kwargs, "pretrained": True} if pretrained else kwargs)


def _from_onnx(path: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained or kwargs:
        given = ", ".join(["pretrained"] * pretrained + list(kwargs))
        raise OptionError(f"name={path!r} is a model with its weights already, so {given} cannot be passed to it.")
    return read_model(path)


_LIBRARIES: dict[str, Callable[[str, bool, dict[str, Any]], nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "onnx": _from_onnx,
}


def _build(name: str, factory: Callable[..., Any], pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**kwargs)
    except Exception as error:  # a library or the user's code may raise anything
        cause = f"{type(error).__name__}: {error}"
        if pretrained and not isinstance(error, TypeError):
            raise ModelNotFoundError(
                f"The trained weights of name={name!r} cannot be had: {cause}. Without a connection, fetch the file "
                "elsewhere and give it as weights=FILE (on the command line --weights FILE) instead of pretrained."
            ) from error
        options = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no options"
        raise OptionError(
            f"name={name!r} cannot be built with {options}: {cause}. Give the options that its factory takes."
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"name={name!r} made a {type(model).__name__}, which is no torch.nn.Module. Name what makes the model."
        )
    return model


def _unknown(source: str, name: str, known: Iterable[str]) -> ModelNotFoundError:
    near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
    hint = f"Did you mean {', '.join(f'{source}:{match}' for match in near)}?" if near else _FORMS
    return ModelNotFoundError(f"{source} has no model name={name!r}. {hint}")


def _import(source: str, name: str) -> ModuleType:
    """Import a module by its dotted name or from its file; its code is the user's own."""
    file = Path(source)
    try:
        if source.endswith(".py"):
            if not file.is_file():
                raise ModelNotFoundError(f"name={name!r}: there is no file {source!r} here ({os.getcwd()}).")
            with _importable(file.resolve().parent):
                return _run_file(file)
        with _importable(Path.cwd()):
            return importlib.import_module(source)
    except ModelNotFoundError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (source == error.name or source.startswith(f"{error.name}.")):
            raise ModelNotFoundError(f"name={name!r}: importing {source} needs {error.name}: {error}.") from error
        known = [*sys.stdlib_module_names, *sys.modules, *_LIBRARIES]
        near = difflib.get_close_matches(source, known, n=1, cutoff=0.75)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ModelNotFoundError(f"name={name!r}: there is no module {error.name!r}.{hint} {_FORMS}") from error
    except Exception as error:
        raise ModelNotFoundError(
            f"name={name!r}: importing {source} failed: {type(error).__name__}: {error}. Repair it first."
        ) from error


def _run_file(file: Path) -> ModuleType:
    # Not the bare stem: a file named random.py must not take the place of the standard module.
    spec = importlib.util.spec_from_file_location(f"_ghostify_zoo_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ModelNotFoundError(f"{str(file)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up while it runs
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported; what is installed goes before them."""
    entry = str(folder)
    if entry in sys.path:
        yield
        return
    sys.path.append(entry)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have changed the list itself
            sys.path.remove(entry)


def _load_weights(model: nn.Module, file: Path, name: str) -> None:
    state = read_state(file)
    try:
        try:
            model.load_state_dict(state, strict=True)
        except ValueError:  # a module that wants to be told its version; others take old files better without
            model.load_state_dict(versioned(state, model), strict=True)
    except RuntimeError as error:
        own = model.state_dict()
        lines = [
            *(f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
              for key in own if key in state and state[key].shape != own[key].shape),
            *(f"{key} is missing in the file" for key in own if key not in state),
            *(f"{key} is in the file only" for key in state if key not in own),
        ]  # fmt: skip
        shown = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        raise ArtefactError(
            f"weights={str(file)!r} do not fit name={name!r}: {shown or error}. Name the model that they were "
            "trained in, with the same options (num_classes, for instance)."
        ) from error


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file of weights without running any code that it may hold.

    Args:
        path: ``.safetensors``, or a file of ``torch.save``: a state dict, alone or under the key
            ``state_dict`` or ``model``. The prefix ``module.`` of data-parallel training is dropped.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ArtefactError: The file is missing or damaged, or holds anything but tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtefactError(f"weights={str(file)!r} is not a file. Give a .safetensors, .pth or .pt file.")
    loaded: Any
    try:
        if file.suffix == ".safetensors":
            loaded = safetensors.torch.load_file(file, device="cpu")
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtefactError(f"weights={str(file)!r} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # each reader has its own errors for a damaged or foreign file
        unpickled = isinstance(error, pickle.UnpicklingError)  # what torch says of it is a page long
        reason = type(error).__name__ if unpickled else first_line(error)
        raise ArtefactError(
            f"weights={str(file)!r} is damaged, or holds more than tensors, which is not loaded because it could run "
            f"code ({reason}). Write it with torch.save(model.state_dict(), FILE)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ArtefactError(
            f"weights={str(file)!r} holds no state dict, that is names and tensors, alone or under 'state_dict' or "
            "'model'. Write it with torch.save(model.state_dict(), FILE)."
        )
    state = {str(key): value for key, value in loaded.items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state
