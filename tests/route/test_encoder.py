"""Sentence encoders: their vectors are those of the model, the end of a text counts, and a router adds their cosines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from worlds.encoders import sentence_encoder
from worlds.routing import prompts

from workbench.ground.errors import WorkbenchError
from workbench.route.deciding.encoder import LAST, Encoder
from workbench.route.deciding.pooling import ENCODED
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.statistics import Statistics
from workbench.route.ridge import RidgeRouter
from workbench.steps import Prompts

TEXTS = [prompts(0, seed=1)[0], prompts(2, seed=1)[3], "unknown"]


@pytest.mark.parametrize("way", ["mean_tokens", "cls_token"])
def test_vectors_are_pooled_as_the_folder_says(tmp_path: Path, way: str) -> None:
    folder = sentence_encoder(tmp_path / "small", way)
    found = Encoder.of("small", tmp_path)([*TEXTS, TEXTS[0]])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    for text, vector in zip([*TEXTS, TEXTS[0]], found, strict=True):
        (states,) = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        pooled = states.mean(0) if way == "mean_tokens" else states[0]
        torch.testing.assert_close(vector, pooled / pooled.norm(), atol=1e-6, rtol=1e-5)


def test_the_last_tokens_of_a_long_text_are_read(tmp_path: Path) -> None:
    sentence_encoder(tmp_path / "small")
    words = [word for text in prompts(1, seed=1) for word in text.split()] * 9
    encoder = Encoder.of("small", tmp_path)
    end, whole, longer = encoder([" ".join(words[-LAST:]), " ".join(words), " ".join(words[-LAST - 1 :])])
    torch.testing.assert_close(end, whole)
    torch.testing.assert_close(end, longer)
    assert not torch.allclose(end, encoder([" ".join(words[-LAST + 9 :])])[0])


def rewritten(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), "utf-8")


def test_what_makes_its_vectors_in_another_way_is_refused(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "small")
    digest = Encoder.of("small", tmp_path).digest
    rewritten(folder, "1_Pooling/config.json", {"pooling_mode": "mean"})
    assert Encoder.of("small", tmp_path).digest != digest
    with pytest.raises(WorkbenchError, match="is not the one that the router was fitted with"):
        Encoder.of("small", tmp_path, digest)
    rewritten(folder, "1_Pooling/config.json", {"pooling_mode_max_tokens": True})
    with pytest.raises(WorkbenchError, match=r"with pooling max"):
        Encoder.of("small", tmp_path)
    rewritten(folder, "1_Pooling/config.json", {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    with pytest.raises(WorkbenchError, match=r"with pooling max, mean"):
        Encoder.of("small", tmp_path)
    rewritten(folder, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    rewritten(
        folder, "modules.json", [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    )
    with pytest.raises(WorkbenchError, match=r"found the modules Transformer, Pooling, Dense"):
        Encoder.of("small", tmp_path)
    (folder / "modules.json").unlink()
    with pytest.raises(WorkbenchError, match=r"sentence encoder small: modules\.json is missing") as caught:
        Encoder.of("small", tmp_path)
    assert "sentence-transformers wrote" in str(caught.value.hint)


def test_a_router_adds_the_cosines_to_scores_and_confidence() -> None:
    torch.manual_seed(0)
    hidden, vectors = torch.randn(5, 4, 8), torch.randn(5, 3)
    means = torch.randn(2, 3, dtype=torch.float64)
    parts = (Statistics.of(torch.randn(20, 8)), Statistics.of(torch.randn(20, 8) + 1))
    plain = RidgeRouter(("one", "two"), layer=1, statistics=parts, negatives=Statistics.of(torch.randn(20, 8) - 1), strength=0.1)
    router = replace(plain, encoded=means)
    scores, confidence = plain.score(Prompts([""] * 5, hidden))
    found, sure = router.score(Prompts([""] * 5, hidden, vectors))
    centre = means.mean(0)
    near = torch.nn.functional.cosine_similarity((vectors.double() - centre)[:, None], (means - centre)[None], dim=2)
    torch.testing.assert_close(found, scores + ENCODED * near)
    torch.testing.assert_close(sure, confidence + near.amax(1))


def test_vectors_stay_with_their_samples() -> None:
    parts = [Samples.of_brick(name, prompts(number)) for number, name in enumerate(("one", "two", "three"))]
    parts = [part.with_features(torch.rand(len(part.texts), 4, 8), torch.rand(len(part.texts), 3)) for part in parts]
    both = parts[0].added(parts[1])
    three = both.added(parts[2])
    assert three.measured is not None
    assert torch.equal(three.measured, torch.cat([part.measured for part in parts if part.measured is not None]))
    back = Samples.read(three.removed("three").tensors(), ("one", "two"))
    assert both.measured is not None
    assert back.measured is not None
    assert torch.equal(back.measured, both.measured)
