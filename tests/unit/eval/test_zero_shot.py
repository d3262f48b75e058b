"""Class vectors against clip_benchmark's own code, accuracy against scikit-learn's."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaeva.errors import DataError
from megaeva.eval.zero_shot import Classes, accuracy, class_vectors, read_classes

CLASSES = Classes(("cat", "dog", "red panda"), ("a photo of a {}.", "a {c} drawing", "{}"))


def _encode(texts: Sequence[str]) -> Tensor:
    """A text tower made of character sums; rows of very different length."""
    rows = [torch.tensor([float(sum(map(ord, t[i::5]))) for i in range(5)]) - 200 for t in texts]
    return torch.stack(rows)


def test_class_vectors_equal_clip_benchmark() -> None:
    oracle = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")

    class Model:
        def encode_text(self, feature_XE: Tensor) -> Tensor:
            return feature_XE

    templates = [t.replace("{}", "{c}") for t in CLASSES.templates]
    wanted = oracle.zero_shot_classifier(Model(), _encode, list(CLASSES.names), templates, "cpu", amp=False)
    torch.testing.assert_close(class_vectors(_encode, CLASSES, CLASSES.names), wanted.T)


def test_each_prompt_counts_alike_whatever_its_length() -> None:
    long_and_short = Classes(("x",), ("{} long", "{} short"))
    rows = {"x long": [100.0, 0.0], "x short": [0.0, 0.1]}
    vector = class_vectors(lambda texts: torch.tensor([rows[t] for t in texts]), long_and_short, ("x",))
    torch.testing.assert_close(vector, torch.full((1, 2), 0.5**0.5))


@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_equals_scikit_learn(seed: int) -> None:
    # clip_benchmark's own `accuracy` no longer runs (it turns a 1-element array into a float); same definition here.
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    class_CE = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=-1)
    label_X = torch.randint(20, (300,), generator=generator)
    image_XE = class_CE[label_X] * 3 + torch.randn(300, 16, generator=generator)
    score_XC = (torch.nn.functional.normalize(image_XE, dim=-1) @ class_CE.T).numpy()
    ours = accuracy(image_XE, class_CE, label_X)
    for k in (1, 5):
        wanted = metrics.top_k_accuracy_score(label_X.numpy(), score_XC, k=k, labels=range(20))
        assert ours[f"top{k}"] == pytest.approx(wanted)
    assert ours["top1"] < ours["top5"] < 1


def test_ties_count_against_the_model() -> None:
    ours = accuracy(torch.ones(8, 4), torch.full((10, 4), 0.5), torch.arange(8))
    assert ours == {"top1": 0.0, "top5": 0.0}


def test_classes_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": ["cat"], "templates": ["a {}"]}))
    assert read_classes(path).prompts("cat") == ["a cat"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"classes": ["a"]}',
        '{"classes": [], "templates": ["{}"]}',
        '{"classes": ["a"], "templates": []}',
        '{"classes": ["a"], "templates": ["a photo"]}',
    ],
)
def test_bad_classes_file_is_one_message(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"classes\.json"):
        read_classes(path)


def test_missing_classes_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no_such"):
        read_classes(tmp_path / "no_such.json")
