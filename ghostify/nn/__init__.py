"""Building blocks: the Ghost unit, and the networks of the published tables."""

from ghostify.nn.cheap import CheapOperation
from ghostify.nn.ghost import GhostConv, GhostConv1d, GhostConv2d, GhostConv3d

__all__ = ["CheapOperation", "GhostConv", "GhostConv1d", "GhostConv2d", "GhostConv3d"]
