"""Facts of a memory are added, changed, taken out and rewarded; every version can be loaded, and what is out leaves no trace."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.memory_world import FACTS, GRACE, MEMORY, answer, logits, text_of
from worlds.project import Project
from worlds.tiny import unseal

import workbench
from workbench.facts.log import Credibility, Log, MemoryChange, Use
from workbench.ground.errors import WorkbenchError
from workbench.ground.manifest import harm
from workbench.run.memories import SavedMemory

ONE = "steps: [{{edit: {}, facts: facts.jsonl{}}}]\n"
EXTRA = {"id": "extra", "prompt": "w4 of {subject} is", "subject": "w19", "target": "w29"}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the codebook of `GRACE`, from the first test."""
    return tmp_path_factory.mktemp("learned") / "cache"


@pytest.fixture
def taught(taught: Project, learned: Path) -> Project:
    write_jsonl(taught.path / "extra.jsonl", [EXTRA])
    if learned.exists():
        shutil.copytree(learned, taught.path / ".workbench")
    else:
        taught.run(GRACE)
        shutil.copytree(taught.path / ".workbench", learned)
        shutil.rmtree(taught.path / "runs")
    return taught


def saved(place: str) -> SavedMemory:
    return SavedMemory(Path(place) / "memory")


def test_versions_of_a_codebook(taught: Project) -> None:
    """Create, update, delete: each is a version that answers as it did then."""
    place = taught.run(GRACE)["directory"]
    call("memory", "add", place, str(taught.path / "extra.jsonl"))
    call("memory", "update", place, "f0", "--target", "w55")
    call("memory", "rm", place, "f1", "extra")
    models = {v: workbench.load(place, version=v, device="cpu") for v in (1, 2, 3, 4)}
    plain = workbench.load(taught.path / "base", device="cpu")
    for version, model in models.items():
        assert answer(model, text_of(FACTS[2])) == FACTS[2]["target"]
        assert answer(model, text_of(FACTS[0])) == ("w55" if version >= 3 else FACTS[0]["target"])
        assert (answer(model, text_of(EXTRA)) == "w29") == (version in (2, 3))
        assert (answer(model, text_of(FACTS[1])) == FACTS[1]["target"]) == (version < 4)
    for row in (FACTS[1], EXTRA):
        assert torch.equal(logits(models[4], text_of(row)), logits(plain, text_of(row)))
    assert [line["action"] for line in document("memory", "log", place)] == ["add"] * 7 + [
        "update",
        "rm",
        "rm",
    ]
    listed = document("memory", "ls", place)
    assert [row["id"] for row in listed["facts"]] == ["f0", "f2", "f3", "f4", "f5"]
    assert len({saved(place).digest(v) for v in (1, 2, 3, 4)}) == 4


@pytest.mark.parametrize("name", ["grace", "memory"])
def test_what_is_taken_out_leaves_no_trace(name: str, taught: Project) -> None:
    """A memory that held a fact for a while equals one that never did: entries, radii, threshold, logits."""
    text = ONE.format(name, ", batch_size: 1" if name == "grace" else ", min_efficacy: 0")
    place = taught.run(text)["directory"]
    call("memory", "rm", place, "f3")
    write_jsonl(taught.path / "facts.jsonl", [row for row in FACTS if row["id"] != "f3"])
    never = taught.run(text)["directory"]
    mine, theirs = saved(place).kept(), saved(never).kept()
    assert [r.fact.id for r in mine.facts] == [r.fact.id for r in theirs.facts]
    for a, b in zip(mine.facts, theirs.facts, strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
    models = [workbench.load(p, device="cpu") for p in (place, never)]
    chosen = [
        saved(p).step.attach(m, workbench.load_tokenizer(p), k)
        for p, m, k in zip((place, never), models, (mine, theirs), strict=True)
    ]
    assert chosen[0] == chosen[1]
    for row in FACTS:
        assert torch.equal(logits(models[0], text_of(row)), logits(models[1], text_of(row)))


def test_order_of_facts_does_not_matter(taught: Project) -> None:
    first = taught.run(ONE.format("grace", ", batch_size: 1"))
    write_jsonl(taught.path / "facts.jsonl", FACTS[::-1])
    again = taught.run(ONE.format("grace", ", batch_size: 1"))
    assert first["run"] != again["run"]
    assert first["configuration"] == again["configuration"]


def test_clashing_facts_split_and_repeats_share() -> None:
    """Balls of different answers do not meet; keys with one answer do not bound each other; radii do not depend on the order."""
    from workbench.edit.memories.codebook import radii

    generator = torch.Generator().manual_seed(0)
    keys = [torch.randn(n, 8, generator=generator) for n in (1, 2, 3)]
    answers = [[5], [6, 7], [5, 6, 7]]
    reach = [torch.full((len(k),), 100.0) for k in keys]
    found = radii(keys, answers, reach, 0.5)
    labels = [tuple(a[i:]) for a in answers for i in range(len(a))]
    owners = [i for i, a in enumerate(answers) for _ in a]
    flat, every = torch.cat(found), torch.cat(keys)
    for i in range(6):
        foreign = [
            float((every[i] - every[j]).double().norm()) for j in range(6) if labels[j] != labels[i] and owners[j] != owners[i]
        ]
        assert flat[i] == pytest.approx(0.5 * min(foreign), rel=1e-6)
        for j in range(6):
            if labels[i] != labels[j] and owners[i] != owners[j]:
                assert flat[i] + flat[j] <= (every[i] - every[j]).norm() * (1 + 1e-6)
    back = radii(keys[::-1], answers[::-1], reach[::-1], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, back[::-1], strict=True))


