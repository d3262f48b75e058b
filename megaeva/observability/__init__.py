"""What a run shows: metrics on disk, the status line, the report. Nothing here needs a process group."""

from megaeva.observability.metrics import MetricLog, read_metrics
from megaeva.observability.progress import StatusLine

__all__ = ["MetricLog", "StatusLine", "read_metrics"]
