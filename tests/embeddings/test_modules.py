"""Merges of sentence-transformers models: what the library loads of them, and what bricks may have otherwise than the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.commands import document
from worlds.encoders import SIZE, sentence_encoder
from worlds.project import Project
from worlds.tiny import edit_json, tensors_of

from workbench.bricks.hub import _required_files
from workbench.embeddings.modules import compare_modules
from workbench.ground.errors import WorkbenchError
from workbench.models.sentences import module_files, pooling_modes

MERGE = "base: {}\nbricks: {{a: a, b: b}}\nsteps: [{{merge: average, bricks: [a, b]}}]\n"
FAMILIES = ["bert", "mpnet", "xlm-roberta", "qwen3"]
TEXTS = ["the of", "a", "translate this , please"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with the encoder base/, and its fine-tunes a/ and b/."""
    (tmp_path / "recipes").mkdir()
    sentence_encoder(tmp_path / "base")
    for seed, name in enumerate("ab"):
        tuned(tmp_path / "base", tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def tuned(base: Path, folder: Path, seed: int, weights: str = "model.safetensors") -> Path:
    """Write a copy whose transformer has other weights."""
    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(seed)
    changed = {n: t + 0.02 * torch.randn(t.shape, generator=noise) for n, t in load_file(folder / weights).items()}
    save_file(changed, folder / weights, metadata={"format": "pt"})
    return folder


def add_dense(folder: Path, seed: int = 0) -> None:
    """Add a dense layer with the files and the names of the library's `Dense.save`."""
    noise = torch.Generator().manual_seed(seed)
    (folder / "2_Dense").mkdir()
    layer = {"linear.weight": torch.randn(8, SIZE, generator=noise), "linear.bias": torch.zeros(8)}
    save_file(layer, folder / "2_Dense" / "model.safetensors")
    config = {"in_features": SIZE, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    rows = json.loads((folder / "modules.json").read_text())[:2]
    rows.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(rows))


def nest(folder: Path) -> None:
    """Move the transformer to `0_Transformer`, where releases before 2.0 saved it."""
    (folder / "0_Transformer").mkdir()
    for file in [file for file in folder.iterdir() if file.is_file() and file.name != "modules.json"]:
        file.rename(folder / "0_Transformer" / file.name)
    rows = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**rows[0], "path": "0_Transformer"}, *rows[1:]]))


def embeddings(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Return what the library makes of texts, perhaps with other weights in the transformer."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu")
    if tensors is not None:
        own = model[0].auto_model
        missing, unexpected = own.load_state_dict(tensors, strict=False)
        assert (missing, unexpected) == ([], [])
    found: torch.Tensor = model.encode(TEXTS, convert_to_tensor=True)
    return found


def mean(first: Path, second: Path) -> dict[str, torch.Tensor]:
    """Return the mean of two files, tensor by tensor."""
    mine, theirs = load_file(first), load_file(second)
    return {name: (mine[name].double() + theirs[name].double()).div(2).float() for name in mine}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_loads_a_merge(family: str, place: Project) -> None:
    """Embeddings equal those of a merge by hand, with a dense layer that base and bricks share."""
    for name in "ab":
        shutil.rmtree(place.path / name)
    shutil.rmtree(place.path / "base")
    base = sentence_encoder(place.path / "base", "lasttoken" if family == "qwen3" else "cls_token", family)
    add_dense(base)
    (base / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "a "}, "similarity_fn_name": "dot"}))
    for seed, name in enumerate("ab"):
        tuned(base, place.path / name, seed)
    done = place.run(MERGE.format("base"))
    model = Path(done["model"])
    assert [warning for warning in done["warnings"] if "sentence-transformers" in warning] == []
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/config.json"):
        assert (model / name).read_bytes() == (base / name).read_bytes()
    assert 'SentenceTransformer("DIRECTORY")' in (model / "README.md").read_text()
    want = mean(place.path / "a" / "model.safetensors", place.path / "b" / "model.safetensors")
    torch.testing.assert_close(embeddings(model), embeddings(base, want), rtol=0, atol=1e-6)
    assert (embeddings(model) - embeddings(base)).abs().max() > 1e-4


def test_a_transformer_in_a_folder_of_its_own(place: Project) -> None:
    """The old layout is read, and the result has the new one."""
    want = mean(place.path / "a" / "model.safetensors", place.path / "b" / "model.safetensors")
    for name in ("base", "a", "b"):
        (place.path / name / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
        nest(place.path / name)
    done = place.run(MERGE.format("base"))
    model = Path(done["model"])
    assert [row["path"] for row in json.loads((model / "modules.json").read_text())] == ["", "1_Pooling", "2_Normalize"]
    assert json.loads((model / "sentence_bert_config.json").read_text()) == {"max_seq_length": 7}
    for name, tensor in tensors_of(model).items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-7)
    assert "| brick `a` | a |" in (model / "README.md").read_text()
    assert document("open", "base")["kind"] == "checkpoint"
    torch.testing.assert_close(embeddings(model), embeddings(place.path / "base", want), rtol=0, atol=1e-6)


