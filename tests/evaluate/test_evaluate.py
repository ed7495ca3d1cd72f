"""Suites, plans, scoring and the store, on tiny models and tasks made here."""

from __future__ import annotations

import copy
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from worlds.local_tasks import CHOICE, GENERATE, LOCALDATA, A, documents, plan_of, suite, tiny, write_data

from workbench.evaluate import build_plan, evaluate, score
from workbench.evaluate.scorer import Scorer
from workbench.ground.errors import WorkbenchError
from workbench.models.identity import tokenizer_digest
from workbench.scores.plan import Item, subset
from workbench.scores.store import Configuration, ScoreStore

# Parity


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("chat", [False, True])
def test_a_system_instruction_and_settings_of_generation_are_lm_evals(
    chat: bool, tasks_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = "Answer with one word."
    settings = {"max_gen_toks": 7, "repetition_penalty": 1.5, "until": ["q"]}
    plan = plan_of(tasks_dir, tmp_path / "model", system_instruction=said, gen_kwargs=settings, chat_template=chat)
    _, rows = score(plan, A, tiny())

    lm = HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=4, logits_cache=False)
    expected = lm_eval.simple_evaluate(
        lm,
        tasks=["copy", "pick"],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        system_instruction=said,
        gen_kwargs=settings,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    samples = expected["samples"]
    assert [r["response"] for r in rows["copy"]] == [s["resps"][0][0] for s in samples["copy"]]
    for row, sample in zip(rows["pick"], samples["pick"], strict=True):
        assert row["loglikelihoods"] == pytest.approx([r[0][0] for r in sample["resps"]], abs=1e-5)
        assert said in sample["arguments"][0][0]
    plain = plan_of(tasks_dir, tmp_path / "model", chat_template=chat)
    assert rows != score(plain, A, tiny())[1]
    others = [
        {"system_instruction": said},
        {"gen_kwargs": settings},
        {"system_instruction": said, "gen_kwargs": {"max_gen_toks": 6}},
    ]
    plans = [plan, plain, *(plan_of(tasks_dir, tmp_path / "model", chat_template=chat, **fields) for fields in others)]
    assert len({p.digest for p in plans}) == 5
    turned = plan_of(
        tasks_dir, tmp_path / "model", system_instruction=said, gen_kwargs=dict(reversed(settings.items())), chat_template=chat
    )
    assert turned.digest == plan.digest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gen_kwargs": {"temprature": 1}}, "suite 'toy': gen_kwargs: unknown setting 'temprature'"),
        ({"gen_kwargs": {"max_gen_toks": 3}, "tasks": ["pick"]}, "gen_kwargs: no task of the suite generates text"),
    ],
)
def test_settings_of_generation_that_have_no_effect_are_refused(
    fields: dict[str, Any], message: str, tasks_dir: Path, tokenizer: Any
) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(message)):
        plan_of(tasks_dir, tokenizer, **fields)


def test_a_model_that_copies_scores_on_generation(tasks_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(plan_of(tasks_dir, tokenizer).by("hflm"), A, tiny())
    monkeypatch.setattr(scorer.lm, "generate_until", lambda requests: [" " + r.doc["answer"] for r in requests])
    assert [row["metrics"]["exact_match"] for row in scorer.task("copy")["rows"]] == [1.0] * 24


def test_untied_head_is_not_tied_again(tasks_dir: Path, tokenizer: Any) -> None:
    import torch

    model = tiny(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)  # an edited head; the config still says tied
    head = model.lm_head.weight.detach().clone()
    model.train()
    score(plan_of(tasks_dir, tokenizer, limit=2), A, model)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.get_input_embeddings().weight, head)
    assert "tie_weights" not in vars(model)
    assert model.training


def test_tokenizer_of_the_caller_stays_as_it_was(tasks_dir: Path, tokenizer: Any) -> None:
    assert tokenizer.pad_token is None
    score(plan_of(tasks_dir, tokenizer, limit=2), A, tiny())
    assert tokenizer.pad_token is None


def test_a_second_configuration_in_the_same_process_gets_its_own_scores(tasks_dir: Path, tokenizer: Any) -> None:
    plan = plan_of(tasks_dir, tokenizer)
    first, other, again = (score(plan, A, tiny(seed))[1] for seed in (0, 1, 0))
    assert first == again
    assert first != other


# Plans


