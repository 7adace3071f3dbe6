"""What is decided, as plain data: the Ghost unit's options, facts of a site, decisions, the plan.

Everything here is frozen, printable, and makes the round trip through JSON; nothing here
touches a model. Shapes leave out the batch dimension: ``(c, h, w)``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import pydantic

from ghostify import plan_text
from ghostify.documents import STRICT, read_document
from ghostify.errors import OptionError, PlanError

Fusion = Literal["concat", "add", "mul"]
Placement = Literal["linear", "paper"]
TraceWay = Literal["fx", "recorded"]
ChannelOrder = Literal["", "folded", "shared", "index"]


@dataclass(frozen=True)
class GhostSpec:
    """The options of one Ghost unit.

    Attributes:
        ratio: Output channels divided by intrinsic channels (``s`` in the paper), any number ≥ 1.
        dw_size: Side of the cheap operation's depthwise kernel (``d`` in the paper), odd.
        fusion: How the branches meet. ``concat`` is the paper's; ``add`` and ``mul`` repeat the ``⌈n/s⌉`` primary maps
            and add or multiply one depthwise map for every output channel.
        placement: ``linear``: the cheap operation reads the raw primary map, and the network's own norm and activation
            stay outside. ``paper``: a norm inside each branch, and the cheap operation reads the activated map.

    Raises:
        OptionError: A value is outside its range.

    Example:
        >>> GhostSpec(ratio=3, dw_size=5).intrinsic_channels(10)
        4
    """

    ratio: float = 2.0
    dw_size: int = 3
    fusion: Fusion = "concat"
    placement: Placement = "linear"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        ratio = self.ratio
        if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 1 <= ratio < math.inf:
            raise OptionError(
                f"ratio={ratio!r} is not a finite number ≥ 1: a Ghost unit computes 1/ratio of its channels by the "
                "primary convolution. Use 2 for half of them, 1.25 for four fifths."
            )
        d = self.dw_size
        if isinstance(d, bool) or not isinstance(d, numbers.Integral) or d < 1 or d % 2 == 0:
            raise OptionError(
                f"dw_size={d!r} is not an odd number ≥ 1: an even depthwise kernel would shift the map. Use 3, 5 or 7."
            )
        for name, allowed in (("fusion", get_args(Fusion)), ("placement", get_args(Placement))):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name}={getattr(self, name)!r} is unknown. Use one of {', '.join(allowed)}.")
        # NumPy's numbers are welcome, and do not stay: JSON does not know them.
        object.__setattr__(self, "ratio", float(ratio))
        object.__setattr__(self, "dw_size", int(d))

    def intrinsic_channels(self, out_channels: int, groups: int = 1) -> int:
        """Channels ``m`` that the primary convolution computes: ``⌈n/s⌉``, the same number in every group.

        Args:
            out_channels: Output channels ``n`` of the whole unit.
            groups: Groups of the primary convolution.
        """
        # Twenty-one channels at ratio 1.4 are fifteen, also where the division rounds to 15.000000000000002.
        return groups * max(1, math.ceil(out_channels / groups / self.ratio - 1e-9))

    def cheap_channels(self, out_channels: int, groups: int = 1) -> int:
        """Channels that the cheap operation computes: ``n - m`` for ``concat``, all ``n`` for ``add`` and ``mul``."""
        if self.fusion == "concat":
            return out_channels - self.intrinsic_channels(out_channels, groups)
        return out_channels

    def __str__(self) -> str:
        extras = [f"d={self.dw_size}"] if self.dw_size != 3 else []
        extras += [value for value in (self.fusion, self.placement) if value not in ("concat", "linear")]
        return ", ".join([f"s={self.ratio:g}", *extras])


@dataclass(frozen=True)
class Call:
    """One call of a site in the example run.

    Attributes:
        input_shape: ``(c, h, w)``, without the batch dimension.
        output_shape: ``(n, h, w)``.
        rows: Maps per example; 1 unless the model folds another dimension into the batch.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    rows: float = 1.0

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Chain:
    """What directly follows a site: conv → norm → activation → (residual addition).

    Attributes:
        norm: Name of the batch norm that alone reads the site's output, if there is one.
        activation: ``module:NAME`` or ``function:NAME`` of the activation that alone reads the norm
            (or the site, where no norm follows).
        paper_obstacle: Why norm and activation cannot move into the branches; empty if they can.
        is_output: No layer with parameters comes after the site: it makes the network's output.
    """

    norm: str | None = None
    activation: str | None = None
    paper_obstacle: str = ""
    is_output: bool = False

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Site:
    """The facts of one convolution *module* with all its calls.

    Attributes:
        name: Qualified name in the model; of several aliases the first.
        kind: Class name of the module.
        in_channels: Input channels ``c``.
        out_channels: Output channels ``n``.
        kernel_size: ``(h, w)``.
        stride: ``(h, w)``.
        groups: Groups of the convolution.
        bias: Whether it has a bias.
        params: Its own parameters (numbers).
        channel_params: Those of them that belong to one output channel.
        calls: Every call in the example run, in order.
        order: Position among all sites in order of first execution; -1 if never called.
        obstacle: Why the module cannot be replaced without changing its meaning; empty if it can.
        chain: What follows; ``None`` where the graph is unknown.
        transposed: Whether it is a transposed convolution.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    bias: bool
    params: int
    channel_params: int
    calls: tuple[Call, ...]
    order: int
    obstacle: str = ""
    chain: Chain | None = None
    transposed: bool = False

    __pydantic_config__ = STRICT

    @property
    def shape(self) -> str:
        """The site in the field's shorthand, as in ``16→32 3×3 /2 @16×16``."""
        text = f"{self.in_channels}→{self.out_channels} {'×'.join(map(str, self.kernel_size))}"
        if any(side != 1 for side in self.stride):
            text += f" /{self.stride[0] if len(set(self.stride)) == 1 else '×'.join(map(str, self.stride))}"
        if self.groups > 1:
            text += f" g{self.groups}"
        if self.calls:
            text += f" @{'×'.join(map(str, self.calls[0].output_shape[1:]))}"
        return text


