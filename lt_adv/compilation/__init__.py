"""Programs compiled for accelerators that need not be there: memory, collectives, and an estimate of their time."""

from lt_adv.compilation.estimate import SOURCES, Estimate, estimate
from lt_adv.compilation.topologies import Accelerator, Topology, get_topology, versions

__all__ = ["SOURCES", "Accelerator", "Estimate", "Topology", "estimate", "get_topology", "versions"]
