"""Runs a weak-to-strong chain: distil -> clip (and controls) -> evaluate -> promote, restartable at every stage."""

import json
import shutil
import time
from pathlib import Path

from rich.console import Console

from megaeva.checkpoint.layout import FOLDER_NAME, complete_checkpoints
from megaeva.config import dump
from megaeva.config.schema import LoopConfig
from megaeva.loop.launch import launch, run_module
from megaeva.loop.ledger import Ledger, LedgerError, changed_keys, recipe_hash
from megaeva.loop.results import print_results, write_results
from megaeva.loop.stages import Stage, plan_stages
from megaeva.observability.progress import format_duration


def run_loop(cfg: LoopConfig, recipe_path: Path) -> Path:
    """Runs what is left of a loop and returns its run folder, with results.json and, if asked, report.html in it.

    A stage that is finished is skipped; one that was cut off continues from its newest checkpoint. Call it from one
    ordinary process: each stage is a torchrun job of its own.

    Raises:
        ConfigError: a stage's recipe is wrong; found before the first stage starts.
        LedgerError: a finished stage's recipe or inputs have changed since.
        StageFailedError, StageInterruptedError: see `megaeva.loop.launch`.
    """
    console = Console(highlight=False)
    run_dir = Path(cfg.run_dir)
    stages = plan_stages(cfg, recipe_path)
    ledger = Ledger(run_dir)
    check_ledger(ledger, stages)
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if _is_finished(ledger, stage):
            seconds = ledger.entries[stage.name].seconds
            console.print(f"{title}: finished earlier ({format_duration(seconds)})", markup=False)
            continue
        console.rule(f"{title} · {stage.num_samples:,} samples".replace("[", r"\["), align="left")
        run_stage(cfg, ledger, stage)
    if cfg.teacher.checkpoint is not None:
        _evaluate_given_teacher(cfg, stages)
    results = write_results(cfg, stages, ledger)
    print_results(results, console)
    if cfg.report:
        # Imported here: matplotlib takes a second that a failed stage need not wait for.
        from megaeva.observability.report import write_report

        console.print(f"report: {write_report(run_dir)}")
    return run_dir


def run_stage(cfg: LoopConfig, ledger: Ledger, stage: Stage) -> None:
    """Runs one stage to its end and notes it in the ledger."""
    resume = has_checkpoint(stage.run_dir)
    if not resume and stage.run_dir.exists():
        if stage.name not in ledger.entries and any(stage.run_dir.iterdir()):
            raise LedgerError(
                f"{stage.run_dir} is not empty, and {ledger.path} knows no stage {stage.name}.\n"
                f"A stage's folder must be new or the loop's own: move it away, or choose another run_dir for the loop."
            )
        shutil.rmtree(stage.run_dir)  # what a start without a checkpoint left: nothing to continue from
    file_name = stage.name.replace("/", "-")
    recipe = Path(cfg.run_dir) / "recipes" / f"{file_name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    dump(stage.config, recipe)
    log_path = Path(cfg.run_dir) / "logs" / f"{file_name}.log"
    for change in stage.changes:
        print(f"  {change}")
    ledger.start(stage.name, stage.config, _finish_times(ledger, stage), stage.changes)
    started_at = time.monotonic()
    try:
        launch(recipe, (), cfg.launch, log_path, resume, stage=stage.name)
    except BaseException:
        ledger.fail(stage.name, time.monotonic() - started_at)
        raise
    ledger.finish(stage.name, time.monotonic() - started_at, read_eval(stage.run_dir))


def check_ledger(ledger: Ledger, stages: list[Stage]) -> None:
    """Returns when everything on disk belongs to these stages.

    Raises:
        LedgerError: a stage with weights on disk was made from another recipe (the keys are named), from inputs that
            have been made again since, or by something the ledger does not know.
    """
    again: set[str] = set()
    for stage in stages:
        entry = ledger.entries.get(stage.name)
        if not _is_finished(ledger, stage):
            again.add(stage.name)
        if not has_checkpoint(stage.run_dir):
            continue
        way_out = f"delete {stage.run_dir} to run this stage again, or choose another run_dir for the loop."
        if entry is None:
            raise LedgerError(
                f"{stage.run_dir} holds checkpoints, but {ledger.path} knows no stage {stage.name}.\n"
                f"A stage's folder must be new or the loop's own; {way_out}"
            )
        if entry.recipe_hash != recipe_hash(stage.config):
            changes = changed_keys(entry.recipe, json.loads(stage.config.model_dump_json()))
            raise LedgerError(
                f"stage {stage.name} is {entry.status} with a recipe that has changed since:\n"
                + "".join(f"  {change}\n" for change in changes)
                + f"Its recipe must stay as it was: undo the change, {way_out}"
            )
        stale = [name for name in stage.inputs if name in again or entry.inputs.get(name) != _finished_at(ledger, name)]
        if stale:
            raise LedgerError(
                f"stage {stage.name} was made from an earlier {stale[0]}, which is to be made again or was since.\n"
                f"A stage must follow its inputs: {way_out}"
            )


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run folder holds at least one complete checkpoint."""
    return bool(complete_checkpoints(run_dir / FOLDER_NAME))


def read_eval(run_dir: Path) -> dict[str, dict[str, float]]:
    """Set name -> metric -> value, as the run's evaluation wrote it; empty for a run without one."""
    path = run_dir / "eval.json"
    results: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def _is_finished(ledger: Ledger, stage: Stage) -> bool:
    """Deleting a stage's folder is how one asks for it again."""
    entry = ledger.entries.get(stage.name)
    return entry is not None and entry.status == "finished" and has_checkpoint(stage.run_dir)


def _finished_at(ledger: Ledger, name: str) -> float | None:
    entry = ledger.entries.get(name)
    return entry.finished_at if entry else None


def _finish_times(ledger: Ledger, stage: Stage) -> dict[str, float]:
    return {name: at for name in stage.inputs if (at := _finished_at(ledger, name)) is not None}


def _evaluate_given_teacher(cfg: LoopConfig, stages: list[Stage]) -> None:
    """Measures a teacher that the loop did not train on the sets of the last student, once."""
    assert cfg.teacher.checkpoint is not None
    output = Path(cfg.run_dir) / "teacher"
    if (output / "eval.json").exists():
        return
    student = [stage for stage in stages if stage.role == "clip"][-1]
    sets = student.config.eval.model_dump_json()
    arguments = [cfg.teacher.checkpoint, "--output", str(output), f"eval={sets}"]
    run_module("megaeva.eval.run", arguments, cfg.launch, Path(cfg.run_dir) / "logs" / "teacher.log", stage="teacher")
