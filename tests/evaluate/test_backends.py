"""Suites that score written checkpoints: a completions server with a tiny model behind it, and what is said where something lacks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from worlds.completions_server import serving
from worlds.local_tasks import A, suite, tiny

from workbench.evaluate import build_plan, score
from workbench.evaluate.backends import WrittenCheckpoint
from workbench.evaluate.scorer import Scorer
from workbench.ground.errors import WorkbenchError


@pytest.fixture
def written(tokenizer: Any, tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def plan_by(backend: str, tasks_dir: Path, written: Path) -> Any:
    return build_plan(suite(backend=backend), written, tasks_dir=tasks_dir, dtype="float32", batch_size=4)


def test_a_server_gives_the_scores_of_the_live_model(
    tasks_dir: Path, tokenizer: Any, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tenacity", reason="the server backend needs lm-eval[api]")
    plan, model = plan_by("server", tasks_dir, written), tiny()
    live, expected = score(plan_by("hf", tasks_dir, written), A, model)
    assert live.plan != plan.digest, "scores of a server are not compared with a live model's"
    with serving({"mine": model}, tokenizer) as address:
        scores, rows = score(plan, A, WrittenCheckpoint(written, "mine", address))
        assert scores.device == "server"
        assert scores.tasks["pick"].scorer == "server"
        for task in ("copy", "pick"):
            assert [r["id"] for r in rows[task]] == [r["id"] for r in expected[task]]
        assert [r["response"] for r in rows["copy"]] == [r["response"] for r in expected["copy"]]
        for row, other in zip(rows["pick"], expected["pick"], strict=True):
            assert row["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)
            assert row["metrics"]["acc"] == other["metrics"]["acc"]
        with pytest.raises(WorkbenchError, match=r"serves mine, expected 'other'") as error:
            Scorer(plan, A, WrittenCheckpoint(written, "other", address))
        scorer = Scorer(plan, A, WrittenCheckpoint(written, "mine", address))
    monkeypatch.setattr(scorer.lm, "max_retries", 1)
    monkeypatch.setattr(scorer.lm, "_concurrent", 1)  # one request at a time: none is left waiting when the first one fails
    with pytest.raises(WorkbenchError, match=r"task 'pick': the server gave no valid answer to a request"):
        scorer.task("pick")
    assert f"vllm serve {written} --served-model-name other" in str(error.value.hint)


def test_what_lacks_is_said(tasks_dir: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, vllm = plan_by("server", tasks_dir, written), plan_by("vllm", tasks_dir, written)
    assert server.digest != vllm.digest
    with pytest.raises(WorkbenchError, match=r"'mine' is scored by a server, but no address was given"):
        Scorer(server, A, WrittenCheckpoint(written, "mine"))
    with pytest.raises(WorkbenchError, match=r"the address of a server, http://HOST:PORT"):
        Scorer(server, A, WrittenCheckpoint(written, "mine", "localhost:8000"))
    with pytest.raises(WorkbenchError, match=r"cannot be reached"):
        Scorer(server, A, WrittenCheckpoint(written, "mine", "http://127.0.0.1:1"))
    if "vllm" not in sys.modules:
        monkeypatch.setattr("workbench.evaluate.backends.find_spec", lambda name: None)
        with pytest.raises(WorkbenchError, match="backend vllm needs the package vllm"):
            Scorer(vllm, A, WrittenCheckpoint(written, "mine"))
        with pytest.raises(WorkbenchError, match="backend server needs aiohttp, tenacity, requests"):
            Scorer(server, A, WrittenCheckpoint(written, "mine"))
