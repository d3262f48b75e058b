"""The training loop: build, fit, step. It knows no task, no tower and no device."""

import json
import signal
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megaeva.checkpoint.background import Saves
from megaeva.checkpoint.store import CheckpointStore, LoadedState
from megaeva.config import dump
from megaeva.config.fp8 import fp8_line
from megaeva.config.schema import Config, InitSection
from megaeva.config.validate import check_world
from megaeva.data.batch import Batch
from megaeva.data.phases import PhasedLoader
from megaeva.data.preflight import preflight
from megaeva.errors import CheckpointError, FeatureError, UserError
from megaeva.eval.run import format_results
from megaeva.model.fp8 import fp8_figures, fp8_step, require_fp8
from megaeva.observability.profile import StepProfiler
from megaeva.observability.record import RunRecord, manifest
from megaeva.optim.build import build_optimizer, kernels_line
from megaeva.optim.ema import averaged_weights, update_average
from megaeva.optim.guard import StepGuard, Verdict
from megaeva.parallel import watch
from megaeva.parallel.collectives import all_max, all_sum, broadcast_object, gather_objects, raise_together, together
from megaeva.parallel.platform import chip
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.parallel.wrap import count_parameters, finish_parameter_gather
from megaeva.planning.compare import PlanComparison
from megaeva.planning.rates import rate_lines
from megaeva.planning.topology import topology_lines
from megaeva.tasks import build_task

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Trainer:
    """One run of one recipe on the ranks of this job. All ranks construct it and call `fit` together.

    Everything random is a function of (seed, step, microbatch) or of a sample's place in the stream, so a
    checkpoint needs no RNG state: step, weights, optimizer and the loader's position continue a run bit for bit.

    Args:
        cfg: the resolved recipe.
        runtime: this process's place in the job.
        resume: continue from the run folder's newest checkpoint; without it a folder with checkpoints is refused.
        recipe_changes: lines shown at the start: what the recipe sets on top of its base.

    Raises:
        UserError: whatever is wrong with the recipe, data or checkpoint; on every rank.
    """

    def __init__(self, cfg: Config, runtime: Runtime, *, resume: bool, recipe_changes: list[str]) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.plan_comparison = PlanComparison(cfg, runtime)
        check_world(cfg, runtime.world_size)
        require_fp8(cfg.train.fp8_in_use, runtime.layer_spec)
        self.run_dir = Path(cfg.run_dir)
        self.store = CheckpointStore(self.run_dir, cfg.save.keep)
        newest = self._open_run_folder(resume)
        # A checkpoint has every weight: where the run started from is not read again, and may be gone.
        self.task = build_task(cfg.model_copy(update={"init": InitSection()}) if newest else cfg, runtime)
        grid = self.task.grid
        with together("opening the data"):
            data_report = preflight(cfg, None if newest else grid.dp_size) if runtime.is_main else ""
            self.loader = PhasedLoader(
                cfg, data_rank=grid.dp_rank, data_size=grid.dp_size, num_patches=cfg.model.vision.num_patches
            )
        self.optimizer, self.learning_rate = build_optimizer(self.task.towers, cfg)
        self.guard = StepGuard(cfg.train.spike_guard, self.optimizer.scale)
        self.begun_anew: list[str] = []
        self.changed = tuple[str, ...]()
        self.next_step = self._load(newest) if newest else 0
        self.saves = Saves(self.store, step=self.next_step, asynchronous=cfg.save.asynchronous)
        self.last_save_at = time.monotonic()
        self.signal_received = 0
        on_gpu = runtime.device.type == "cuda"
        with together("writing to the run folder"):
            self.record = RunRecord(
                self.run_dir,
                enabled=runtime.is_main,
                stage=self.run_dir.name,
                total_steps=cfg.train.total_steps,
                global_batch_size=cfg.train.global_batch_size,
                first_step=self.next_step,
            )
            if runtime.is_main:
                # Only now that nothing was refused: a mistake must leave a finished run as it was.
                (self.run_dir / "finished.json").unlink(missing_ok=True)
                dump(cfg, self.run_dir / "config.yaml")
                made_with = manifest(
                    world_size=runtime.world_size,
                    gpu=chip() if on_gpu else None,
                    shards=self.loader.shards,
                    phases=self.loader.phases,
                    starts=self._starts(resumed=newest is not None),
                )
                self.record.write_json("manifest.json", made_with)
        self.profiler = StepProfiler(cfg.train.profile, self.run_dir, runtime.rank, on_gpu=on_gpu)
        changed = [f"changed since then: {line}" for line in self.changed]
        resumed = [f"resuming step {self.next_step} from {newest}", *changed, *self.begun_anew] if newest else []
        if self.next_step > cfg.train.total_steps:
            resumed.append(
                f"no step is left: train.total_samples={cfg.train.total_samples} ends at step {cfg.train.total_steps}"
            )
        topology = topology_lines(cfg, runtime.world_size) if runtime.world_size > 1 and runtime.is_main else []
        rates = rate_lines(cfg) if runtime.is_main else []
        from_where = [line for report in self.task.start_reports for line in report.lines()]
        fp8 = fp8_line(cfg, emulated=runtime.layer_spec == "local")
        kernels = [kernels_line(cfg.optim, runtime.device), *([fp8] if fp8 else [])]
        planned = self.plan_comparison.start_line()
        for line in [*recipe_changes, *topology, *rates, planned, *kernels, *from_where, data_report, *resumed]:
            self.record.say(line)

    def fit(self) -> int:
        """Train to the last step, saving on the way. Returns the exit code: 0, or 128 + signal after SIGTERM or Ctrl-C
        and a save."""
        previous_handlers = {number: signal.signal(number, self._note_signal) for number in _SIGNALS}
        try:
            while self.next_step < self.cfg.train.total_steps:
                self.profiler.before_step(self.next_step)
                batch, save, stop = self.next_batch()
                if stop:
                    self.profiler.end()
                if save or stop:
                    self.save()
                if stop:
                    self.saves.finish()
                    self.profiler.write()
                    name = signal.Signals(stop).name
                    goes_on = "; --resume continues" if self.cfg.save.enabled else ""
                    self.record.say(f"{name}: step {self.next_step} {self._kept()}{goes_on}")
                    return 128 + stop
                figures = self.step(batch)
                self.profiler.after_step()
                if not figures:
                    continue
                self.log(figures)
                every_steps = self.cfg.eval.every_steps
                # `finish` measures the last step.
                if every_steps and self.next_step % every_steps == 0 and self.next_step < self.cfg.train.total_steps:
                    self.evaluate()
            self.profiler.write()
            self.finish()
            return 0
        finally:
            self.profiler.abandon()
            self.saves.close()
            self.loader.close()
            self.record.close()
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; returns its figures, or none when it went back to a checkpoint.

        A step that is not finite, or that the guard refuses, changes no weight.
        """
        step = self.next_step
        rates = self.learning_rate.set(step)
        try:
            with fp8_step(self.task.towers, self.cfg.train.fp8_in_use, self.runtime.layer_spec):
                seeds = partial(seed_pass, self.cfg.seed, step)
                loss = self.task.step(batch, seeds, self.optimizer.loss_scale).item()
        except FeatureError as error:  # raised on every rank
            self._stop_on(str(error), batch)
        self.saves.gate()
        watch.at("the optimizer's step")
        # One verdict and one clipping on all ranks: without the distributed optimizer each group sums up a norm of its
        # own, and they may differ in the last bit.
        loss, grad_norm = all_max([loss, self.optimizer.prepare()], self.runtime)
        verdict = self.guard.judge(step, loss, grad_norm, self.loader.phase.key)
        figures = {"loss": loss, "grad_norm": grad_norm} | {f"lr/{tower}": rate for tower, rate in rates.items()}
        if verdict.action == "update":
            figures |= self.optimizer.update(grad_norm, measure=self._is_logged(step + 1))
        else:
            self.optimizer.drop()
            if self._leave_out(verdict, batch):
                return {}
        self.next_step = step + 1
        figures |= self.guard.figures() | self.task.after_step()
        if verdict.action == "update" and self.cfg.optim.ema_decay is not None:
            update_average(self.optimizer, self.cfg.optim.ema_decay)
        return figures

    def next_batch(self) -> tuple[Batch, bool, int]:
        """The next batch, whether all ranks save before it, and the signal that stops them before it or 0.

        A loader's error is raised on every rank, after a save: no finished step is lost to it.
        """
        watch.at("reading data", self.next_step)
        self.position = self.loader.state_dict()
        batch, error = None, None
        try:
            batch = next(self.loader)
        except Exception as caught:
            error = caught
        interrupts = [self.signal_received == number for number in _SIGNALS]
        flags: list[float] = [error is not None, self._save_is_due(), self.saves.is_over, *interrupts]
        failed, save, saves_over, *stops = all_sum(flags, self.runtime)
        if failed:
            self._save_finished_steps()
            raise_together(error, "reading data")
        if saves_over == self.runtime.world_size:
            self.saves.advance()
        assert batch is not None
        return batch, bool(save), next((number for number, stop in zip(_SIGNALS, stops, strict=True) if stop), 0)

    def save(self) -> None:
        """Begin a checkpoint that continues with the batch after the last finished step, unless the recipe wants none.
        All ranks call it.

        One that is in flight is finished first, and this one before the next; without save.asynchronous, at once.
        """
        if self.cfg.save.enabled and self.next_step > self.saves.begun:
            self.saves.finish()
            watch.at("saving")
            finish_parameter_gather(self.task.towers)
            self.record.flush()
            extra = {
                "samples": self.next_step * self.cfg.train.global_batch_size,
                "guard": self.guard.state_dict(),
            }
            save = self.store.begin(
                self.next_step,
                self.task.towers,
                self.optimizer,
                config=self.cfg,
                loader_state=self.position,
                extra=extra,
                data_grid=self.task.grid,
            )
            self.saves.start(save)
            self.last_save_at = time.monotonic()

    def log(self, figures: dict[str, float]) -> None:
        """Record the step's figures when they are due."""
        self.plan_comparison.after_step(self.next_step, self.record)
        if self._is_logged(self.next_step):
            waited, memory = self.loader.wait_seconds, self.runtime.memory_gib()
            figures = figures | self.loader.figures | fp8_figures(self.task.towers)
            self.record.step(self.next_step, figures, waited_seconds=waited, memory_gib=memory)

    def evaluate(self) -> None:
        """Measure the model as it is, after a save in flight is finished: none is lost to a mistake in the evaluation
        sets. All ranks call it. With optim.ema_decay the average of its weights too, as `ema/<set>`."""
        self.saves.finish()
        watch.at("evaluating")
        finish_parameter_gather(self.task.towers)
        averaged = {}
        if self.cfg.optim.ema_decay is not None:
            with averaged_weights(self.optimizer):
                averaged = {f"ema/{name}": values for name, values in self.task.evaluate().items()}
        # Last, so that the examples it leaves in the run folder are of the weights themselves.
        results = self.task.evaluate() | averaged
        if results:
            self.record.results(self.next_step, results)
            self.record.say(format_results(results))

    def finish(self) -> None:
        """Save, evaluate, and mark the run as finished for the loop and the report."""
        self.position = self.loader.state_dict()
        self.save()
        self.evaluate()
        dropped = self.loader.dropped if self.task.grid.tp_rank == 0 else Counter()
        summary = {
            "step": self.next_step,
            "samples": self.next_step * self.cfg.train.global_batch_size,
            "num_parameters": count_parameters(self.task.towers),
            "dropped_samples": dict(sum(gather_objects(dropped), start=Counter[str]())),
        }
        self.record.write_json("finished.json", summary)
        self.record.say(f"finished: step {self.next_step} {self._kept()}")

    def _open_run_folder(self, resume: bool) -> Path | None:
        """Make the folder and write the resolved recipe; returns the checkpoint to continue from, on every rank."""
        with together("opening the run folder"):
            newest = self.store.newest()
            if newest and not resume:
                raise CheckpointError(
                    f"run_dir={self.run_dir} already holds {newest.name}; a new run needs a folder of its own: "
                    f"add --resume to continue that run, or set run_dir=..."
                )
            if self.runtime.is_main:
                self.run_dir.mkdir(parents=True, exist_ok=True)
        # Rank 0's view: a network file system may show another rank an older listing.
        return broadcast_object(newest)

    def _starts(self, *, resumed: bool) -> list[dict[str, Any]]:
        """Where weights came from, for the manifest; of a resumed run as it was written when the run began."""
        if resumed:
            with suppress(OSError, ValueError, LookupError, TypeError):
                starts: list[dict[str, Any]] = json.loads((self.run_dir / "manifest.json").read_bytes())["starts"]
                return starts
        return [report.record() for report in self.task.start_reports]

    def _load(self, checkpoint: Path) -> int:
        """Restore weights, optimizer and data position; returns the next step."""
        state = self._restore(checkpoint)
        self.changed = state.changed
        self.loader.load_state_dicts(state.loader_states)
        self.guard.load_state_dict(state.extra.get("guard"))
        return state.step

    def _restore(self, checkpoint: Path) -> LoadedState:
        """Read weights and optimizer; `begun_anew` then says what it or the run lacks. All ranks call it."""
        state = self.store.load(checkpoint, self.task.towers, self.optimizer, config=self.cfg)
        self.begun_anew = []
        if state.begun_anew:
            self.begun_anew.append(
                f"FP8 scales and histories begin anew: the checkpoint lacks {state.begun_anew} of them"
            )
        if state.average_begins:
            self.begun_anew.append("the average of the weights begins as a copy of them: the checkpoint has none")
        if state.average_ends:
            self.begun_anew.append("the average of the weights is left behind: optim.ema_decay is not set any more")
        return state

    def _kept(self) -> str:
        return f"is saved in {self.run_dir}" if self.cfg.save.enabled else "is not saved (save.enabled=false)"

    def _is_logged(self, step: int) -> bool:
        return step % self.cfg.train.log_every_steps == 0 or step == self.cfg.train.total_steps

    def _save_is_due(self) -> bool:
        """Whether the step count, or rank 0's clock, asks for a checkpoint."""
        every_steps, every_minutes = self.cfg.save.every_steps, self.cfg.save.every_minutes
        if every_steps and self.next_step % every_steps == 0:
            return self.next_step > self.saves.begun
        elapsed = time.monotonic() - self.last_save_at
        return bool(every_minutes and self.runtime.is_main and elapsed >= 60 * every_minutes)

    def _leave_out(self, verdict: Verdict, batch: Batch) -> bool:
        """Do what the guard says instead of an update; returns whether the run went back. All ranks call it."""
        step, fault = self.next_step, verdict.fault
        if verdict.action == "stop":
            self._stop_on(fault, batch)
        if verdict.action == "rescale":
            self.record.say(f"step {step}: {fault}")
            return False
        checkpoint, then = None, "skipped"
        if verdict.action == "roll_back":
            self.saves.finish()
            checkpoint = broadcast_object(self.store.newest())
            then = f"back to {checkpoint}" if checkpoint else "skipped, as there is no checkpoint to go back to"
        keys, name = sorted(self._keys(batch)), f"spike_step_{step}.json"
        self.record.add_json(name, {"step": step, "fault": fault, "then": then, "keys": keys})
        self.record.say(f"step {step}: {fault}; {then}. Its {len(keys)} samples are listed in {self.run_dir / name}")
        if checkpoint:
            self._go_back(checkpoint)
        return checkpoint is not None

    def _go_back(self, checkpoint: Path) -> None:
        """Take weights, optimizer and step of a checkpoint of this run. All ranks call it.

        Data go on after the spike: samples between are not seen again, and phases of the data end so much earlier.
        """
        finish_parameter_gather(self.task.towers)
        state = self._restore(checkpoint)
        for line in self.begun_anew:
            self.record.say(line)
        self.guard.go_back(state.extra.get("guard"))
        self.next_step = state.step
        # With another place in the data it is another state, to be saved again in place of that checkpoint.
        self.saves.begun = state.step - 1
        self.record.go_back(state.step)

    def _keys(self, batch: Batch) -> list[str]:
        """Of the global batch."""
        mine = batch.keys if self.task.grid.tp_rank == 0 else ()  # the other ranks of its data block have the same
        return [key for keys in gather_objects(mine) for key in keys]

    def _stop_on(self, fault: str, batch: Batch) -> NoReturn:
        """Raise on every rank, naming the step, the samples and the last good checkpoint; no save begins, and one in
        flight, of an earlier step, is finished."""
        keys = self._keys(batch)
        name = f"bad_batch_step_{self.next_step}.json"
        self.record.write_json(name, {"step": self.next_step, "fault": fault, "keys": keys})
        self._finish_save()
        newest = self.store.newest()
        goes_on = f"Last good checkpoint: {newest}; --resume continues there" if newest else "No checkpoint was saved"
        raise UserError(
            f"step {self.next_step}: {fault}. Samples: {', '.join(keys[:4])}, ... ({len(keys)} in all, listed in "
            f"{self.run_dir / name}). {goes_on}."
        )

    def _save_finished_steps(self) -> None:
        """Save what is finished before the run stops with an error of some rank, and say so. All ranks call it."""
        self._finish_save()
        try:
            self.save()
        except CheckpointError as second:
            self.record.say(f"error: {second}")
        self._finish_save()
        if self.saves.finished:
            self.record.say(f"step {self.saves.finished} is saved in {self.run_dir}; --resume continues")

    def _finish_save(self) -> None:
        """Wait for a save in flight when another error already ends the run; its own is printed."""
        try:
            self.saves.finish()
        except CheckpointError as second:
            self.record.say(f"error: {second}")

    def _note_signal(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.signal_received:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self.signal_received = number
