"""CUDA graphs: what a GPU does for a network is recorded once and replayed, without Python in between."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.config import DistillConfig
from ghostify.distillation.processes import Processes
from ghostify.errors import OptionError
from ghostify.tracing.running import own_random_state


def check_recording(config: DistillConfig, processes: Processes, device: torch.device) -> None:
    """See that recording, if it is asked for, can be done.

    Raises:
        OptionError: It cannot.
    """
    if not config.cuda_graphs:
        return
    if device.type != "cuda":
        raise OptionError(
            f"cuda_graphs=True: student is on {device}, and only devices of type cuda have such graphs. "
            "Pass cuda_graphs=False."
        )
    if processes.count > 1:
        raise OptionError(
            f"cuda_graphs=True with {processes.count} processes, whose gradients are shared while they are computed. "
            "Pass cuda_graphs=False."
        )


class Recorded:
    """Calls a network in the mode that it is first called in, forward and backward as CUDA graphs.

    The first call records, as does one with a larger batch. Others replay that for inputs of the same shape and type,
    and call the network for smaller ones. The gradients of a replay lie where those of the one before lay.

    Args:
        network: On a GPU. Its parameters and buffers must stay where they are in memory.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.recorded: Tensor | None = None
        self.replay: Callable[[Tensor], Any] = network

    def __call__(self, inputs: Tensor) -> Any:
        """What the network makes of a batch.

        Raises:
            OptionError: What the network does cannot be recorded.
        """
        if self.recorded is None or inputs.numel() > self.recorded.numel():
            self.recorded, self.replay = inputs.clone(), self.network  # the memory of a former recording is free
            self.replay = _recorded(self.network, self.recorded)
        alike = inputs.shape == self.recorded.shape and inputs.dtype == self.recorded.dtype
        return self.replay(inputs) if alike else self.network(inputs)


class _Inside(nn.Module):
    """A home for a network, because torch changes the module that it records."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Any:
        return self.network(inputs)


def _recorded(network: nn.Module, inputs: Tensor) -> Callable[[Tensor], Any]:
    # Recording runs the network several times: neither its norms nor the random numbers are to show it.
    before = {name: (buffer, buffer.clone()) for name, buffer in network.named_buffers()}
    gc.collect()  # what holds on to an earlier backward pass of these weights, in a cycle, would spoil the recording
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a weight in half precision would be one of another step
    stream, handled = torch.cuda.current_stream(), sys.exception()
    try:
        with own_random_state(network):
            replay: Callable[[Tensor], Any] = torch.cuda.make_graphed_callables(
                _Inside(network), (inputs,), allow_unused_input=True
            )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:  # as torch says that it cannot
        torch.cuda.set_stream(stream)  # torch stays on its own where a recording cannot be ended
        first: BaseException = error  # what could not be recorded; that the end of it failed comes after that
        while first.__context__ is not None and first.__context__ is not handled:
            first = first.__context__
        first_line = next(iter(str(first).strip().splitlines()), "")
        raise _unrecordable(network, first_line) from error
    finally:
        torch.set_autocast_cache_enabled(caching)
        with torch.no_grad():
            for buffer, value in before.values():
                buffer.copy_(value)
    for name, buffer in network.named_buffers():
        if name not in before or buffer is not before[name][0]:
            raise _unrecordable(network, f"its forward puts another tensor in the place of the buffer {name!r}")
    return replay


def _unrecordable(network: nn.Module, reason: str) -> OptionError:
    return OptionError(
        f"cuda_graphs=True: what {type(network).__name__} does cannot be recorded ({reason}). Pass cuda_graphs=False, "
        "in a new process: a recording that failed can leave this one unable to use the GPU."
    )
