"""`merge: null_space`: which tokens count, what the kept model does there, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.texts import save_other, words_tokenizer
from worlds.tiny import save_finetuned, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.merge.measuring import layers
from workbench.merge.null_space import _places, outside
from workbench.models.texts import TextRow, batches

TAGS = "[w40, w41]"
ROWS = [
    {"prompt": "w3 w4 w5", "completion": "w40 w6 w7 w41 w8"},
    {"prompt": "w9", "completion": "w40 w2 w41 w3 w1 w2 w4 w5"},
    {"prompt": "w1 w2", "completion": "w3 w4"},
]
STEP = f"merge: null_space, keep: one, calibration: rows.jsonl, tokens: {TAGS}, ridge: 1.0e-9"
BOTH = "bricks: {one: bricks/one, full: bricks/full}\n"


@pytest.fixture
def tagged(project: Project) -> Project:
    write_jsonl(project.path / "rows.jsonl", ROWS)
    return project


def inputs(model: object, tokens: list[int], places: list[int]) -> dict[str, Tensor]:
    """Linear layer -> its inputs [token, in] at some places."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: found.update({name: args[0][0, places].double()}))
        for name, module in model.named_modules()  # type: ignore[attr-defined]
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]))  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return found


def merged(project: Project, steps: str, bricks: str = BOTH) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a merge, and its directory."""
    place = Path(project.run(f"{bricks}steps: [{{{steps}}}]\noutput: {{dtype: float32}}\n")["model"])
    return {name: value.double() for name, value in tensors_of(place).items()}, place


def test_the_kept_model_writes_the_same_at_the_tags_and_the_others_write_elsewhere(tagged: Project) -> None:
    """Every linear layer on its inputs in the kept model: almost nothing of the other brick at the tags, most of it elsewhere."""
    found, _ = merged(tagged, STEP)
    total, _ = merged(tagged, "merge: task_arithmetic")
    kept, place = merged(tagged, "merge: task_arithmetic", "bricks: {one: bricks/one}\n")
    live, tokenizer = LlamaForCausalLM.from_pretrained(place), words_tokenizer(place)
    layers = 0
    for row in ROWS[:2]:
        tokens = tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"]
        words = tokenizer.convert_ids_to_tokens(tokens)
        tags = sorted({j for i, word in enumerate(words) if word in ("w40", "w41") for j in (i - 1, i)})
        others = [i for i in range(1, len(tokens)) if i not in tags]
        for name, x in inputs(live, tokens, [*tags, *others]).items():
            if (tensor := f"{name}.weight") not in kept or "layers" not in name:
                continue
            layers += 1
            left, whole = ((after[tensor] - kept[tensor]) @ x.T for after in (found, total))
            assert float(left[:, : len(tags)].norm()) < 1e-4 * float(whole[:, : len(tags)].norm()), name
            assert float(left[:, len(tags) :].norm()) > 0.1 * float(whole[:, len(tags) :].norm()), name
    assert layers == 2 * 28


def test_tokens_of_all_batches_count(tagged: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result whether the texts are one batch, or each is a batch of its own."""
    text = f"{BOTH}steps: [{{{STEP}}}]\n"
    together = tagged.tensors(text)
    shutil.rmtree(tagged.path / ".workbench")
    read: list[int] = []
    monkeypatch.setattr(layers, "batches", lambda rows, device: read.append(1) or batches(rows, device, limit=1))
    apart = tagged.tensors(text)
    assert read
    assert all(torch.allclose(together[name], apart[name], atol=1e-5) for name in together)


def test_what_is_no_linear_layer_is_that_of_the_kept_model(tagged: Project) -> None:
    base = tensors_of(tagged.path / "base")
    for keep, own in (("keep: one, ", "bricks/one"), ("", "base")):
        found, _ = merged(tagged, STEP.replace("keep: one, ", keep), "bricks: {full: bricks/full}\n" if not keep else BOTH)
        right, _ = merged(tagged, "merge: task_arithmetic", "bricks: {one: bricks/one}\n") if keep else (base, None)
        assert all(torch.equal(found[name], right[name].double()) for name in found if "norm" in name or "embed" in name), own


