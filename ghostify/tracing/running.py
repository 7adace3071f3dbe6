"""Running a model and leaving it, and all that is around it, as it was."""

from __future__ import annotations

import operator
import pickle
import random
import sys
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Whose contents can be looked at and put back, and nothing else happens: another mapping may be a file, say.
_CHANGING: tuple[Any, ...] = (OrderedDict, dict, list, set, deque, array, UserDict, UserList)
_HOLDING = (*_CHANGING, tuple)
# Of runs that are compared: a model that seeds itself would do so with a number that people choose.
COMPARED = 7_340_932_417


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode; the ``training`` flag of every module is restored, also after an error."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # not .eval(): a model may override it, and freeze or print something
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def gpus(*models: nn.Module) -> list[int]:
    """The numbers of the GPUs that models lie on."""
    return sorted({p.device.index or 0 for model in models for p in model.parameters() if p.is_cuda})


def seed_torch(seed: int, *models: nn.Module) -> None:
    """Seed torch's generators of the CPU and of the GPUs that models lie on.

    ``torch.manual_seed`` seeds those of all other GPUs, too, and nobody would give their state back.
    """
    torch.default_generator.manual_seed(seed)
    for index in gpus(*models):
        torch.cuda.default_generators[index].manual_seed(seed)


@contextmanager
def own_random_state(*models: nn.Module) -> Iterator[None]:
    """Give random states back afterwards: torch's of the CPU and of GPUs that models lie on, Python's and NumPy's."""
    numpy = sys.modules.get("numpy")
    pythons, numpys = random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=gpus(*models)):
            yield
    finally:
        random.setstate(pythons)
        if numpy is not None:
            numpy.random.set_state(numpys)


def random_state(*models: nn.Module) -> tuple[object, ...]:
    """Where torch's generators are, of the CPU and of the GPUs that models lie on, and Python's and NumPy's own.

    And those that the models' modules hold.
    """
    generators = [torch.default_generator, *(torch.cuda.default_generators[index] for index in gpus(*models))]
    states = [generator.get_state().numpy().tobytes() for generator in generators]
    numpy = sys.modules.get("numpy")
    kinds = (random.Random, torch.Generator, *(() if numpy is None else _generators_of(numpy)))
    attributes = [value for model in models for module in model.modules() for value in vars(module).values()]
    return (
        *states,
        random.getstate(),
        None if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False)),
        *(_state_of_generator(value) for value in _held(attributes, (*kinds, *_HOLDING)) if isinstance(value, kinds)),
    )


def _generators_of(numpy: Any) -> tuple[type, ...]:
    return numpy.random.Generator, numpy.random.RandomState


def _state_of_generator(generator: Any) -> object:
    """Where a generator of random numbers is."""
    if isinstance(generator, random.SystemRandom):
        return None
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    return pickle.dumps(generator)


@contextmanager
def unmarked(model: nn.Module, *, but: Collection[nn.Module] = ()) -> Iterator[Callable[[], list[str]]]:
    """Put a model into evaluation mode, and undo afterwards whatever its forward left on it.

    A forward may count its calls in a buffer, keep its last input as an attribute, or put what it
    computes into a dictionary. Attributes (the training flags among them), what lists, sets and
    dictionaries in them hold, however deep, and buffers are as found afterwards, also after an error. Not so what
    other objects hold, a tensor that is no buffer, and a weight that the forward itself changes.
    Random numbers that are drawn meanwhile, on the CPU and on the model's GPUs, count for nothing, and such a GPU
    computes in [full precision][ghostify.tracing.running.full_precision].

    Args:
        model: The model.
        but: Modules of it that stay as they become, but for their mode.

    Yields:
        What tells the names of the attributes that are others by now, or hold something else. Changes of a tensor's own
        values are not among them.
    """
    apart = set(but)
    modules = [module for module in model.modules() if module not in apart]
    attributes = [(module, dict(vars(module))) for module in modules]
    contents = [
        (f"{type(module).__name__}.{name}", container, _content(container))
        for module, found in attributes
        for name, value in found.items()
        for container in _held([value], _HOLDING)
        if isinstance(container, _CHANGING)
    ]
    buffers = [buffer for module in modules for buffer in module.buffers(recurse=False) if not buffer.is_meta]
    values = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def left() -> list[str]:
        others = [name for name, container, content in contents if not _same(content, _content(container))]
        for module, found in attributes:
            if isinstance(module, torch.jit.ScriptModule):  # notes its methods there when they are asked for
                continue
            now = {name: value for name, value in vars(module).items() if name != "training"}
            changed = [name for name, value in now.items() if name not in found or found[name] is not value]
            others += [f"{type(module).__name__}.{name}" for name in (*changed, *(found.keys() - vars(module).keys()))]
        return others

    try:
        with evaluating(model), full_precision(model), own_random_state(model):
            yield left
    finally:
        for module, found in attributes:
            for name in vars(module).keys() - found.keys():
                del module.__dict__[name]
            module.__dict__.update(found)
        with torch.no_grad():
            for buffer, value in values:
                put_back(buffer, value)
        for _, container, content in contents:
            if not _same(content, _content(container)):
                _restore(container, content)


