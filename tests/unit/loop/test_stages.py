"""The plan of a loop: who teaches whom, from which weights, with how many samples."""

import pytest

from megaeva.errors import ConfigError
from megaeva.loop.stages import chain_samples, plan_stages


def test_student_of_a_round_teaches_the_next(loop) -> None:
    stages = {s.name: s for s in plan_stages(loop.config(), loop.path)}
    run = str(loop.run_dir)
    assert list(stages) == [
        "teacher", "one/distil", "one/clip", "one/scratch", "one/long_teacher",
        "two/distil", "two/clip", "two/scratch", "two/long_teacher",
    ]  # fmt: skip
    first, second = stages["one/distil"].config.teacher, stages["two/distil"].config.teacher
    assert first is not None
    assert second is not None
    assert (first.checkpoint, second.checkpoint) == (f"{run}/teacher", f"{run}/one/clip")
    start = stages["two/clip"].config.init
    assert (start.vision, start.text) == (f"{run}/two/distil", f"{run}/one/clip")


def test_controls_get_only_what_they_ask_for(loop) -> None:
    stages = {s.name: s for s in plan_stages(loop.config(), loop.path)}
    scratch, longer = stages["one/scratch"].config, stages["one/long_teacher"].config
    assert (scratch.init.vision, scratch.init.text) == (None, f"{loop.run_dir}/teacher")
    assert (longer.init.vision, longer.init.text) == (None, None)
    assert longer.model.vision.hidden_size == 96


def test_seed_and_run_dir_reach_every_stage(loop) -> None:
    for stage in plan_stages(loop.config(), loop.path):
        assert stage.config.seed == 7
        assert stage.run_dir == loop.run_dir / stage.name


def test_chain_counts_each_ancestor_once(loop) -> None:
    stages = plan_stages(loop.config(), loop.path)
    chain = {s.name: chain_samples(s, stages) for s in stages}
    assert chain["teacher"] == 640
    assert chain["one/clip"] == 640 + 320 + 1280  # the teacher gives targets and text: counted once
    assert chain["one/scratch"] == 640 + 1280
    assert chain["one/long_teacher"] == 2240
    assert chain["two/clip"] == chain["one/clip"] + 320 + 1280


def test_given_teacher_is_not_a_stage(loop) -> None:
    loop.recipe["teacher"] = {"checkpoint": "runs/old"}
    stages = plan_stages(loop.config(), loop.path)
    assert stages[0].name == "one/distil"
    assert stages[0].config.teacher is not None
    assert stages[0].config.teacher.checkpoint == "runs/old"


def test_unknown_placeholder_is_named(loop) -> None:
    loop.recipe["rounds"][0]["controls"]["scratch"]["set"]["init.vision"] = "{student}"
    with pytest.raises(ConfigError, match=r"\{student\}.*\n.*\{teacher\}"):
        plan_stages(loop.config(), loop.path)


def test_control_named_like_a_part_is_refused(loop) -> None:
    loop.recipe["rounds"][0]["controls"]["clip"] = {"recipe": "clip.yaml"}
    with pytest.raises(ConfigError, match="one/clip"):
        plan_stages(loop.config(), loop.path)
