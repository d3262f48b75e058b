"""megaeva.loop.agent: where the output of ranks goes when they are started again."""

from pathlib import Path

from torch.distributed.elastic.multiprocessing import Std

from megaeva.loop.agent import _logs_of_every_start


def test_a_start_leaves_the_output_of_those_before(tmp_path: Path) -> None:
    """Also one that torchrun counts as no restart, as when a node came back, and one of another agent."""
    first = {0: {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "0"}}
    for agent in (1, 2):
        logs = _logs_of_every_start()(str(tmp_path / "node_1"), Std.ALL, Std.ALL)
        for start in (1, 2):
            output = Path(logs.reify(dict(first)).stdouts[0])
            output.write_text(f"{agent} {start}")
    written = {path.parts[-4]: path.read_text() for path in tmp_path.glob("node_1/start_*/attempt_0/0/stdout.log")}
    assert written == {"start_1": "1 1", "start_2": "1 2", "start_3": "2 1", "start_4": "2 2"}
