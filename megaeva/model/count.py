"""Parameter counts without memory."""

from megaeva.config.schema import ModelSection
from megaeva.model.clip_model import build_clip
from megaeva.parallel.grid import grid_of_one


def count_parameters(cfg: ModelSection) -> dict[str, int]:
    """Returns the exact numbers of parameters: "vision" (with head), "text", "total" (with the logit scale).

    Built on the meta device: no memory, no process group.
    """
    grid = grid_of_one()
    model = build_clip(cfg, vision_grid=grid, text_grid=grid, device="meta")
    counts = {
        name: sum(param.numel() for param in tower.parameters())
        for name, tower in (("vision", model.vision), ("text", model.text), ("scale", model.scale))
    }
    return {"vision": counts["vision"], "text": counts["text"], "total": sum(counts.values())}
