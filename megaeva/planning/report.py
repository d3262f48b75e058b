"""A plan as text, as JSON and as a plot."""

from pathlib import Path
from typing import Any

from megaeva.config.topology import data_ranks, step_axes
from megaeva.errors import UserError
from megaeva.planning.estimate import PARTS, PhaseSeconds, Plan, StageBytes, stage_range
from megaeva.planning.formulae import GIB, warmup_depth
from megaeva.planning.table import columns, in_bytes

_FEW_STAGES = 8


def plan_lines(plan: Plan) -> list[str]:
    """The plan as lines below 100 columns."""
    gpu = plan.gpu
    lines = [f"{plan.num_gpus} x {gpu.name} ({gpu.memory_gib:g} GiB), {plan.cfg.train.precision}", *_layout(plan), ""]
    lines += _memory(plan)
    lines += ["", *_time(plan), ""]
    lines.append(
        f"{plan.days:.1f} days, {plan.gpu_hours:,.0f} GPU-hours, {plan.samples_per_second:,.0f} samples/s "
        f"({plan.samples_per_second / plan.num_gpus:.1f} a GPU), MFU {100 * plan.mfu:.1f} %"
    )
    lines += [f"note: {note}" for note in plan.notes]
    if plan.host_bytes:
        lines.append(f"note: asynchronous saves copy {in_bytes(plan.host_bytes)} a GPU into the host's memory")
    if plan.host_image_bytes:
        lines.append(f"note: images decoded on the CPU take up to {in_bytes(plan.host_image_bytes)} a GPU there")
    lines.append("note: efficiencies are assumed, nothing was measured; see --calibration")
    if gpu.slowdown > 1:
        lines.append(f"note: all is {gpu.slowdown:g} times slower than they say, fitted to a published run")
    return lines


def _layout(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("tower", "tp", "sp", "pp", "vpp", "dp", "recompute", "micro")]
    for name, axes in step_axes(plan.cfg).items():
        rows.append(
            (
                name, str(axes.tp), "yes" if axes.sequence_parallel and axes.tp > 1 else "-", str(axes.pp),
                str(axes.vpp), str(data_ranks(axes, plan.num_gpus)), str(axes.recompute),
                str(plan.cfg.train.micro_batch_size or "all"),
            )
        )  # fmt: skip
    return columns(rows, right=(1, 3, 4, 5, 7))


def _memory(plan: Plan) -> list[str]:
    stages = plan.stages
    if len(stages) > _FEW_STAGES:
        stages = tuple(stages[i] for i in sorted({0, 1, plan.worst.stage, len(stages) - 1}))
    names = [part for part in PARTS if any(stage.parts[part] for stage in stages)]
    rows: list[tuple[str, ...]] = [("GiB on a rank", *(_title(plan, stage) for stage in stages))]
    rows += [(part, *(_gib(stage.parts[part]) for stage in stages)) for part in names]
    rows.append(("together", *(_gib(stage.total) for stage in stages)))
    if len(plan.stages) > 1:
        rows.append(("passes in flight", *(str(_in_flight(plan, stage)) for stage in stages)))
    lines = columns(rows, right=tuple(range(1, len(stages) + 1)))
    worst, over = plan.worst, plan.worst.total - plan.capacity
    verdict = f"does not fit: {in_bytes(over)} too many" if over > 0 else f"fits, {in_bytes(-over)} left"
    most = f"most on stage {worst.stage}, at {worst.moment}: {in_bytes(worst.total)} of {plan.gpu.memory_gib:g} GiB"
    return [*lines, f"{most}; {verdict}"]


def _in_flight(plan: Plan, stage: StageBytes) -> int:
    """Passes through chunks of the first phase whose activations a rank of the stage holds together, at the most."""
    vision = plan.steps[0].vision
    return warmup_depth([1] * vision.axes.vpp, vision.axes.pp, stage.stage, vision.microbatches)


def _title(plan: Plan, stage: StageBytes) -> str:
    if len(plan.stages) == 1:
        return "every rank"
    return f"stage {stage.stage}"


