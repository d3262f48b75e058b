"""Which linears of a tower run in FP8, by their sizes on a rank and their place; shared by the checks and the model."""

from typing import Literal

from megaeva.config.schema import Fp8Section, TextSection, VisionSection

Fp8Linear = Literal["qkv", "proj", "fc1", "fc2"]


def features_on_rank(section: VisionSection | TextSection, tp_size: int) -> dict[Fp8Linear, tuple[int, int]]:
    """(input, output) features of each linear of a layer on one of `tp_size` ranks."""
    width, hidden = section.hidden_size, section.ffn_hidden_size
    gates = 2 if section.activation == "swiglu" else 1
    return {
        "qkv": (width, 3 * width // tp_size),
        "proj": (width // tp_size, width),
        "fc1": (width, gates * hidden // tp_size),
        "fc2": (hidden // tp_size, width),
    }


def in_fp8(section: VisionSection | TextSection, tp_size: int, fp8: Fp8Section, number: int, name: Fp8Linear) -> bool:
    """Whether this linear of layer `number` (from 0 in the whole tower) multiplies in FP8."""
    if number < fp8.first_layers_bf16 or number >= section.num_layers - fp8.last_layers_bf16:
        return False
    return name in fp8.linears and min(features_on_rank(section, tp_size)[name]) >= fp8.min_features