def test_the_projection_is_that_of_the_paper() -> None:
    """I − Xᵀ(XXᵀ)⁺X in the limit, and exactly ε(G + εI)⁻¹ beside it."""
    torch.manual_seed(0)
    x, delta = torch.randn(5, 12).double(), torch.randn(7, 12).double()
    projector = torch.eye(12).double() - x.T @ torch.linalg.pinv(x @ x.T) @ x
    torch.testing.assert_close(outside(delta, x, 1e-12), delta @ projector)
    for rows in (x, x.repeat(7, 1), torch.randn(40, 12).double()):  # fewer and more tokens than inputs
        gram = rows.T @ rows / len(rows)
        soft = torch.linalg.inv(torch.eye(12) + gram / (0.1 * gram.diagonal().mean()))
        torch.testing.assert_close(outside(delta, rows, 0.1), delta @ soft)
    assert torch.equal(outside(delta, torch.zeros(3, 12), 0.1), delta)


class Bytes:
    """A tokenizer of single characters, whose tokens inside a text are not those of a string alone: digraphs are one token."""

    PAIRS = ("<t", "k>", "</")

    def encode(self, text: str) -> list[str]:
        found, i = [], 0
        while i < len(text):
            size = 2 if text[i : i + 2] in self.PAIRS else 1
            found.append(text[i : i + size])
            i += size
        return found

    def decode(self, tokens: list[str], **_: object) -> str:
        return "".join(tokens)


@pytest.mark.parametrize(
    ("text", "strings", "chosen"),
    [
        ("a <t>b", ["<t>"], [" ", "<t", ">"]),
        ("<t>b", ["<t>"], ["<t", ">"]),
        ("ab</t></t>", ["</t>"], ["b", "</", "t", ">", "</", "t", ">"]),
        ("xk>y", [">"], ["x", "k>"]),
        ("a <t>b</t>", ["<t>", "</t>"], [" ", "<t", ">", "b", "</", "t", ">"]),
        ("none", ["<t>"], []),
    ],
)
def test_tokens_of_strings(text: str, strings: list[str], chosen: list[str]) -> None:
    tokens = Bytes().encode(text)
    assert [tokens[i] for i in _places(Bytes(), tokens, strings)] == chosen  # type: ignore[arg-type]


def test_counted_tokens_of_a_batch() -> None:
    rows = [TextRow([5, 6, 7], 1, (0, 2)), TextRow([8, 9], 1), TextRow([3, 4, 2, 1], 1, ())]
    (batch,) = batches(rows, CPU)
    assert batch.tokens.tolist() == [[8, 9, 0, 0], [5, 6, 7, 0], [3, 4, 2, 1]]
    assert batch.counted.long().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("keep: two", "'two' is none of the merged bricks (one, full)"),
        ("tokens: []", "tokens"),
        ("tokens: [w40, '']", "tokens"),
        ("ridge: 0", "ridge"),
        ("tokens: [w40, w47]", "rows.jsonl: none of 3 texts has 'w47'"),
    ],
)
def test_bad_fields_are_refused_before_any_work(fields: str, message: str, tagged: Project) -> None:
    key = fields.partition(":")[0]
    step = ", ".join(part for part in STEP.replace(TAGS, "[w40 w41]").split(", ") if not part.startswith(key))
    with pytest.raises(WorkbenchError) as caught:
        tagged.resolve(f"{BOTH}steps: [{{{step}, {fields}}}]\n")
    assert message in caught.value.message


def test_strings_that_are_cut_off_and_fused_experts_are_refused(tagged: Project, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"rows.jsonl: none of 3 texts has 'w4[01]' in its first 4 tokens"):
        tagged.run(f"{BOTH}steps: [{{{STEP}, max_length: 4}}]\n")
    other = tmp_path / "experts"
    (other / "recipes").mkdir(parents=True)
    (other / "base").symlink_to(save_other(tmp_path / "other", "mixtral"))
    save_finetuned(other / "base", other / "bricks" / "one", seed=0)
    write_jsonl(other / "rows.jsonl", ROWS)
    with pytest.raises(WorkbenchError, match="null_space: transformers fuses weights of mixtral, such as experts"):
        Project(other).run(f"bricks: {{one: bricks/one}}\nsteps: [{{{STEP}}}]\n")
