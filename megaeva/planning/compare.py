"""What the planner expects of a run, said at its start, and beside the run itself at its tenth step: so that wrong
formulae show."""

import json
import re
import time
from difflib import get_close_matches
from functools import cached_property

import psutil

from megaeva.checkpoint.layout import read_model_section
from megaeva.config.schema import Config
from megaeva.observability.record import RunRecord
from megaeva.parallel.platform import chip
from megaeva.parallel.runtime import Runtime
from megaeva.planning.estimate import Plan, StageBytes, plan
from megaeva.planning.formulae import GIB
from megaeva.planning.gpus import GPUS, Gpu

STEP = 10  # of those that this process makes
_TIMED = 5  # last ones, the first steps allocate
# Tensors are counted, no allocator's blocks. Peaks and bandwidths are no CPU's: of a CPU no seconds are predicted.
CPU = Gpu(
    name="cpu", memory_gib=1, memory_gb_s=1, peak_tflops=dict.fromkeys(("fp32", "fp16", "bf16", "fp8"), 1.0),
    link_gb_s=1, network_gb_s=1, reserved_gib=0, fragmentation=0, transformer_engine=False,
)  # fmt: skip


class PlanComparison:
    """Rank 0's memory and step time as planned and as they are. Other ranks do nothing; no step but one costs anything.

    Make it before the model: of a CPU, memory is by how much the resident memory's peak has risen since then, and so
    contains the loader and the allocator's slack, which no formula counts. Of a GPU it is the allocator's peak, and the
    plan's margin is left out.
    """

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self._before = 0 if runtime.device.type == "cuda" else psutil.Process().memory_info().rss
        self._steps, self._since = 0, 0.0

    def start_line(self) -> str:
        """What is expected, for the log; nothing on other ranks than 0, and no error where no plan can be made."""
        if not self.runtime.is_main:
            return ""
        try:
            planned, doubt = self._plan
            worst, gpu = planned.worst, planned.gpu
            if self.runtime.device.type != "cuda":
                most = tensor_bytes(worst) / GIB
                return f"plan: at most {most:.3g} GiB of tensors on a rank; of a CPU no seconds are predicted"
            room = "" if planned.fits else f", more than the {gpu.memory_gib:g} of it: see megaeva plan"
            return (
                f"plan: at most {worst.total / GIB:.1f} GiB on a rank, margin included{room}; a step takes "
                f"{planned.phases[0].step:.3g} s, the run {planned.days:.3g} days (planned as {gpu.name}{doubt})"
            )
        except Exception as error:
            return f"plan: none ({type(error).__name__}: {error})"

    @cached_property
    def _plan(self) -> tuple[Plan, str]:
        """The plan, and what to say of a GPU that the planner does not know."""
        on_gpu = self.runtime.device.type == "cuda"
        gpu, known = gpu_of_chip(chip()) if on_gpu else (CPU, True)
        teacher = read_model_section(self.cfg.teacher.checkpoint) if self.cfg.teacher else None
        doubt = "" if known else f", the nearest that the planner knows to {chip()}"
        return plan(self.cfg, self.runtime.world_size, gpu, teacher), doubt

    def after_step(self, step: int, record: RunRecord) -> None:
        """Count a step; at the tenth, say both sides, and keep them in manifest.json as `plan`: `memory_gib`,
        `measured_memory_gib`, `step_seconds` (null of a CPU) and `measured_step_seconds`. A plan that cannot be made is
        said, and stops nothing."""
        self._steps += 1
        if not self.runtime.is_main or self._steps > STEP:
            return
        if self._steps == STEP - _TIMED:
            self._since = time.monotonic()
        elif self._steps == STEP:
            seconds = (time.monotonic() - self._since) / _TIMED
            try:
                self._compare(step - 1, seconds, record)
            except Exception as error:
                record.say(f"plan: none, so nothing to compare the run with ({type(error).__name__}: {error})")

    def _compare(self, step: int, seconds: float, record: RunRecord) -> None:
        on_gpu = self.runtime.device.type == "cuda"
        planned, doubt = self._plan
        gpu = planned.gpu
        own = next(one for one in planned.steps if step < one.phase.first_step + one.phase.steps)
        expected = tensor_bytes(own.stage_bytes(0)) / GIB  # rank 0 is on the first stage
        memory = self.runtime.memory_gib() - self._before / GIB
        step_seconds = own.seconds().step if on_gpu else None
        manifest = json.loads((record.run_dir / "manifest.json").read_text(encoding="utf-8"))
        manifest["plan"] = {
            "gpu": gpu.name,
            "memory_gib": expected,
            "measured_memory_gib": memory,
            "step_seconds": step_seconds,
            "measured_step_seconds": seconds,
        }
        record.write_json("manifest.json", manifest)
        kind = "by the allocator" if on_gpu else "resident since before the model, loader and slack included"
        line = f"plan: rank 0 holds {expected:.2f} GiB of tensors, measured {memory:.2f} ({kind}); a step takes "
        if step_seconds is None:
            record.say(f"{line}{seconds:.3g} s, none is predicted of a CPU")
            return
        record.say(f"{line}{step_seconds:.3g} s, measured {seconds:.3g} (planned as {gpu.name}{doubt})")


def tensor_bytes(stage: StageBytes) -> int:
    """Of a rank of the stage, without the margin."""
    return stage.total - stage.parts["margin"]


def gpu_of_chip(name: str) -> tuple[Gpu, bool]:
    """The planner's GPU for a device's name, and whether it is that one; else the nearest by name.

    The planner knows those on SXM boards; others of the same name have lower peaks or no links.
    """
    words = re.findall(r"[a-z]+\d+|\d+", name.lower())
    on_board = not re.search(r"pcie|nvl|hbm2e", name.lower())
    for gpu in GPUS.values():
        if all(word in words for word in gpu.name.split("-")):
            return gpu, on_board
    return GPUS[get_close_matches("-".join(words), GPUS, n=1, cutoff=0.0)[0]], False
