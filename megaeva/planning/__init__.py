"""What a run would take, computed from its recipe: no data, no process group, no memory.

`plan` (formulae, no torch) answers for any cluster. `topology` and `rates` draw what a run does, from towers on the
meta device, and are imported by those names.
"""

from megaeva.planning.estimate import plan

__all__ = ["plan"]
