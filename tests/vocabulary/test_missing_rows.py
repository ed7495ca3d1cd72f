"""The tokenizer of another model, and rows of tokens that the base lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from worlds.fuzzing import fuzz_reader
from worlds.project import Project
from worlds.tiny import config, tensors_of
from worlds.token_words import BASE, EMBED, HEAD, save_llama, save_random, tensors_in_memory

from workbench.ground.errors import WorkbenchError
from workbench.vocabulary.aligned import pursue
from workbench.vocabulary.tokens import _byte_level, read_tokens, shared_rows, spelling

NEW = [f"n{i}" for i in range(40)]
WORDS = [*NEW[:20], "<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(0, 260, 2)), *NEW[20:]]
"""The donor's words: half of the base's in another order, and forty of its own."""
EMBED_OF, HEAD_OF = "gpt_neox.embed_in.weight", "embed_out.weight"
BLOCK = "bricks: {donor: donor}\ntokenizer: {source: donor, missing: %s}\n"


def planted(generator: torch.Generator, tensor: Tensor) -> dict[int, dict[int, float]]:
    """Replace each new word's row by a combination of three shared words' rows: row -> {row: coefficient}."""
    shared = [i for i, word in enumerate(WORDS) if word in BASE]
    found = {}
    for row in (i for i, word in enumerate(WORDS) if word not in BASE):
        picked = [shared[int(i)] for i in torch.randperm(len(shared), generator=generator)[:3]]
        signs = torch.randint(0, 2, (3,), generator=generator) * 2.0 - 1
        values = signs * (torch.rand(3, generator=generator) + 1)
        found[row] = dict(zip(picked, values.tolist(), strict=True))
        tensor[row] = sum(value * tensor[i] for i, value in found[row].items())  # type: ignore[assignment]
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, dict[int, float]]]]:
    """A llama, a wider GPT-NeoX with other words whose rows are planted, and what was planted in embeddings and head."""
    from safetensors.torch import save_file

    top = tmp_path_factory.mktemp("missing")
    save_llama(top / "base", BASE)
    settings = config("gpt_neox")
    settings.hidden_size, settings.num_attention_heads = 128, 4
    save_random(top / "donor", settings, WORDS)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(top / "donor").items()}
    generator = torch.Generator().manual_seed(3)
    plans = {}
    for name in (EMBED_OF, HEAD_OF):
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
        plans[name] = planted(generator, tensors[name])
    save_file(tensors, top / "donor" / "model.safetensors", metadata={"format": "pt"})
    return top, plans


@pytest.fixture
def project(tmp_path: Path, worlds: tuple[Path, Any]) -> Project:
    return Project.of(tmp_path, worlds[0])


def test_rows_are_the_planted_combinations(project: Project, worlds: tuple[Path, Any]) -> None:
    """New rows are the same combinations of the base's rows; shared words keep their rows; all else stays."""
    top, plans = worlds
    resolved = project.resolve("base: base\n" + BLOCK % "omp, k: 3")
    ours, base = tensors_in_memory(resolved), tensors_of(top / "base")
    assert read_tokens(resolved.tokenizer_path, "ours").ids == {word: i for i, word in enumerate(WORDS)}
    for name, source in ((EMBED, EMBED_OF), (HEAD, HEAD_OF)):
        rows = [BASE.index(word) if word in BASE else -1 for word in WORDS]
        for row, word in enumerate(WORDS):
            wanted = (
                base[name][rows[row]]
                if word in BASE
                else sum(value * base[name][rows[i]] for i, value in plans[source][row].items())
            )
            assert torch.allclose(ours[name][row], wanted, atol=1e-5), (name, word)
    others = set(base) - {EMBED, HEAD}
    assert others
    assert all(torch.equal(ours[name], base[name]) for name in others)
    described = resolved.vocabulary.describe() if resolved.vocabulary else {}
    assert described["missing"] == "omp"
    assert (described["shared"], described["made"], described["rows"]) == (133, 40, 173)
    assert max(described["residual"].values()) < 1e-3
    assert resolved.vocabulary.memory() == 2 * 4 * 173 * 128 + sum(4 * base[name].numel() for name in (EMBED, HEAD))


