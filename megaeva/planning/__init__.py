"""What a run would take, computed from its recipe: no data, no process group, no memory."""

from megaeva.planning.rates import rate_lines
from megaeva.planning.topology import topology_lines

__all__ = ["rate_lines", "topology_lines"]