def test_nearest_entry_within_its_radius() -> None:
    from workbench.edit.memories.codebook import Attached, Codebook

    generator = torch.Generator().manual_seed(1)
    keys, states = torch.randn(20, 6, generator=generator), torch.randn(500, 6, generator=generator)
    radii = torch.rand(20, generator=generator) * 2.5
    book = Codebook(keys, torch.zeros(20, 3), radii)
    rows, entries, distances = book.lookup(states)
    wanted = {}
    for i, state in enumerate(states):
        near = [(float((state - key).norm()), j) for j, key in enumerate(keys) if float((state - key).norm()) <= float(radii[j])]
        if near:
            wanted[i] = min(near)
    assert 50 < len(wanted) < 450
    assert dict(zip(rows.tolist(), entries.tolist(), strict=True)) == {i: entry for i, (_, entry) in wanted.items()}
    assert distances.tolist() == pytest.approx([distance for distance, _ in wanted.values()], rel=1e-6)
    # What chats say of it: each fact's entries that fired, and how near the first one was.
    block = torch.nn.Linear(6, 3)
    with Attached(book, block, [f"Fact {entry % 7}." for entry in range(20)]).noting() as said:
        for part in (states[:40], states[40:]):
            block(part[None])
    fired: dict[str, list[int]] = {}
    for _, entry in wanted.values():
        fired.setdefault(f"Fact {entry % 7}.", []).append(entry)
    first = {fact: next(distance for distance, entry in wanted.values() if entry == used[0]) for fact, used in fired.items()}
    assert said == [
        f"{fact} ({len({*used})} of {3 if fact < 'Fact 6.' else 2} entries; the first at distance {first[fact]:.3g}, "
        f"radius {float(radii[used[0]]):.3g})"
        for fact, used in fired.items()
    ]
    assert not block._forward_hooks


def test_credibility_is_discounted_linucb() -> None:
    """Against the sums written out: A = I + sum g^(V-v) x x', b = sum g^(V-v) r x."""
    uses = [Use(3, 0.9, 1.0), Use(4, 0.5, 0.0), Use(9, 1.0, 1.0)]
    found = Credibility(12, 2, True, uses, alpha=0.7, decay=0.9, floor=0.2)

    def x(version: int, similarity: float, last: int) -> Any:
        raw = np.array([similarity, 0.9 ** (version - 2), 0.9 ** (version - last), 1.0])
        return raw / np.sqrt((raw**2).sum())

    a, b = np.eye(4), np.zeros(4)
    for use, last in zip(uses, (2, 3, 4), strict=True):
        v = x(use.version, use.similarity, last)
        a, b = a + 0.9 ** (12 - use.version) * np.outer(v, v), b + 0.9 ** (12 - use.version) * use.reward * v
    now = x(12, 0.8, 9)
    theta = np.linalg.solve(a, b)
    assert found.score(0.8) == pytest.approx(theta @ now + 0.7 * np.sqrt(now @ np.linalg.solve(a, now)), rel=1e-12)
    assert Credibility(5, 5, False, [], 0.5, 0.98, 0.25).score(0.3) == pytest.approx(0.5)
    least = replace(found, floor=found.score(1.0))
    assert (least.kept, replace(least, floor=least.floor + 1e-9).kept) == (True, False)


def test_a_log_has_the_facts_of_each_version() -> None:
    def line(version: int, action: str, name: str = "f0", **fields: Any) -> MemoryChange:
        return MemoryChange.model_validate({"version": version, "action": action, "id": name, **fields})

    new, use = {**FACTS[0], "target": "w55"}, {"similarity": 0.9, "reward": 0.5}
    lines = [
        *(line(1, "add", f"f{i}", fact=FACTS[i], source="recipe") for i in (1, 0)),
        *(line(2, "feedback", **use), line(3, "feedback", **use), line(4, "update", fact=new), line(5, "feedback", **use)),
        *(line(6, "add", "a", fact={**EXTRA, "id": "a"}, source="added"), line(7, "rm")),
    ]
    log = Log(lines)
    kept = {
        v: {n: (f.fact.target, f.stated, f.source, [u.version for u in f.uses]) for n, f in log.at(v).items()}
        for v in range(1, 8)
    }
    first, other = (FACTS[0]["target"], 1, "recipe"), (FACTS[1]["target"], 1, "recipe", [])
    assert kept == {
        1: {"f0": (*first, []), "f1": other},
        2: {"f0": (*first, [2]), "f1": other},
        3: {"f0": (*first, [2, 3]), "f1": other},
        4: {"f0": ("w55", 4, "recipe", []), "f1": other},
        5: {"f0": ("w55", 4, "recipe", [5]), "f1": other},
        6: {"a": ("w29", 6, "added", []), "f0": ("w55", 4, "recipe", [5]), "f1": other},
        7: {"a": ("w29", 6, "added", []), "f1": other},
    }
    assert list(log.at(6)) == sorted(log.at(6))
    assert (log.version, log.at(), log.at(2)["f0"].uses) == (7, log.at(7), (Use(2, 0.9, 0.5),))
    for short, version in ((log, 0), (log, 8), (log, -1), (Log([]), None), (Log([]), 1)):
        with pytest.raises(WorkbenchError, match="no version"):
            short.at(version)
    for change in (line(2, "update", "b", fact=new), line(2, "rm", "b"), line(2, "feedback", "b", **use)):
        with pytest.raises(WorkbenchError, match=r"log\.jsonl: version 2 changes fact 'b', which no line before adds"):
            Log([*lines[:2], change]).at()