def test_made_rows_are_computed_once_and_load(project: Project) -> None:
    """The cache of one `k` is not read for another one."""
    unexplained = []
    for k in (3, 1):
        resolved = project.resolve("base: base\n" + BLOCK % f"omp, k: {k}")
        tensors_in_memory(resolved)
        assert resolved.vocabulary is not None
        unexplained.append(resolved.vocabulary.describe()["residual"][EMBED])
    assert unexplained[0] < 1e-3 < 0.1 < unexplained[1]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    events: list[dict[str, Any]] = []
    project.run("base: base\n" + BLOCK % "omp, k: 3", events=events.append)
    assert [event["text"] for event in events if event["stage"] == "rows"] == [
        "133 rows carried over, 40 made of up to 3 of them; combinations leave 0%, 0% of the length of the brick's rows unexplained"
    ]
    (place,) = (project.path / "runs").glob("*/model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    assert model.get_input_embeddings().weight.shape[0] == len(WORDS) == len(tokenizer)
    assert model.config.eos_token_id == WORDS.index("<eos>") == tokenizer.eos_token_id
    found = json.loads((place.parent / "run.json").read_text("utf-8"))["tokenizer"]
    assert "| tokenizer | donor |" in (place / "README.md").read_text("utf-8")
    assert (found["missing"], found["made"], found["shared"]) == ("omp", 40, 133)
    assert set(found["residual"]) == {EMBED, HEAD}


def test_mean_zero_and_merges_of_made_rows(project: Project, worlds: tuple[Path, Any]) -> None:
    base = tensors_of(worlds[0] / "base")
    shared = torch.tensor([BASE.index(word) for word in WORDS if word in BASE])
    for rule in ("mean", "zero"):
        ours = tensors_in_memory(project.resolve("base: base\n" + BLOCK % rule))
        for name in (EMBED, HEAD):
            wanted = base[name][shared].double().mean(0).float() if rule == "mean" else torch.zeros(base[name].shape[1])
            for word in NEW:
                assert torch.allclose(ours[name][WORDS.index(word)], wanted, atol=1e-6), (rule, word)
    # A brick of the base's vocabulary has no delta in rows of tokens that it lacks.
    from worlds.token_words import save_tuned

    save_tuned(worlds[0] / "base", project.path / "tuned", BASE, BASE, seed=5)
    text = "base: base\nbricks: {donor: donor, tuned: tuned}\ntokenizer: {source: donor, missing: omp, k: 3}\nsteps: [%s]\n"
    plain = tensors_in_memory(project.resolve(text % ""))
    merged = tensors_in_memory(project.resolve(text % "{merge: task_arithmetic}"))
    tuned = tensors_of(project.path / "tuned")
    made = [i for i, word in enumerate(WORDS) if word not in BASE]
    assert torch.equal(merged[EMBED][made], plain[EMBED][made])
    assert torch.allclose(merged[EMBED][WORDS.index("w4")], tuned[EMBED][BASE.index("w4")], atol=1e-6)


def test_the_key_follows_the_donor(project: Project, worlds: tuple[Path, Any], tmp_path: Path) -> None:
    """Another row of the donor is another configuration, also where the tokenizers are equal."""
    import shutil

    from safetensors.torch import save_file

    before = project.resolve("base: base\n" + BLOCK % "omp, k: 3").key
    assert project.resolve("base: base\n" + BLOCK % "omp, k: 4").key != before
    (tmp_path / "donor").unlink()
    shutil.copytree(worlds[0] / "donor", tmp_path / "donor")
    tensors = {name: tensor.clone() for name, tensor in tensors_of(tmp_path / "donor").items()}
    tensors[EMBED_OF][0, 0] += 1
    save_file(tensors, tmp_path / "donor" / "model.safetensors", metadata={"format": "pt"})
    assert project.resolve("base: base\n" + BLOCK % "omp, k: 3").key != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bricks: {donor: donor}\ntokenizer: {source: base, missing: omp}\n", "`missing` needs a brick as `source`"),
        ("bricks: {donor: donor}\ntokenizer: {source: donor, missing: mean, k: 8}\n", "`k` is for `missing: omp`"),
        ("bricks: {donor: donor}\ntokenizer: {source: donor, missing: least}\n", "'omp', 'mean' or 'zero'"),
        (
            "bricks: {donor: donor}\ntokenizer: {source: donor, missing: omp}\nsteps: [{merge: task_arithmetic, bricks: [donor]}]\n",
            "uses 'donor' too",
        ),
        ("bricks: {donor: donor}\ntokenizer: {source: donor, missing: omp, k: 134}\n", "share 133 tokens"),
        ("bricks: {donor: donor}\ntokenizer: {source: donor}\n", "lm_head.weight has no rows"),
    ],
)
def test_bad_input(text: str, message: str, project: Project) -> None:
    with pytest.raises(WorkbenchError, match=message):
        project.resolve(f"base: base\n{text}")


