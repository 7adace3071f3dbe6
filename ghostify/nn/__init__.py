"""Building blocks: the Ghost unit, and the networks of the published tables."""

from ghostify.nn.ghost import CheapOperation, GhostConv2d

__all__ = ["CheapOperation", "GhostConv2d"]