def test_old_and_new_names_of_one_pooling(place: Project) -> None:
    pooling = {"embedding_dimension": SIZE, "pooling_mode": "mean", "include_prompt": True}
    (place.path / "a" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (place.path / "a" / "2_Normalize").mkdir()
    (place.path / "a" / "2_Normalize" / "config.json").write_text(json.dumps({"module_input_name": "sentence_embedding"}))
    prompts = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (place.path / "a" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert compare_modules("brick 'a'", place.path / "a", place.path / "base") == []
    assert pooling_modes({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_lasttoken": True}) == [
        "lasttoken",
        "mean_sqrt_len_tokens",
    ]


def unlike_pooling(folder: Path) -> None:
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)


def without_normalize(folder: Path) -> None:
    rows = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(rows[:2]))


def with_prompts(folder: Path) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))


def without_prompt(folder: Path) -> None:
    edit_json(folder / "1_Pooling" / "config.json", include_prompt=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unlike_pooling, "Pooling pooling ['cls'] (base: ['mean'])"),
        (without_normalize, "modules Transformer + Pooling (base: Transformer + Pooling + Normalize)"),
        (with_prompts, "prompts {'query': 'query: '} (base: None)"),
        (without_prompt, "Pooling include_prompt False (base: True)"),
    ],
)
def test_a_brick_that_is_pooled_in_another_way(change: Callable[[Path], None], said: str, place: Project) -> None:
    """`plan` and the record say it."""
    change(place.path / "b")
    text = f"brick 'b': sentence-transformers reads it with {said}; the result has the base's"
    planned = document("plan", str(place.write(MERGE.format("base"))))
    assert [warning for warning in planned["warnings"] if "sentence-transformers" in warning] == [text]
    assert text in place.run(MERGE.format("base"))["warnings"]


def test_a_base_of_another_library(place: Project) -> None:
    """Modules that the result cannot have are named."""
    for name in ("modules.json", "1_Pooling"):
        file = place.path / "base" / name
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (warning,) = [
        warning for warning in place.run(MERGE.format("base"))["warnings"] if warning.startswith("brick 'a': the base is no")
    ]
    assert "the brick's modules are Transformer + Pooling + Normalize" in warning


def test_a_dense_layer_that_was_trained_is_refused(place: Project) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        add_dense(place.path / name, seed=seed // 2)
    with pytest.raises(WorkbenchError, match=r"brick 'b': 2_Dense \(Dense\) has other weights than the base's") as caught:
        place.resolve(MERGE.format("base"))
    assert "brick 'a'" not in caught.value.message


def test_other_pooling_of_the_base_is_another_run(place: Project) -> None:
    first = place.resolve(MERGE.format("base")).run_key
    unlike_pooling(place.path / "base")
    assert place.resolve(MERGE.format("base")).run_key != first


def test_modules_take_states_of_one_size(place: Project) -> None:
    """Steps that change the number of channels are refused, because pooling and dense layers are the base's; more layers are not."""
    sentence_encoder(place.path / "decoder", "lasttoken", "qwen3")
    with pytest.raises(WorkbenchError, match="take hidden_size 16, the result has 24"):
        place.run("base: decoder\nsteps: [{grow: width, hidden: 24}]\n")
    model = Path(place.run("base: decoder\nsteps: [{grow: depth, blocks: 1}]\n")["model"])
    assert embeddings(model).shape == (len(TEXTS), SIZE)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"path": "../secret", "type": "x.Transformer"}], "names a folder outside its own"),
        (
            [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}],
            "names 1_Pooling, which is missing",
        ),
        ([{"path": "", "type": "x.StaticEmbedding"}], "the first module is StaticEmbedding, expected Transformer"),
        ({"path": ""}, "expected a list of modules"),
    ],
)
def test_a_damaged_list(rows: Any, said: str, place: Project) -> None:
    shutil.rmtree(place.path / "base" / "1_Pooling")
    (place.path / "base" / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(WorkbenchError, match=said):
        place.run(MERGE.format("base"))


def test_files_of_a_repository(place: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of the modules are downloaded, and no copies of the weights for other runtimes.

    The names are those of google/embeddinggemma-300m and sentence-transformers/all-MiniLM-L6-v2 on the hub.
    """
    from workbench.bricks.header_folders import Repository

    names = ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/config.json"]
    names += ["2_Dense/model.safetensors", "sentence_bert_config.json", "config_sentence_transformers.json", "tokenizer.json"]
    others = ["onnx/model.onnx", "openvino/openvino_model.bin", "pytorch_model.bin", "data_config.json", "rust_model.ot"]
    add_dense(place.path / "base")
    monkeypatch.setattr("workbench.bricks.hub.small_file", lambda repository, file: place.path / "base" / file)
    small, weights = _required_files(Repository("org/name", "0" * 40, dict.fromkeys([*names, *others], 1)), "base")
    assert {*small, *weights} == {*names}
    nested = [f"0_Transformer/{name}" if "_" not in name and name != "modules.json" else name for name in names]
    nest(place.path / "base")
    small, weights = _required_files(Repository("org/name", "0" * 40, dict.fromkeys([*nested, *others], 1)), "base")
    assert {*small, *weights} == {*nested}
    assert weights == ["0_Transformer/model.safetensors"]
    assert "1_Pooling/config.json" in module_files(place.path / "base" / "0_Transformer")
