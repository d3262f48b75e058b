"""Encoding a set: order, filling up of short batches, the choice of pictures."""

import pytest
import torch
from torch import Tensor

from megaeva.data.evaluation import EvalBatch
from megaeva.errors import DataError
from megaeva.eval.features import encode_set
from megaeva.eval.predictions import predict
from megaeva.parallel.grid import grid_of_one

CPU = torch.device("cpu")


class FakeModel:
    """The image's mean colour, the text's first two tokens; notes the sizes of its passes."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        self.rows.append(len(image_BCHW))
        return image_BCHW.mean((2, 3)).bfloat16()

    def encode_text(self, token_BL: Tensor) -> Tensor:
        self.rows.append(len(token_BL))
        return token_BL[:, :3].float()


def _batches(size: int, total: int = 10) -> list[EvalBatch]:
    generator = torch.Generator().manual_seed(0)
    image_XCHW = torch.randn(total, 3, 4, 4, generator=generator)
    order = torch.randperm(total, generator=generator).tolist()
    return [
        EvalBatch(
            image_XCHW[part],
            torch.tensor([[i, 1, 2, 0] for i in part]),
            tuple(f"s/{i:03d}" for i in part),
            tuple(f"caption {i}" for i in part),
            tuple({"name": i} for i in part),
            tuple(part),
        )
        for part in (order[i : i + size] for i in range(0, total, size))
    ]


def _encode(size: int, model: FakeModel | None = None, num_pictures: int = 0):
    return encode_set(
        model or FakeModel(), _batches(size), grid=grid_of_one(), device=CPU, batch_size=4, num_pictures=num_pictures
    )


def test_result_is_in_the_order_of_the_set_and_independent_of_the_batches() -> None:
    first, second = _encode(4), _encode(3)
    assert first.keys == tuple(f"s/{i:03d}" for i in range(10))
    assert first.captions[7] == "caption 7"
    assert first.metas[7] == {"name": 7}
    assert first.text_XE is not None
    assert first.text_XE[:, 0].tolist() == list(range(10))
    assert first.image_XE.dtype == torch.float32
    assert torch.equal(first.image_XE, second.image_XE)


def test_every_pass_has_the_same_number_of_rows() -> None:
    model = FakeModel()
    _encode(3, model)
    assert set(model.rows) == {4}


def test_pictures_are_a_fixed_choice_and_look_like_the_input() -> None:
    first, second = _encode(4, num_pictures=3), _encode(2, num_pictures=3)
    assert len(first.pictures) == 3
    assert list(first.pictures) == list(second.pictures)
    for picture in first.pictures.values():
        assert picture.shape == (4, 4, 3)
        assert picture.dtype.name == "uint8"


def test_predictions_name_the_right_captions() -> None:
    features = _encode(4, num_pictures=10)
    owner = torch.arange(10)
    predictions = predict(features, owner, list(range(10)))
    assert len(predictions) == 10
    for prediction in predictions:
        number = int(prediction["key"][-3:])
        assert prediction["captions"] == [f"caption {number}"]
        assert len(prediction["top"]) == 5
        scores = [entry["score"] for entry in prediction["top"]]
        assert scores == sorted(scores, reverse=True)
        right = [entry["correct"] for entry in prediction["top"]]
        assert sum(right) == (prediction["ahead"] < 5)
        for entry in prediction["top"]:
            assert entry["correct"] == (entry["caption"] == f"caption {number}")


def test_empty_set_is_one_message() -> None:
    with pytest.raises(DataError, match="no readable sample"):
        encode_set(FakeModel(), [], grid=grid_of_one(), device=CPU, batch_size=4, num_pictures=0)
