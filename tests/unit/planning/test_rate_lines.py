"""The table of learning rates, and that the rules behind it cover every parameter of every model."""

from typing import Any

import pytest

from megaeva.config.schema import Config
from megaeva.config.variants import VARIANTS
from megaeva.optim.param_groups import find_rule, param_groups
from megaeva.planning.rates import rate_lines
from megaeva.planning.topology import spread_towers

RATES = {"vision": {"lr": 4e-4, "layer_decay": 0.9}, "text": {"lr": 4e-5, "layer_decay": 0.75}, "weight_decay": 0.05}


def config(variant: str, **more: Any) -> Config:
    return Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "unused",
            "model": {"variant": variant} | VARIANTS[variant],
            "optim": RATES,
            "train": {"total_samples": 960, "global_batch_size": 96},
        }
        | more
    )


def words(cfg: Config) -> list[str]:
    lines = rate_lines(cfg)
    assert max(map(len, lines)) < 100
    return [" ".join(line.split()) for line in lines]


def test_the_18b_recipe() -> None:
    """Scales of facts.md 4c: 0.9^(49 - i) with i = 0 for the embeddings and 1 to 48 for the blocks."""
    cfg = config("EVA-CLIP-18B", optim=RATES | {"ema_decay": 0.9999})
    assert words(cfg) == [
        "trains weight decay 0.05 none peak learning rate layer decay",
        f"vision embeddings 3,010,560 1,326,080 {4e-4 * 0.9**49:.3g} {0.9**49:.3g}",
        "vision blocks 0-47 17,616,076,800 2,211,840 2.55e-06 .. 0.00036 0.00636 .. 0.9",
        "vision top 7,864,320 5,120 0.0004 1",
        f"text embeddings 63,242,240 98,560 3.01e-09 {0.75**33:.3g}",
        "text blocks 0-31 629,145,600 532,480 4.02e-09 .. 3e-05 0.0001 .. 0.75",
        "text top 1,966,080 2,560 4e-05 1",
        "scale top - 1 0.0005 1",
        "beside them an average of the weights is kept, ema_decay=0.9999",
    ]
    published = 17_630_494_720
    assert published == 3_010_560 + 1_326_080 + 17_616_076_800 + 2_211_840 + 7_864_320 + 5_120
    tower = spread_towers(cfg)[0]["vision"]
    groups = param_groups("vision", tower.module.named_parameters(), cfg.optim, 48)
    (scale,) = {g["lr_mult"] for g in groups for p in g["params"] if p is tower.module.patch_embed.weight}
    assert scale == 0.9**49


def test_what_is_frozen_is_said() -> None:
    model = {**VARIANTS["EVA02-CLIP-B-16"], "logit_scale": {"trainable": False}}
    lines = words(config("EVA02-CLIP-B-16", model=model, optim=RATES | {"frozen": ["vision"]}))
    assert lines[1] == "vision frozen: 86,263,040 - - - -"
    assert [line.split()[0] for line in lines[2:-1]] == ["text"] * 3
    assert lines[-1] == "scale frozen: 1 - - - -"


@pytest.mark.parametrize("task", ["contrastive", "mim"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rule_covers_each_parameter_of_every_model(variant: str, task: str) -> None:
    mim: dict[str, Any] = {
        "task": "mim", "teacher": {"checkpoint": "none"}, "mim": {"mask": {"num_masked": 105, "min_block": 16}},
    }  # fmt: skip
    whole = VARIANTS[variant]
    model = whole | {part: whole[part] | {"num_layers": 2} for part in ("vision", "text")}
    cfg = config(variant, model=model, **(mim if task == "mim" else {}))
    names = {"contrastive": {"vision", "text", "scale"}, "mim": {"student"}}[task]
    spreads, _ = spread_towers(cfg)
    assert spreads.keys() == names
    for tower, spread in spreads.items():
        named = dict(spread.module.named_parameters())
        for name in named:
            find_rule(name)  # raises unless it is exactly one
        groups = param_groups(tower, named.items(), cfg.optim, spread.num_layers)
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, named.values()))
