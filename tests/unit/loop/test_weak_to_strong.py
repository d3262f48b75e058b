"""The loop's memory: what is done is not done again, what was cut off continues, what changed is refused."""

import json
import shutil

import pytest

from megaeva.errors import ConfigError
from megaeva.loop.ledger import Ledger, LedgerError, changed_keys
from megaeva.loop.weak_to_strong import run_loop


def test_all_stages_run_once_in_order(loop) -> None:
    run_loop(loop.config(), loop.path)
    assert [stage for stage, _ in loop.calls][:3] == ["teacher", "one/distil", "one/clip"]
    assert len(loop.calls) == 9
    run_loop(loop.config(), loop.path)
    assert len(loop.calls) == 9


def test_crash_in_round_two_continues_in_round_two(loop) -> None:
    loop.fail_at = "two/distil"
    with pytest.raises(RuntimeError):
        run_loop(loop.config(), loop.path)
    entry = Ledger(loop.run_dir).entries["two/distil"]
    assert entry.status == "failed"
    loop.calls.clear()
    loop.fail_at = None
    run_loop(loop.config(), loop.path)
    assert loop.calls[0] == ("two/distil", True)
    assert len(loop.calls) == 4


def test_killed_loop_continues_the_running_stage(loop) -> None:
    loop.fail_at = "one/clip"
    with pytest.raises(RuntimeError):
        run_loop(loop.config(), loop.path)
    path = loop.run_dir / "ledger.json"
    path.write_text(path.read_text().replace('"failed"', '"running"'))  # what SIGKILL leaves
    loop.calls.clear()
    loop.fail_at = None
    run_loop(loop.config(), loop.path)
    assert loop.calls[0] == ("one/clip", True)


def test_stage_without_checkpoint_starts_afresh_even_with_a_new_recipe(loop) -> None:
    loop.fail_at, loop.leave_checkpoint = "one/distil", False
    with pytest.raises(RuntimeError):
        run_loop(loop.config(), loop.path)
    loop.calls.clear()
    loop.fail_at = None
    loop.recipe["rounds"][0]["distil"]["set"] = {"optim.vision.lr": 1e-4}
    run_loop(loop.config(), loop.path)
    assert loop.calls[0] == ("one/distil", False)


def test_checkpoint_that_a_kill_left_unfinished_is_not_continued(loop) -> None:
    loop.fail_at, loop.leave_checkpoint = "teacher", False
    with pytest.raises(RuntimeError):
        run_loop(loop.config(), loop.path)
    (loop.run_dir / "teacher" / "checkpoints" / "step_00000010").mkdir(parents=True)
    loop.fail_at = None
    loop.calls.clear()
    run_loop(loop.config(), loop.path)
    assert loop.calls[0] == ("teacher", False)


def test_changed_recipe_of_a_finished_stage_names_its_keys(loop) -> None:
    run_loop(loop.config(), loop.path)
    loop.calls.clear()
    loop.recipe["rounds"][0]["distil"]["set"] = {"optim.vision.lr": 1e-4, "train.total_samples": 640}
    with pytest.raises(LedgerError) as caught:
        run_loop(loop.config(), loop.path)
    text = str(caught.value)
    for part in ("one/distil", "optim.vision.lr: 0.001 -> 0.0001", "train.total_samples: 320 -> 640", "delete"):
        assert part in text
    assert "global_batch_size" not in text
    assert loop.calls == []


def test_deleted_stage_is_made_again_with_all_that_follows(loop) -> None:
    run_loop(loop.config(), loop.path)
    shutil.rmtree(loop.run_dir / "two" / "distil")
    with pytest.raises(LedgerError, match=r"two/clip was made from an earlier two/distil"):
        run_loop(loop.config(), loop.path)
    shutil.rmtree(loop.run_dir / "two" / "clip")
    loop.calls.clear()
    run_loop(loop.config(), loop.path)
    assert loop.calls == [("two/distil", False), ("two/clip", False)]


def test_checkpoints_of_someone_else_are_left_alone(loop) -> None:
    loop.make_checkpoint(loop.run_dir / "teacher")
    with pytest.raises(LedgerError, match="knows no stage teacher"):
        run_loop(loop.config(), loop.path)


def test_a_folder_of_someone_else_is_not_deleted(loop) -> None:
    theirs = loop.run_dir / "teacher" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    with pytest.raises(LedgerError, match="knows no stage teacher"):
        run_loop(loop.config(), loop.path)
    assert theirs.exists()
    assert loop.calls == []


@pytest.mark.parametrize("name", ["..", "../elsewhere", "/tmp", "a/b", ""])
def test_a_name_that_leads_out_of_the_loop_is_refused(loop, name: str) -> None:
    loop.recipe["rounds"][0]["name"] = name
    with pytest.raises(ConfigError, match=r"rounds\.0\.name.*plain folder name"):
        loop.config()


def test_damaged_ledger_is_one_message(loop) -> None:
    loop.run_dir.mkdir()
    (loop.run_dir / "ledger.json").write_text('{"stages": [{"st')
    with pytest.raises(LedgerError, match=r"ledger\.json cannot be read"):
        run_loop(loop.config(), loop.path)


def test_results_have_the_promised_rows_and_keys(loop) -> None:
    run_loop(loop.config(), loop.path)
    rows = json.loads((loop.run_dir / "results.json").read_text())
    assert list(rows) == [
        "teacher", "one/clip", "one/scratch", "one/long_teacher", "student", "scratch", "long_teacher",
    ]  # fmt: skip
    student = rows["student"]
    order = [stage for stage, _ in loop.calls].index("two/clip") + 1
    assert student["mean_recall"] == pytest.approx(0.01 * order)  # of `heldout`, not of the set before it
    assert student["zero_shot_top1"] == pytest.approx(0.0025 * order)
    assert (student["samples_seen"], student["chain_samples"]) == (1280, 640 + 2 * (320 + 1280))
    assert student["num_parameters"] == 100 + len("two/clip")
    assert rows["teacher"]["samples_seen"] == 640


def test_changed_keys_sees_absent_and_nested_leaves() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": None}
    new = {"a": {"b": 1, "c": 3, "e": 4}}
    assert changed_keys(old, new) == ["a.c: 2 -> 3", "a.e: (unset) -> 4", "d: None -> (unset)"]