def test_a_known_plan_needs_neither_torch_nor_task_code(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    memo = tmp_path / "memo"
    known = build_plan(suite(chance={}), tmp_path / "tok", tasks_dir=tasks_dir, memo=memo)
    code = (
        "import sys; from pathlib import Path; from workbench.evaluate import build_plan; from workbench.scores.suite import Suite; "
        f"p = build_plan(Suite(suite='toy', tasks=('copy', 'pick')), Path({str(tmp_path / 'tok')!r}), tasks_dir=Path({str(tasks_dir)!r}), memo=Path({str(memo)!r})); "
        "print(p.digest, [m for m in ('torch', 'lm_eval.tasks', 'transformers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
    assert out[0] == known.digest
    assert out[1].strip() == "[]"


def test_one_byte_of_data_code_or_tokenizer_makes_another_plan_or_key(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")

    def place(dtype: str = "float32", batch_size: int = 4, **fields: Any) -> tuple[str, str]:
        plan = build_plan(suite(**fields), tmp_path / "tok", tasks_dir=tasks_dir, dtype=dtype, batch_size=batch_size)
        return plan.digest, A.key(plan)

    places = [place()]
    assert place(alpha=0.01, min_effect=0.1, description="analysis only") == places[0]
    for path, before, after in (
        ("data/copy.jsonl", b"Say aa0", b"Say aa1"),
        ("localdata.py", b"\n\n", b"\n"),
        ("copy.yaml", b"toks: 4", b"toks: 5"),
    ):
        text = (tasks_dir / path).read_bytes()
        assert before in text
        (tasks_dir / path).write_bytes(text.replace(before, after, 1))
        places.append(place())
    (tmp_path / "tok" / "chat_template.jinja").write_text("{{ messages }}")
    places += [place(), place(chat_template=True), place("bfloat16"), place(batch_size=8)]
    (tmp_path / "tok" / "chat_template.jinja").write_text("{{ messages[0] }}")
    plans = [place(chat_template=True)[0], *(plan for plan, _ in places)]
    assert len(set(places)) == len(places)
    assert len(set(plans)) == len(plans) - 1  # without a chat template, a tokenizer makes another key under one plan


def test_included_files_count(tasks_dir: Path, tokenizer: Any) -> None:
    (tasks_dir / "_common").write_text("test_split: test\n")
    (tasks_dir / "copy.yaml").write_text(GENERATE.replace("test_split: test", "include: _common"))
    before = plan_of(tasks_dir, tokenizer).digest
    (tasks_dir / "_common").write_text("test_split: test\n# another comment\n")
    assert plan_of(tasks_dir, tokenizer).digest == before
    (tasks_dir / "_common").write_text("test_split: test\ndescription: Say it.\n")
    assert plan_of(tasks_dir, tokenizer).digest != before


def test_tokenizer_digest_ignores_padding_state(tokenizer: Any) -> None:
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "bcd"], truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before


def test_limit_is_a_fixed_hashed_subset(tasks_dir: Path, tokenizer: Any) -> None:
    items = [Item(f"i{n}", "c") for n in range(100)]
    chosen = subset(items, 30)
    assert len(chosen) == 30
    assert chosen != tuple(items[:30])
    assert set(subset(items[::-1], 30)) == set(chosen)
    assert set(subset(items, 10)) < set(chosen)
    assert list(chosen) == sorted(chosen, key=items.index)

    plan = plan_of(tasks_dir, tokenizer, limit={"copy": 6})
    assert [len(plan.items[t]) for t in ("copy", "pick")] == [6, 24]
    assert not plan.partial
    _, rows = score(plan, A, tiny())
    assert [r["id"] for r in rows["copy"]] == [i.id for i in plan.items["copy"]]


def test_limit_from_the_command_line_is_partial(tasks_dir: Path, tokenizer: Any) -> None:
    whole, cut = (
        plan_of(tasks_dir, tokenizer),
        build_plan(suite(), tokenizer, tasks_dir=tasks_dir, dtype="float32", batch_size=4, limit=5),
    )
    assert cut.partial
    assert cut.digest != whole.digest
    roomy = build_plan(suite(), tokenizer, tasks_dir=tasks_dir, dtype="float32", batch_size=4, limit=500)
    assert not roomy.partial
    assert roomy.digest == whole.digest
    assert score(cut, A, tiny())[0].partial


def test_task_that_only_lm_eval_can_load(tasks_dir: Path, tokenizer: Any) -> None:
    (tasks_dir / "localdata.py").write_text(LOCALDATA + "\ndef last(docs):\n    return docs.select(range(4, len(docs)))\n")
    (tasks_dir / "pick.yaml").write_text(CHOICE + "process_docs: !function localdata.last\n")
    plan = plan_of(tasks_dir, tokenizer, limit={"pick": 5})
    assert plan.metrics["pick"] == ("acc", "acc_norm")
    assert not {"copy-000", "copy-001", "copy-002", "copy-003"} & {i.id for i in plan.items["pick"]}
    _, rows = score(plan, A, tiny())
    assert [r["id"] for r in rows["pick"]] == [i.id for i in plan.items["pick"]]


# Store


def counted(seed: int, calls: list[int]) -> Any:
    def materialize() -> Any:
        calls.append(seed)
        return tiny(seed)

    return materialize


def test_store_scores_once_and_records_aliases(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan, store, calls = plan_of(tasks_dir, tokenizer), ScoreStore(tmp_path / "scores"), list[int]()
    first = evaluate(plan, store, A, counted(0, calls))
    again = evaluate(plan, store, Configuration(A.digest, "twin", "average", ("x", "y")), counted(1, calls))
    assert calls == [0]
    assert again.tasks == first.tasks
    assert again.configuration.name == "twin"
    assert again.names == ["twin", "a"]
    assert store.read(plan, A.key(plan)).names == ["a", "twin"]
    evaluate(plan, store, A, counted(2, calls))
    assert store.read(plan, A.key(plan)).names == ["a", "twin"]

    evaluate(plan, store, Configuration("b" * 32, "b"), counted(1, calls))
    assert calls == [0, 1]
    assert [s.configuration.name for s in store.list(plan)] == ["a", "b"]
    folder = store.folder("toy", plan.digest)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [
            "plan.json",
            "items.jsonl.gz",
            "passed",
            *(f"{Configuration(c * 32, c).key(plan)[:12]}{end}" for c in "ab" for end in (".json", ".jsonl.gz")),
        ]
    )
    item = json.loads(gzip.decompress((folder / "items.jsonl.gz").read_bytes()).splitlines()[-1])
    assert item == {
        "task": "pick",
        "id": "copy-023",
        "cluster": "t7",
        "prompt": documents()[-1]["prompt"],
        "choices": documents()[-1]["choices"],
        "gold": 0,
    }


def test_changed_data_are_scored_anew(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    store, calls = ScoreStore(tmp_path / "scores"), list[int]()
    evaluate(plan_of(tasks_dir, tokenizer), store, A, counted(0, calls))
    docs = documents()
    docs[0]["answer"] += "x"
    write_data(tasks_dir, docs)
    evaluate(plan_of(tasks_dir, tokenizer), store, A, counted(0, calls))
    assert calls == [0, 0]


def test_interrupted_evaluation_scores_only_the_rest(
    tasks_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store, calls = plan_of(tasks_dir, tokenizer), ScoreStore(tmp_path / "scores"), list[int]()
    whole = evaluate(plan, ScoreStore(tmp_path / "other"), A, counted(0, calls))
    real, scored = Scorer.task, list[str]()

    def killed(self: Scorer, name: str, *rest: Any) -> dict[str, Any]:
        if name == "pick" and not scored.count("pick"):
            scored.append(name)
            raise KeyboardInterrupt
        scored.append(name)
        return real(self, name, *rest)

    monkeypatch.setattr(Scorer, "task", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, store, A, counted(0, calls))
    assert not store.has(plan, A.key(plan))
    scores = evaluate(plan, store, A, counted(0, calls))
    assert scored == ["copy", "pick", "pick"]
    assert {t: s.metrics for t, s in scores.tasks.items()} == {t: s.metrics for t, s in whole.tasks.items()}
    assert not list(store.folder("toy", plan.digest).glob("*.partial"))


def test_finished_tasks_need_no_model(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan, store, calls = plan_of(tasks_dir, tokenizer), ScoreStore(tmp_path / "scores"), list[int]()
    scorer = Scorer(plan, A, tiny())
    for task in plan.suite.tasks:
        store.keep_task(plan, A.key(plan), task, scorer.task(task))
    evaluate(plan, store, A, counted(0, calls))
    assert not calls