@dataclass(frozen=True)
class Decision:
    """What happens to one site.

    Attributes:
        site: The facts.
        spec: The Ghost unit that replaces it, or ``None``: it is kept.
        reason: Why it is kept, or a remark on how it is replaced.
        params_before: Parameters of the convolution (numbers).
        params_after: Parameters of what replaces it.
        macs_before: Multiply-accumulates of all its calls, batch 1, no bias.
        macs_after: The same of what replaces it.
        order: Of its channels: ``folded`` into what reads them, ``shared`` by units and folded, or an ``index``.
        explained: Share of the layer's variance behind its norm that chosen channels and cheap kernels can make.
        error: Share of it that the started Ghost unit misses in the converted model, before an activation that may
            hide some of it. At layers that close a residual block both are shares of what the unit should make there,
            which makes up for the shortcut as well.
        damage: How far the network's answers are expected to part from the original's through it, if that was measured.
        saved_ms: Milliseconds that it saves on the backend for which the plan was made, measured alone.
    """

    site: Site
    spec: GhostSpec | None
    reason: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    order: ChannelOrder = ""
    explained: float | None = None
    error: float | None = None
    damage: float | None = None
    saved_ms: float | None = None

    __pydantic_config__ = STRICT

    @property
    def replaced(self) -> bool:
        """Whether a Ghost unit takes the site's place."""
        return self.spec is not None


@dataclass(frozen=True)
class Forecast:
    """How long the converted model will take, from layers that were timed one by one.

    Attributes:
        backend: What it runs on.
        threads: Processor threads.
        device: The processor's name.
        batch: Examples in the batch.
        original_ms: Measured time of the original for the batch, milliseconds.
        converted_ms: Expected time of the converted model.
        noise_ms: Half the width of the 95 % interval of the sum that was measured.
    """

    backend: str
    threads: int
    device: str
    batch: int
    original_ms: float
    converted_ms: float
    noise_ms: float

    __pydantic_config__ = STRICT

    @property
    def left(self) -> float:
        """Expected time as a fraction of the original."""
        return self.converted_ms / self.original_ms


@dataclass(frozen=True)
class Plan:
    """For every convolution of a model: replace it (how) or keep it (why).

    Print it to read it; ``to_json`` and ``from_json`` store it. Made by [ghostify.plan][], used by [ghostify.apply][].

    Attributes:
        model: Class name of the model it was made for.
        fingerprint: Hash of the model's structure (names and shapes of its state).
        trace_way: How the facts were found: ``fx`` (symbolic graph and a recorded run) or ``recorded`` (a recorded
            run alone, where FX cannot trace; nothing is known of what follows a site).
        trace_note: Why FX could not trace; empty if it could.
        input_shapes: Shapes of the example inputs, with the batch dimension.
        params: Parameters of the whole original model.
        macs: Multiply-accumulates of the whole original model, batch 1: convolutions and linear layers.
        uncounted: Operations outside the definition of MACs, with theirs; ``None`` where torch has no formula.
        decisions: One for every convolution, in order of execution.
        lifted: Convolutions that the model calls as functions; modules of a converted ``torch.fx.GraphModule``.
        arguments: Names of the arguments of the model's forward that the example inputs gave.
        budget: What was asked and what is reached, in lines to read; empty without a budget.
        latency: How long the converted model will take, if that was measured.
    """

    model: str
    fingerprint: str
    trace_way: TraceWay
    trace_note: str
    input_shapes: tuple[tuple[int, ...], ...]
    params: int
    macs: int
    uncounted: dict[str, int | None]
    decisions: tuple[Decision, ...]
    lifted: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    budget: tuple[str, ...] = ()
    latency: Forecast | None = None

    __pydantic_config__ = STRICT

    @property
    def replaced(self) -> tuple[Decision, ...]:
        """The decisions that replace their site."""
        return tuple(decision for decision in self.decisions if decision.replaced)

    @property
    def params_after(self) -> int:
        """Parameters of the whole converted model."""
        return self.params - sum(d.params_before - d.params_after for d in self.decisions)

    @property
    def macs_after(self) -> int:
        """Multiply-accumulates of the whole converted model, batch 1."""
        return self.macs - sum(d.macs_before - d.macs_after for d in self.decisions)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def to_json(self) -> str:
        """The plan as JSON text, for [Plan.from_json][ghostify.Plan.from_json]."""
        return _PLAN_ADAPTER.dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read a plan from JSON text; checks every field, runs no code.

        Raises:
            PlanError: The text is not a plan.
        """
        return read_document(_PLAN_ADAPTER, text, kind="plan", verb="plan", error=PlanError)

    def table(self, style: str = "simple") -> str:
        """All sites as a table, in any format that tabulate knows (``simple``, ``github``, ``html``, …)."""
        return plan_text.table(self, style)

    def summary(self) -> str:
        """The totals, and everything a reader must know to trust them."""
        return plan_text.summary(self)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"


_PLAN_ADAPTER = pydantic.TypeAdapter(Plan)
