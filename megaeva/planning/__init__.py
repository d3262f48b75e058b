"""What a run would take, computed from its recipe: no data, no process group, no memory."""

from megaeva.planning.topology import topology_lines

__all__ = ["topology_lines"]
