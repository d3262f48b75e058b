"""A recipe small enough to be trained by the real Trainer in a test."""

from pathlib import Path
from typing import Any

from megaeva.config.schema import Config


def model(vision_layers: int, text_layers: int) -> dict[str, Any]:
    """Towers of width 32 with patch dropout and drop path."""
    return {
        "embed_dim": 16,
        "vision": {
            "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": vision_layers, "num_heads": 2,
            "ffn_hidden_size": 40, "activation": "gelu", "qkv_bias": "qkv", "patch_dropout": 0.25, "drop_path": 0.2,
        },
        "text": {
            "context_length": 16, "hidden_size": 32, "num_layers": text_layers, "num_heads": 2, "ffn_hidden_size": 64,
        },
    }  # fmt: skip


def trainer_recipe(folder: Path, name: str, num_steps: int, **sections: Any) -> Config:
    """Batches of 8 in passes of 2, fp32, on the shards in `folder/shards`; every step is logged.

    Args:
        sections: the rest of the recipe, `model` and `optim` among it; they replace what is here.
    """
    return Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": str(folder / name),
            "platform": "cpu",
            "data": {"train": [str(folder / "shards" / "*.tar")], "shuffle_buffer": 8},
            "train": {
                "total_samples": 8 * num_steps, "global_batch_size": 8, "micro_batch_size": 2,
                "precision": "fp32", "log_every_steps": 1,
            },
        }
        | sections
    )  # fmt: skip