def _time(plan: Plan) -> list[str]:
    names = list(dict.fromkeys(name for one in plan.phases for name in one.parts))
    titles = [one.phase.title.split(" of")[0] or "every step" for one in plan.phases]
    rows: list[tuple[str, ...]] = [("seconds of a step", *titles)]
    rows += [(name, *(_seconds(one.parts.get(name, 0.0)) for one in plan.phases)) for name in names]
    rows += [
        ("together", *(_seconds(one.step) for one in plan.phases)),
        ("steps", *(f"{one.phase.steps:,}" for one in plan.phases)),
        ("days", *(f"{one.phase.steps * one.step / 86400:.1f}" for one in plan.phases)),
        ("samples/s", *(f"{one.samples_per_second:,.0f}" for one in plan.phases)),
        ("FLOPs, executed / the model's", *(f"{one.executed_flops / one.model_flops:.2f}" for one in plan.phases)),
    ]
    return columns(rows, right=tuple(range(1, len(titles) + 1)))


def _gib(number: int) -> str:
    return f"{number / GIB:.2f}" if number else "-"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value else "-"


# ------------------------------------------------------------------------------------------------------ JSON and plot


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: bytes, seconds, FLOPs."""
    return {
        "gpu": plan.gpu.model_dump(),
        "num_gpus": plan.num_gpus,
        "precision": plan.cfg.train.precision,
        "global_batch_size": plan.cfg.train.global_batch_size,
        "micro_batch_size": plan.cfg.train.micro_batch_size,
        "parallel": {name: axes.model_dump() for name, axes in step_axes(plan.cfg).items()},
        "fits": plan.fits,
        "capacity_bytes": plan.capacity,
        "stages": [
            {
                "stage": stage.stage,
                "layers": stage_range(stage.layers),
                "bytes": stage.parts,
                "total_bytes": stage.total,
                "moment": stage.moment,
                "passes_in_flight": _in_flight(plan, stage),
            }
            for stage in plan.stages
        ],
        "phases": [_phase_json(one) for one in plan.phases],
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "samples_per_second": plan.samples_per_second,
        "mfu": plan.mfu,
        "host_bytes_of_a_save": plan.host_bytes,
        "host_bytes_of_images": plan.host_image_bytes,
        "notes": list(plan.notes),
    }


def _phase_json(one: PhaseSeconds) -> dict[str, Any]:
    return {
        "title": one.phase.title,
        "steps": one.phase.steps,
        "samples": one.phase.samples,
        "seconds": one.parts,
        "step_seconds": one.step,
        "samples_per_second": one.samples_per_second,
        "model_flops": one.model_flops,
        "executed_flops": one.executed_flops,
    }


def write_plot(plan: Plan, path: Path) -> None:
    """Nothing; writes a picture of each stage's memory by part, in the format of the file's suffix.

    Raises:
        UserError: matplotlib is not installed, or has no format of this suffix.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            f"--plot {path} needs matplotlib, which is not installed; run pip install matplotlib, or use --json."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(5.0, 1.5 + 0.6 * len(plan.stages)), 4.5), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        pyplot.close(figure)
        raise UserError(
            f"--plot {path} names no format that matplotlib writes; it must end in one of "
            f"{', '.join(f'.{name}' for name in sorted(formats))}; use e.g. .png or .svg."
        )
    bottoms = [0.0] * len(plan.stages)
    for part in PARTS:
        heights = [stage.parts[part] / GIB for stage in plan.stages]
        if any(heights):
            axes.bar([stage.stage for stage in plan.stages], heights, bottom=bottoms, label=part)
            bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axes.axhline(plan.gpu.memory_gib, color="black", linewidth=1, linestyle="--", label=plan.gpu.name)
    axes.set_xlabel("pipeline stage")
    axes.set_xticks([stage.stage for stage in plan.stages])
    axes.set_ylabel("GiB on a rank")
    axes.set_title(f"{Path(plan.cfg.run_dir).name} on {plan.num_gpus} x {plan.gpu.name}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
