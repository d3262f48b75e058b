"""Contrastive training of a CLIP: symmetric InfoNCE or SigLIP's sigmoid loss over the global batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megaeva.checkpoint.weights import LoadReport, load_weights
from megaeva.config.schema import Config
from megaeva.config.topology import grid_axes
from megaeva.data.batch import Batch
from megaeva.eval.harness import evaluate
from megaeva.losses.contrastive import clip_loss, sigmoid_loss, start_gather
from megaeva.model.clip_model import build_clip
from megaeva.model.init import init_weights
from megaeva.model.recompute import set_recompute
from megaeva.parallel import watch
from megaeva.parallel.collectives import RowsInFlight
from megaeva.parallel.grid import Grid, build_grids
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.schedule import Part, global_step
from megaeva.parallel.wrap import Tower, wrap
from megaeva.tasks.share import own_microbatches
from megaeva.tasks.start import opened_start


class Contrastive:
    """See `megaeva.tasks.base.Task`."""

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.grids = build_grids(grid_axes(cfg), runtime)
        self.grid = self.grids["data"]
        watch.place(watch.place_of("vision", self.grids["vision"], cfg.model.vision.num_layers))
        self.model = build_clip(
            cfg.model,
            vision_grid=self.grids["vision"],
            text_grid=self.grids["text"],
            precision=cfg.train.parameter_precision,
            layer_spec=runtime.layer_spec,
            device=runtime.device,
            fp8=cfg.train.fp8_in_use,
        )
        set_recompute(self.model.vision, cfg.parallel.vision.recompute)
        set_recompute(self.model.text, cfg.parallel.text.recompute)
        for name in ("vision", "text"):
            init_weights(getattr(self.model, name), seed=cfg.seed, task="contrastive", grid=self.grids[name])
        self.start_reports = self._load_start()
        for name in cfg.optim.frozen:
            getattr(self.model, name).requires_grad_(False)
        self.model.train()
        self.towers: Sequence[Tower] = [
            wrap(name, module, grid, cfg.parallel) for name, (module, grid) in self._modules().items()
        ]
        self.vision, self.text, self.scale = self.towers
        self._world: ProcessGroup = self.grids["scale"].groups.dp
        self._text_in_flight: RowsInFlight | None = None

    def _modules(self) -> dict[str, tuple[nn.Module, Grid]]:
        return {name: (getattr(self.model, name), self.grids[name]) for name in ("vision", "text", "scale")}

    def _load_start(self) -> list[LoadReport]:
        """A whole CLIP keeps everything; towers joined for the first time get a fresh projection, head and scale.

        A frozen tower keeps its own: a fresh one would never be trained.
        """
        cfg, start, modules, frozen = self.cfg, self.cfg.init, self._modules(), self.cfg.optim.frozen
        reports = []
        if start.clip:
            with opened_start(start.clip, cfg, ("vision", "text")) as weights:
                # Either loss may go on from the other's CLIP: only the sigmoid loss has a bias.
                both_have_bias = cfg.model.logit_scale.bias is not None and "scale.logit_bias" in weights.infos
                skip = [] if both_have_bias else ["scale.logit_bias"]
                reports.append(load_weights(weights, modules, skip=skip, resize=start.resize))
        if start.vision:
            with opened_start(start.vision, cfg, ("vision",)) as weights:
                skip = [] if "vision" in frozen else ["vision.head"]
                if not any(".self_attention.inner_norm." in name for name in weights.infos):
                    # EVA-02 B and L are distilled without this norm; the CLIP starts it at weight 1, bias 0.
                    skip.append("vision.blocks.layers.*.self_attention.inner_norm")
                vision = {"vision": modules["vision"]}
                reports.append(load_weights(weights, vision, skip=skip, resize=start.resize))
        if start.text:
            with opened_start(start.text, cfg, ("text",)) as weights:
                skip = [] if "text" in frozen else ["text.head"]
                reports.append(load_weights(weights, {"text": modules["text"]}, skip=skip))
        return reports

    def loss(self, *features: Tensor) -> Tensor:
        """The loss that the recipe names, over the global batch, of this rank's rows text_BE and image_BE."""
        text_BE, image_BE = features
        text_in_flight, self._text_in_flight = self._text_in_flight, None
        log_scale, bias, loss = self.scale.ddp(), self.model.scale.logit_bias, self.cfg.loss
        if loss.name == "sigmoid":
            assert bias is not None, "config.validate requires it for this loss"
            return sigmoid_loss(image_BE, text_BE, log_scale, bias, group=self._world, text_in_flight=text_in_flight)
        return clip_loss(
            image_BE,
            text_BE,
            log_scale,
            group=self._world,
            text_in_flight=text_in_flight,
            label_smoothing=loss.label_smoothing,
        )

    def _send_text(self, text_BE: Tensor) -> None:
        """Gather the text features while the vision tower runs."""
        self._text_in_flight = start_gather(text_BE, self._world)

    def step(self, batch: Batch, seed_pass: Callable[[int], None], loss_scale: float = 1.0) -> Tensor:
        """See `Task.step`."""
        return global_step(self, (self._text_part(batch), self._vision_part(batch)), self.towers, seed_pass, loss_scale)

    def _text_part(self, batch: Batch) -> Part[Batch]:
        return Part(
            self.text,
            own_microbatches(batch, self.text.grid, self.grid, self.cfg),
            lambda part, hidden, chunk: self.text.ddp(part.token_BL),
            num_stage_tokens=1,  # unused without a pipeline
            embed_dim=self.cfg.model.embed_dim,
            send=self._send_text,
        )

    def _vision_part(self, batch: Batch) -> Part[Batch]:
        grid = self.vision.grid
        batches = own_microbatches(batch, grid, self.grid, self.cfg, batch.frames)
        return Part(
            self.vision,
            batches,
            self._vision_forward,
            num_stage_tokens=self.model.vision.num_stage_tokens(batch.keep_BK),
            embed_dim=self.cfg.model.embed_dim,
            first_index=len(batches) * grid.dp_rank,
            rows_per_sample=batch.frames,
        )

    def _vision_forward(self, part: Batch, hidden: Tensor | None, chunk: int) -> Tensor:
        # Only the first stage looks at images. Of those decoded on the CPU one microbatch at a time is on the device.
        image_BCHW = part.image_BCHW.to(self.runtime.device, non_blocking=True) if hidden is None else None
        keep_BK = None if part.keep_BK is None else part.keep_BK.to(self.runtime.device, non_blocking=True)
        out: Tensor = self.vision.ddp(image_BCHW, keep_BK, hidden=hidden, chunk=chunk)
        if part.frames == 1 or not self.model.vision.blocks.is_last(chunk):
            return out
        # EVA-CLIP-18B: a clip is the mean of its frames' embeddings. Before they are normalised: upstream unconfirmed.
        return out.unflatten(0, (len(part), part.frames)).mean(1)

    def after_step(self) -> dict[str, float]:
        """Clamp the logit scale to [0, max]; EVA does so after every step."""
        scale = self.model.scale
        scale.clamp_()
        figures = {"logit_scale": scale.log_scale.exp().item()}
        return figures if scale.logit_bias is None else figures | {"logit_bias": scale.logit_bias.item()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Zero-shot and retrieval figures of the sets in `cfg.eval`."""
        predictions = Path(self.cfg.run_dir) / "predictions.json"
        return evaluate(self.model, self.cfg, grid=self.grid, device=self.runtime.device, predictions=predictions)
