"""Parameters, bytes and multiply-accumulates of a model; the last are measured while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ghostify.errors import InputsError
from ghostify.tracing.example import Example, ExampleInputs

# What convolutions and linear layers come down to; anything else that torch's counter knows is outside the definition.
_COUNTED = {
    "aten.convolution",
    "aten._convolution",
    "aten.cudnn_convolution",
    "aten._slow_conv2d_forward",
    "aten.convolution_overrideable",
    "aten.mm",
    "aten.addmm",
    "aten.linear",
}
# Operations that multiply matrices or transform maps, and that torch's counter passes over without a word.
_UNKNOWN = {
    "aten.mv",
    "aten.addmv",
    "aten.dot",
    "aten.addbmm",
    "aten._trilinear",
    "aten._int_mm",
    "aten.mkldnn_rnn_layer",
    "aten._cudnn_rnn",
    "aten._thnn_fused_lstm_cell",
    "aten._thnn_fused_gru_cell",
    "aten._native_multi_head_attention",
    "aten._transformer_encoder_layer_fwd",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten._fft_r2c",
    "aten._fft_c2r",
    "aten._fft_c2c",
}


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    """Floating-point operations of fused attention, from the shapes of its inputs."""
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


# torch's counter knows the fused attention of other devices, and leaves out the CPU's.
_ALSO = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass
class MacCount:
    """Multiply-accumulates of one example.

    Attributes:
        macs: Those of convolutions and linear layers, without bias.
        outside: Operations outside this definition by name (attention products, say), with their
            multiply-accumulates; ``None`` where torch has no formula for them.
    """

    macs: int = 0
    outside: dict[str, int | None] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-accumulate."""
        return 2 * self.macs


def count_macs(model: nn.Module, example_inputs: ExampleInputs | Example) -> MacCount:
    """Count the multiply-accumulates that a model really does, divided by the batch.

    The numbers are those of ``torch.utils.flop_counter.FlopCounterMode``, halved. The model runs
    once, in evaluation mode; nothing is left behind on it.

    Args:
        model: Any module.
        example_inputs: A batch ``(n, c, h, w)``, or arguments as a tuple or a dict.

    Raises:
        InputsError: There are no example inputs, or they have no batch dimension.
        TraceError: The model does not run on them.

    Example:
        >>> count_macs(nn.Conv2d(3, 2, 3), torch.zeros(4, 3, 224, 224)).macs
        2661336
    """
    example = Example.of(example_inputs)
    with counting(model, example) as count:
        example.run(model)
    return count


@contextmanager
def counting(model: nn.Module, example: Example) -> Iterator[MacCount]:
    """Count what runs inside the block; the result is filled in when the block ends.

    Args:
        model: What is to be run.
        example: What it is run on; the counts are told for one example of its batch.

    Raises:
        InputsError: The example has no batch dimension: torch's convolutions take a map without one, too.
    """
    batch = example.batch
    single = []

    def look(conv: nn.Module, args: tuple[Any, ...]) -> None:
        dims = len(conv.kernel_size)  # type: ignore[arg-type]
        if args and isinstance(args[0], Tensor) and args[0].dim() == dims + 1 and example.is_single(dims):
            single.append(conv)

    handles = [conv.register_forward_pre_hook(look) for conv in model.modules() if isinstance(conv, _ConvNd)]
    count = MacCount()
    unknown = _UnknownOperations()
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO)
    counter.mod_tracker = _OneScope()  # type: ignore[assignment]
    try:
        with _plain_attention(), unknown, counter:
            yield count
    finally:
        for handle in handles:
            handle.remove()
    if single:
        raise InputsError(
            f"example_inputs of shape {example.shapes[0]} has no batch dimension, so that costs cannot be told for one "
            "example. Pass x[None], a batch of one."
        )
    flops_of = {str(name): flops for name, flops in counter.get_flop_counts().get("Global", {}).items()}
    count.macs = round(sum(flops for name, flops in flops_of.items() if name in _COUNTED) / 2 / batch)
    count.outside.update(dict.fromkeys(sorted(unknown.names)))
    count.outside.update({name: round(flops / 2 / batch) for name, flops in flops_of.items() if name not in _COUNTED})


def count_params(model: nn.Module) -> int:
    """Numbers in the model's parameters; one shared by several layers counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def state_bytes(model: nn.Module) -> int:
    """Bytes of all tensors in the model's state (parameters and persistent buffers), shared ones once.

    Example:
        >>> state_bytes(nn.Linear(3, 2))
        32
    """
    tensors = {id(value): value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class _OneScope:
    """In place of the counter's tracker of modules: only the total is asked for.

    The tracker's hooks cost as much as a small model's run, and fail without gradients where a
    parameter is passed to a module.
    """

    parents: ClassVar = {"Global"}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _UnknownOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of operations that do arithmetic and that torch's counter does not know."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(getattr(func, "overloadpacket", func))
        if name in _UNKNOWN:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep torch's transformer layers off their fused path, which no counter sees into."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
