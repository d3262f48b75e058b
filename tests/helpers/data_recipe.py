"""A recipe whose data matter and whose towers are as small as can be; of the modules that test loading."""

from typing import Any

from megaeva.config.schema import (
    Config,
    DataSection,
    MaskSection,
    MIMSection,
    ModelSection,
    OptimSection,
    TextSection,
    TowerOptimSection,
    TrainSection,
    VisionSection,
)

IMAGE_SIZE = 24
NUM_PATCHES = 16


def data_recipe(
    *train: object, task: str = "contrastive", batch: int = 8, patch_dropout: float = 0.0, **data: Any
) -> Config:
    """Images of `IMAGE_SIZE` in `NUM_PATCHES` patches and captions of 12 tokens; in task=mim 6 patches are masked.

    Args:
        train: shards.
        data: the rest of the `data` section.
    """
    vision = VisionSection(
        image_size=IMAGE_SIZE, patch_size=6, hidden_size=16, num_layers=1, num_heads=1, ffn_hidden_size=16,
        activation="gelu", qkv_bias="qkv", patch_dropout=patch_dropout,
    )  # fmt: skip
    text = TextSection(context_length=12, hidden_size=16, num_layers=1, num_heads=1, ffn_hidden_size=16)
    return Config(
        task=task,  # type: ignore[arg-type]
        run_dir="unused",
        platform="cpu",
        seed=5,
        model=ModelSection(embed_dim=16, vision=vision, text=text),
        mim=MIMSection(mask=MaskSection(num_masked=6, min_block=2)) if task == "mim" else None,
        data=DataSection(train=tuple(map(str, train)), **data),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-3)),
        train=TrainSection(total_samples=100, global_batch_size=batch),
    )