@contextmanager
def full_precision(*models: nn.Module) -> Iterator[None]:
    """Let the convolutions of models on a GPU multiply float32 as float32.

    By default they round what they multiply to TF32, ten bits. Then two ways to compute the same would seem to differ,
    and what the old weights are worth to be less than it is.
    """
    if not gpus(*models):
        yield
        return
    home, name, exact = _switch_of_tf32()
    before = getattr(home, name)
    setattr(home, name, exact)
    cudnn: Any = torch.backends.cudnn
    for kind in (cudnn.conv, cudnn.rnn) if home is cudnn else ():
        if kind.fp32_precision == "tf32":  # as a switch for more than this says; what is set back takes it along
            kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        setattr(home, name, before)


def _switch_of_tf32() -> tuple[Any, str, Any]:
    """Torch has two kinds of switches; reading one is an error where the other was set."""
    cudnn: Any = torch.backends.cudnn
    try:
        _ = cudnn.allow_tf32
    except RuntimeError:
        return cudnn.conv, "fp32_precision", "ieee"
    return cudnn, "allow_tf32", False  # a model that reads this one, as in ``cudnn.flags()``, can still do so


def put_back(buffer: Tensor, value: Tensor) -> None:
    """Give a buffer the values that it had; one that has them is not written to, but for sparse ones."""
    if buffer.layout is not torch.strided or not (torch.equal(buffer, value) or _same_bits(buffer, value)):
        buffer.copy_(value)


def _same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether real numbers are the same, NaN among them."""
    if not one.is_floating_point():
        return False
    bits = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, two)]
    return torch.equal(*bits)


def _held(values: list[Any], kinds: tuple[type, ...]) -> Iterator[Any]:
    """These values, and what of such kinds they hold, however deep."""
    seen: set[int] = set()
    left = list(values)
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        parts = _parts(value)
        # By their types, which are few: there may be a million of parts.
        wanted = {kind for kind in set(map(type, parts)) if issubclass(kind, kinds)}
        left += [part for part in parts if type(part) in wanted] if wanted else []


def _parts(value: Any) -> Iterable[Any]:
    """What a container holds, by the ways of Python's own ones, so that no code of a user's class runs."""
    if isinstance(value, dict):
        return dict.values(value)
    if isinstance(value, UserDict | UserList):
        return [value.data]
    if isinstance(value, list | tuple | deque):
        kind: Any = next(kind for kind in (list, tuple, deque) if isinstance(value, kind))
        return list(kind.__iter__(value))
    return []  # of a set or an array: what they hold cannot be changed


def _kind(container: Any) -> Any:
    """Which of Python's own containers it is, whose ways are used, and not those of a user's class."""
    return next(kind for kind in _CHANGING if isinstance(container, kind))


def _content(container: Any) -> list[Any] | frozenset[Any] | bytes:
    """A copy of what a container holds; of a dictionary keys and values in turn."""
    kind = _kind(container)
    if kind is array:
        return array.tobytes(container)
    if kind in (UserDict, UserList):
        return [container.data]
    if kind is set:
        return frozenset(set.__iter__(container))
    if issubclass(kind, dict):  # without a look at any key's hash, which may be another by now
        values = {id(key): value for key, value in dict.items(container)}
        return [part for key in kind.__iter__(container) for part in (key, values[id(key)])]
    return list(kind.__iter__(container))


def _same(content: list[Any] | frozenset[Any] | bytes, now: list[Any] | frozenset[Any] | bytes) -> bool:
    """Whether a container holds the very things that it held, in the same order."""
    if isinstance(content, list):
        return len(content) == len(now) and all(map(operator.is_, content, now))
    return content == now


def _restore(container: Any, content: Any) -> None:
    """Put back what a container held."""
    kind = _kind(container)
    if kind is array:
        before = array(container.typecode)
        before.frombytes(content)
        array.__setitem__(container, slice(None), before)  # in place: somebody may look at its memory
        return
    if kind in (UserDict, UserList):
        (container.data,) = content
        return
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in zip(content[::2], content[1::2], strict=True):
            kind.__setitem__(container, key, value)
    elif kind is set:
        set.update(container, content)
    else:
        kind.extend(container, content)