@given(data=st.data())
@fuzz_reader
def test_pursuit_is_scikit_learns(data: st.DataObject) -> None:
    """Each round takes the atom with the largest cosine, and the sum is the least-squares one in float64; where no two atoms are about as
    good, these are scikit-learn's atoms and coefficients. Float32 rounds by 2⁻²⁴, which alike atoms multiply by their condition."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    width, count, k = (data.draw(st.integers(1, most)) for most in (24, 60, 16))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    alike = data.draw(st.sampled_from((0.0, 0.9, 0.9999)))
    noise = (1 - alike**2) ** 0.5 * torch.randn(count, width, generator=generator)
    atoms = (alike * torch.randn(1, width, generator=generator) + noise) * (0.1 + torch.rand(count, 1, generator=generator))
    atoms[data.draw(st.lists(st.integers(0, count - 1), max_size=2))] = 0
    targets = torch.randn(3, width, generator=generator) + alike * atoms[:1]
    found = pursue(targets, atoms, k)
    lengths = np.linalg.norm(atoms.double().numpy(), axis=1)
    unit = atoms.double().numpy() / np.maximum(lengths, 1e-30)[:, None]
    for row, target in enumerate(targets.double().numpy()):
        rest, taken, clear = target, list[int](), True
        for atom in found.atoms[row].tolist():
            likeness = np.abs(unit @ rest)
            best = np.sort(likeness)[::-1]
            if best[0] <= 1e-4 * np.linalg.norm(target):
                break
            assert likeness[atom] >= best[0] - 1e-4 * np.linalg.norm(target)
            clear &= len(best) < 2 or best[0] - best[1] > 1e-4 * np.linalg.norm(target)
            taken.append(atom)
            fitted, *_ = np.linalg.lstsq(unit[taken].T, target, rcond=None)
            rest = target - fitted @ unit[taken]
        if not taken:
            continue
        condition, ours = np.linalg.cond(unit[taken]), np.zeros(count)
        same = pursue(targets[row : row + 1], atoms, len(taken))  # what follows fits what rounding has left
        np.add.at(ours, same.atoms[0].numpy(), same.coefficients[0].double().numpy())
        size = np.linalg.norm(target)
        assert np.linalg.norm(ours @ atoms.double().numpy() - (target - rest)) <= 2.0**-20 * condition * size
        assert abs(float(same.residuals[0]) - np.linalg.norm(rest) / size) <= 2.0**-18 * condition
        if clear and condition < 1e3:
            theirs = linear_model.orthogonal_mp(unit.T, target, n_nonzero_coefs=len(taken))
            assert np.abs(ours * lengths - theirs).max() <= 2.0**-20 * condition**2 * size


def test_pursuit_of_empty_and_equal_atoms() -> None:
    """Atoms twice, of length 0, and fewer directions than rounds: coefficients stay finite and the sum is right."""
    atoms = torch.tensor([[0.0, 0, 0], [2, 0, 0], [2, 0, 0], [0, 5, 0]])
    found = pursue(torch.tensor([[3.0, 4, 0], [0, 0, 0], [0, 0, 7]]), atoms, 3)
    sums = torch.einsum("nk,nkd->nd", found.coefficients, atoms[found.atoms])
    assert torch.allclose(sums, torch.tensor([[3.0, 4, 0], [0, 0, 0], [0, 0, 0]]))
    assert found.residuals.tolist() == [0, 0, 1]
    assert len(pursue(torch.zeros(0, 3), atoms, 2).atoms) == 0


def written(out: Path, words: list[str], kind: str) -> Path:
    """A tokenizer of a convention, with its first word as a special token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(words)}
    if kind == "pieces":
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token=words[0]))
    else:
        tokenizer = Tokenizer(models.BPE(ids, [], byte_fallback=kind == "sentences"))
    if kind == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(words[0], special=True)])
    out.mkdir()
    tokenizer.save(str(out / "tokenizer.json"))
    return out


WRITTEN = {
    "bytes": ["<s>", "Ġthe", "é", "Ċ", "the", "Ã©", "ing"],  # "é" is the byte E9; the letter has two bytes
    "sentences": ["<s>", "<0x0A>", "<0x41>", "A", "▁the", "é", "the"],
    "pieces": ["<s>", "the", "##the", "##ing", "é"],
}


@pytest.mark.parametrize(
    ("own", "other", "shared"),
    [
        ("bytes", "sentences", {"<s>": "<s>", "<0x0A>": "Ċ", "▁the": "Ġthe", "é": "Ã©", "the": "the"}),
        ("sentences", "bytes", {"<s>": "<s>", "Ġthe": "▁the", "Ċ": "<0x0A>", "the": "the", "Ã©": "é"}),
        ("bytes", "pieces", {"<s>": "<s>", "the": "Ġthe", "##the": "the", "##ing": "ing"}),
        ("sentences", "sentences", {word: word for word in WRITTEN["sentences"]}),
    ],
)
def test_tokens_are_shared_by_the_text_they_stand_for(own: str, other: str, shared: dict[str, str], tmp_path: Path) -> None:
    """Tokenizers of other conventions do not share equal strings with other texts, and share other strings with one text."""
    places = [written(tmp_path / f"{i}", WRITTEN[name], name) for i, name in enumerate((own, other))]
    tokens = [read_tokens(place, place.name) for place in places]
    spell = [spelling(place, place.name) for place in places]
    assert shared_rows(tokens[0], spell[0], tokens[1], spell[1]) == {t: tokens[0].ids[mine] for t, mine in shared.items()}


def test_byte_level_tokens_are_those_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert {character: bytes([byte]) for byte, character in bytes_to_unicode().items()} == {
        character: _byte_level(character) for character in bytes_to_unicode().values()
    }
    assert _byte_level("€") is None
