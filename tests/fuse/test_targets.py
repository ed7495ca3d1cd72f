"""Fused distributions and their loss against direct computations, and files that an interrupted pass continues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from worlds.fused import save_base, save_teacher, text
from worlds.jsonl import write_jsonl

from workbench.fuse.fusellm import AvgCE, MinCE
from workbench.fuse.teaching import distributions
from workbench.fuse.teaching.distributions import NONE, Pass, Reading, Shards, Vocabulary, measure
from workbench.fuse.teaching.lesson import Room, Teacher, fused_loss, lesson, taught_loss
from workbench.fuse.teaching.targets import Fusion, Source, new_tally
from workbench.models.texts import Text
from workbench.train.rows import collate, encode

CPU = torch.device("cpu")
MINCE = MinCE.model_validate({"fuse": "mince", "teachers": ["a"], "data": "t.jsonl"})
AVGCE = AvgCE.model_validate({"fuse": "avgce", "teachers": ["a"], "data": "t.jsonl"})


class Given:
    """Distributions of one text in memory, in place of files."""

    def __init__(self, ids: Any, probabilities: Any, nll: Any) -> None:
        self.arrays = {
            "ids": np.array(ids, dtype=np.int32),
            "probabilities": np.array(probabilities, dtype=np.float32),
            "nll": np.array(nll, dtype=np.float32),
        }

    def row(self, number: int) -> dict[str, Any]:
        return self.arrays


def reading(ends: Sequence[int]) -> Reading:
    return Reading(np.arange(len(ends)), np.array(ends), 0)


def source(
    name: str, ends: Sequence[int], syncs: tuple[Sequence[int], Sequence[int]], tokens: Sequence[int], given: Given
) -> Source:
    k = given.arrays["ids"].shape[1]
    places = np.array(syncs[0]), np.array(syncs[1])
    return Source(name, Pass([reading(ends)], 99, k, Path()), [places], np.array(tokens), given)  # type: ignore[arg-type]


# Four tokens of the trained model; teacher "two" has tokens that end with the first, the third and the last one.
ONE = source(
    "one",
    [1, 2, 3, 4],
    ([0, 1, 2, 3], [0, 1, 2, 3]),
    range(10),
    Given([[1, 2], [2, 3], [3, 4], [4, 5]], [[0.5, 0.25], [0.5, 0.25], [0.75, 0.125], [0.5, 0.5]], [1.0, 1.0, 4.0, 0.0]),
)
TWO = source(
    "two",
    [1, 3, 4],
    ([0, 2, 3], [0, 1, 2]),
    [7, 7, 8, NONE],
    Given([[0, 1], [2, 3], [9, 2]], [[0.5, 0.25], [0.5, 0.5], [0.75, 0.25]], [3.0, 1.0, 0.0]),
)


def fused(step: Any, by: str, k: int = 3) -> tuple[Any, Any, Any]:
    tally = new_tally(2)
    ids, values = Fusion([ONE, TWO], step.shares, by, k, tally).row(0, reading([1, 2, 3, 4]), range(0, 4))
    return ids, values, tally


def test_the_model_with_the_lower_loss_of_the_row_teaches_it() -> None:
    """Over the row "one" loses 6 nats and "two" 4, so "two" teaches: tokens 0 and 1 are both token 7, and their sum is kept."""
    ids, values, tally = fused(MINCE, "sequence")
    assert ids[:, 0].tolist() == [7, 0, 8, 8]
    assert values.tolist() == [[0.75, 0, 0], [0, 0, 0], [0.5, 0, 0], [0.25, 0, 0]]
    assert tally.record(["one", "two"]).to_dict() == {
        "learned": 4,
        "taught": 0.75,
        "rest": 0.5,
        "models": {
            "one": {"aligned": 1.0, "share": 0.0, "loss": 2.0},
            "two": {"aligned": 0.75, "share": 1.0, "loss": 1.3333},
        },
    }


def test_spans_are_taught_by_their_own_best_model() -> None:
    """The first two tokens between shared places cost "one" 2 and "two" 3 nats, the next one costs them 4 and 1."""
    ids, values, _ = fused(MINCE, "span")
    assert ids.tolist() == [[1, 2, 0], [2, 3, 0], [8, 0, 0], [8, 0, 0]]
    assert values[:, 0].tolist() == [0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("by", ["sequence", "span"])
def test_models_that_share_one_place_or_none_teach_alike(by: str) -> None:
    """No text lies between two shared places, so that no loss can be compared."""
    for places in ([2], []):
        few = replace(TWO, syncs=[(np.array(places, int), np.array([1] * len(places), int))])
        tally = new_tally(2)
        Fusion([ONE, few], AVGCE.shares, by, 3, tally).row(0, reading([1, 2, 3, 4]), range(0, 4))
        assert tally.share == pytest.approx([4 - len(places) / 2, len(places) / 2])
        assert (tally.compared, tally.nats) == (0, [0.0, 0.0])


def test_the_weighted_mean_is_computed_over_models_that_have_a_distribution() -> None:
    ids, values, tally = fused(AVGCE, "sequence")
    rewards = [math.exp(math.exp(-loss)) for loss in (6 / 3, 4 / 3)]
    one, two = (reward / sum(rewards) for reward in rewards)
    expected = [
        {7: two * 0.75, 1: one * 0.5, 2: one * 0.25},
        {2: 0.5, 3: 0.25},  # only "one" has a token that ends here
        {3: one * 0.75, 8: two * 0.5, 4: one * 0.125},
        {4: one * 0.5, 5: one * 0.5, 8: two * 0.25},  # token 9 of "two" is beyond its tokenizer
    ]
    for i, tokens in enumerate(expected):
        found = {int(t): float(v) for t, v in zip(ids[i], values[i], strict=True) if v > 0}
        assert found == pytest.approx(tokens, rel=1e-6)
    assert tally.share == pytest.approx([3 * one + 1, 3 * two])
    shorter = fused(AVGCE, "sequence", k=1)
    assert shorter[0][:, 0].tolist() == [max(tokens, key=tokens.__getitem__) for tokens in expected]


def test_equal_tokenizers_give_the_teachers_distributions(tmp_path: Path) -> None:
    place = save_base(tmp_path / "base", first="<s>")
    vocabulary = Vocabulary(place, "base")
    readings = [vocabulary.read(Text("", text(seed), "row")) for seed in range(3)]
    work = Pass(readings, 128, 5, tmp_path / "files")
    shards = work.shards()
    measure(work, shards, lambda: live(place), CPU, lambda *_: None)
    for number, part in enumerate(readings):
        every = np.arange(len(part.ids))
        own = Source("teacher", work, [(every, every)] * 3, np.arange(vocabulary.size), shards)
        ids, values = Fusion([own], MINCE.shares, "span", 5, new_tally(1)).row(number, part, range(len(part.ids)))
        logs = live(place)(torch.tensor(part.ids)[None]).logits[0].double().log_softmax(-1)
        expected = logs.exp().topk(5)
        assert np.array_equal(ids, expected.indices)
        assert np.abs(values - expected.values.numpy()).max() < 1e-6
        nll = -logs[:-1].gather(1, torch.tensor(part.ids[1:, None])).squeeze(1)
        assert np.abs(shards.row(number)["nll"][:-1] - nll.numpy()).max() < 1e-5


def live(place: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)


def test_an_interrupted_pass_continues_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save_teacher(tmp_path / "teacher")
    vocabulary = Vocabulary(place, "teacher")
    readings = [vocabulary.read(Text("", text(seed, 4 + seed), "row")) for seed in range(9)]
    passes = [Pass(readings, 10, 4, tmp_path / name) for name in ("whole", "stopped")]
    limit = 25 * (8 * 4 + 4)  # about three texts
    files = [Shards(w.place, [len(w.places(n)) for n in range(9)], 8 * 4 + 4, limit) for w in passes]
    assert len(files[0].parts) > 3
    measure(passes[0], files[0], lambda: live(place), CPU, lambda *_: None)

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(passes[1], files[1], lambda: live(place), CPU, stop)
    assert len(list((tmp_path / "stopped").iterdir())) == 2
    (tmp_path / "stopped" / "00001.safetensors").write_bytes(b"damaged")
    measure(passes[1], files[1], lambda: live(place), CPU, lambda *_: None)
    contents = [{f.name: f.read_bytes() for f in w.place.iterdir()} for w in passes]
    assert contents[0] == contents[1]
    assert all(len(content) <= limit + 500 for content in contents[0].values())
    assert len(files[1].row(8)["ids"]) == 10  # the model reads ten tokens of a longer text
    monkeypatch.setattr(distributions, "_batch", None)
    measure(passes[1], files[1], lambda: live(place), CPU, lambda *_: None)  # nothing is computed again


def test_the_loss_equals_a_direct_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (6 * torch.randn(5, 11, generator=generator)).requires_grad_()
    targets = torch.tensor([3, 1, 0, 10, 7])
    ids = torch.tensor([[2, 5, 0], [0, 0, 0], [1, 3, 4], [9, 0, 0], [7, 8, 2]])
    values = torch.tensor([[0.5, 0.2, 0.1], [0, 0, 0], [0.25, 0.25, 0.25], [0.9, 0, 0], [0.6, 0.3, 0.1]])
    direct = logits.detach().double().requires_grad_()
    logs = direct.log_softmax(-1)
    losses = []
    for i in range(5):
        loss = -logs[i, targets[i]]
        if values[i].sum() > 0:
            kept = {int(t): float(v) for t, v in zip(ids[i], values[i], strict=True) if v > 0}
            others = [t for t in range(11) if t not in kept]
            rest = 1 - float(values[i].double().sum())
            cross = -sum(v * logs[i, t] for t, v in kept.items()) - rest * logs[i, others].exp().sum().log()
            loss = 0.7 * loss + 0.3 * cross
        losses.append(loss)
    expected = torch.stack(losses).mean()
    found = fused_loss(logits, targets, ids, values, 0.3)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    found.backward()
    expected.backward()
    assert torch.allclose(logits.grad.double(), direct.grad, atol=1e-6)
    alone = torch.nn.functional.cross_entropy(logits, targets)
    assert float(fused_loss(logits, targets, ids, values, 0.0)) == pytest.approx(float(alone), rel=1e-6)


def test_a_lesson_teaches_what_the_teacher_predicts_before_each_learned_token(tmp_path: Path) -> None:
    place = save_base(tmp_path / "base", first="<s>")
    texts = [("", text(3)), (text(1, 5), text(2, 4).strip()), ("", text(4, 3))]
    rows = [{"prompt": prompt, "completion": answer} if prompt else {"text": answer} for prompt, answer in texts]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    fields = {"fuse": "mince", "teachers": ["same"], "data": "rows.jsonl", "top_k": 5, "with_base": False, "weight": 0.3}
    step = MinCE.model_validate(fields)
    told: list[str] = []
    room = Room(tmp_path, tmp_path / "cache", place, 10_000, CPU, told.append, lambda *_: None)
    base = Teacher("base", place, "digest of the base", None, lambda: pytest.fail("the base is not fused"))
    objective = lesson(step, step.settings(1), [Teacher("same", place, "another digest", None, lambda: live(place))], base, room)
    assert objective.record["fused"]["taught"] == 1.0
    assert "100% of" in told[-1]
    cached = Teacher("same", place, "another digest", None, lambda: pytest.fail("its distributions are cached"))
    assert lesson(step, step.settings(1), [cached], base, room).digest == objective.digest

    model, tokenizer = live(place), AutoTokenizer.from_pretrained(place)
    encoded = [encode(tokenizer, prompt, answer, 128) for prompt, answer in texts]
    assert all(ids[-1] == tokenizer.eos_token_id for ids, _ in encoded)
    batch = objective.collate([encoded[1], encoded[2], encoded[0]])
    logs, targets = [], []
    for ids, learned in (encoded[1], encoded[2], encoded[0]):
        logs.append(model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[len(ids) - learned - 1 : -1])
        targets += ids[len(ids) - learned :]
    after = torch.cat(logs)
    expected = after.topk(5)
    assert torch.equal(batch["taught_ids"].long(), expected.indices)
    assert torch.allclose(batch["taught"].double(), expected.values.exp(), atol=1e-6)
    rest = 1 - expected.values.exp().sum(1)
    cross = -(expected.values.exp() * expected.values).sum(1) - rest * rest.log()
    direct = (0.7 * -after[torch.arange(len(targets)), targets] + 0.3 * cross).mean()
    assert float(objective.loss(model, batch)) == pytest.approx(float(direct), rel=1e-5)


def test_distributions_belong_to_the_token_that_follows(tmp_path: Path) -> None:
    """A distribution that is certain of each next token gives the loss of the text, and so no loss at all for a certain model."""
    place = save_base(tmp_path / "base")
    rows = [(list(range(20, 29)), 8), (list(range(40, 45)), 2)]
    batch = collate(rows)
    certain = {"taught_ids": batch["targets"][:, None], "taught": torch.ones(len(batch["targets"]), 1)}
    model = live(place)
    plain = [float(taught_loss(model, {**batch, **certain}, weight)) for weight in (0.0, 0.5, 1.0)]
    logs = [model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids, _ in rows]
    direct = [-float(log[i - 1, ids[i]]) for log, (ids, n) in zip(logs, rows, strict=True) for i in range(len(ids) - n, len(ids))]
    assert plain == pytest.approx([sum(direct) / len(direct)] * 3, rel=1e-5)
