"""Contrastive training of a CLIP: symmetric InfoNCE over the global batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaeva.checkpoint.layout import read_model_section
from megaeva.checkpoint.weights import load_weights
from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.eval.harness import evaluate
from megaeva.losses.contrastive import clip_loss
from megaeva.model.clip_model import build_clip
from megaeva.model.init import init_weights
from megaeva.model.recompute import set_recompute
from megaeva.parallel.grid import build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.schedule import global_step
from megaeva.parallel.wrap import Tower, wrap


class Contrastive:
    """See `megaeva.tasks.base.Task`."""

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.grid = build_grid(cfg.parallel.vision, runtime)
        self.model = build_clip(
            cfg.model,
            vision_grid=self.grid,
            text_grid=self.grid,
            precision=cfg.train.precision,
            layer_spec=runtime.layer_spec,
            device=runtime.device,
        )
        set_recompute(self.model.vision, cfg.parallel.vision.recompute)
        set_recompute(self.model.text, cfg.parallel.text.recompute)
        init_weights(self.model, seed=cfg.seed, task="contrastive", grid=self.grid)
        self.start_report = self._load_start()
        self.towers: Sequence[Tower] = [
            wrap(name, module, self.grid, cfg.parallel) for name, module in self._modules().items()
        ]
        self.vision, self.text, self.scale = (tower.ddp for tower in self.towers)

    def _modules(self) -> dict[str, nn.Module]:
        return {"vision": self.model.vision, "text": self.model.text, "scale": self.model.scale}

    def _load_start(self) -> list[str]:
        """A whole CLIP keeps everything; towers joined for the first time get a fresh projection, head and scale."""
        start, model = self.cfg.init, self.model
        reports = []
        if start.clip:
            reports.append(load_weights(start.clip, self._modules(), self.grid))
        if start.vision:
            fresh = ["vision.head"]
            if not read_model_section(start.vision).vision.sub_ln_attention:
                # EVA-02 B and L are distilled without this norm; the CLIP starts it at weight 1, bias 0.
                fresh.append("vision.blocks.layers.*.self_attention.inner_norm")
            reports.append(load_weights(start.vision, {"vision": model.vision}, self.grid, skip=fresh))
        if start.text:
            reports.append(load_weights(start.text, {"text": model.text}, self.grid, skip=("text.head",)))
        return [line for report in reports for line in report.lines()]

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unnormalised image and text embeddings, [B, E] each."""
        return self.vision(batch.image_BCHW, batch.keep_BK), self.text(batch.token_BL)

    def loss(self, *features: Tensor) -> Tensor:
        """The mean over the global batch and both directions, of image_BE and text_BE."""
        image_BE, text_BE = features
        return clip_loss(image_BE, text_BE, self.scale(), group=self.grid.groups.dp)

    def step(self, batches: list[Batch], seed_pass: Callable[[int], None]) -> Tensor:
        """See `Task.step`."""
        return global_step(self, self.towers, batches, seed_pass)

    def after_step(self) -> dict[str, float]:
        """Clamp the logit scale to [0, max]; EVA does so after every step."""
        self.model.scale.clamp_()
        return {"logit_scale": self.model.scale.log_scale.exp().item()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Zero-shot and retrieval figures of the sets in `cfg.eval`."""
        predictions = Path(self.cfg.run_dir) / "predictions.json"
        return evaluate(self.model, self.cfg, grid=self.grid, device=self.runtime.device, predictions=predictions)