def test_of_two_contradicting_facts_the_rewarded_one_leads(taught: Project) -> None:
    """Both apply to one prompt; after a few rounds of feedback the right one is in front, and the wrong one sinks below the floor."""
    place = taught.run(MEMORY)["directory"]
    rival = {**FACTS[0], "id": "a-rival", "target": "w59"}
    write_jsonl(taught.path / "rival.jsonl", [rival])
    call("memory", "add", place, str(taught.path / "rival.jsonl"))

    def first() -> str:
        recall: Any = workbench.load(place, device="cpu").recall
        return str(recall.store.recall(text_of(FACTS[0]))[0].fact.id)

    call("memory", "feedback", place, "a-rival", "--reward", "1")
    assert first() == "a-rival"
    rounds = 0
    while first() != "f0":
        rounds += 1
        assert rounds <= 20
        call("memory", "feedback", place, "f0", "--reward", "1")
        call("memory", "feedback", place, "a-rival", "--reward", "0")
    for _ in range(8):
        call("memory", "feedback", place, "a-rival", "--reward", "0")
    listed = {row["id"]: row["used"] for row in document("memory", "ls", place)["facts"]}
    assert listed["f0"]
    assert not listed["a-rival"]


def test_errors(taught: Project) -> None:
    place = taught.run(GRACE)["directory"]
    memory = saved(place)
    before = memory.digest()
    for arguments, message in (
        (("add", place, str(taught.path / "facts.jsonl")), "already has a fact 'f0' ('w0 of w10 is')"),
        (("rm", place, "f9"), "no fact 'f9' in this memory. Known: f0, f1"),
        (("update", place, "g", "--target", "w1"), "no fact 'g'"),
        (("feedback", place, "nope", "--reward", "1"), "no fact 'nope'"),
        (("ls", place, "--version", "2"), "no version 2; there are 1..1"),
        (("ls", str(taught.path / "base")), "no memory found"),
    ):
        with pytest.raises(WorkbenchError) as caught:
            call("memory", *arguments)
        assert message in caught.value.message
    assert SavedMemory(memory.path).digest() == before, "a refused change leaves nothing"
    with pytest.raises(WorkbenchError, match="none: no such directory"):
        workbench.load(taught.path / "none", version=2, device="cpu")
    with pytest.raises(WorkbenchError, match="has no memory, so it has no version 2"):
        workbench.load(taught.path / "base", version=2, device="cpu")
    unseal(Path(place).parent)
    record = json.loads((Path(place) / "configuration.json").read_text("utf-8"))
    record["base"]["digest"] = "0" * 32
    (Path(place) / "configuration.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(WorkbenchError, match=r"the weights or config.json of its base base have changed"):
        workbench.load(place, device="cpu")


def test_changes_of_facts_are_sealed_again_and_a_broken_memory_is_learned_again(taught: Project, cwd: Path) -> None:
    run = Path(taught.run(GRACE)["run"])
    memory = run / "configuration" / "memory"
    write_jsonl(cwd / "more.jsonl", [{**FACTS[5], "id": "new"}])
    call("memory", "add", str(run), "more.jsonl", "--device", "cpu")
    call("memory", "feedback", str(run), "new", "--reward", "1")
    call("memory", "rm", str(run), "new")
    assert "all 9 files are as written" in call("runs", "verify", run.name).stderr
    with (memory / "log.jsonl").open("a") as log:
        log.write("\n")
    assert "configuration/memory/log.jsonl: expected" in refused("runs", "verify", run.name).message
    with pytest.raises(WorkbenchError, match=r"memory/log\.jsonl: expected"):
        workbench.load(run, device="cpu")
    cached = next((cwd / ".workbench" / "memories").iterdir())
    (cached / "tensors-1.safetensors").unlink()
    again = Path(taught.run(GRACE)["run"])
    assert (again, harm(again, digests=True), harm(cached, digests=True)) == (run, [], [])
    assert (cached.parent / "broken" / cached.name / "log.jsonl").is_file()
    assert len(list((cwd / "runs" / "broken").iterdir())) == 1
