"""`brick transplant`: siblings of other depth and width, releases, other tokenizers, what is written, and bad input."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.commands import call, document, refused
from worlds.tiny import WORDS, edit_json, live, save_adapter, save_finetuned, save_model, tensors_of

from workbench.bricks.card import read_card


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of four layers with adapters, siblings of two layers and of other widths, a release, and texts."""
    folder = tmp_path_factory.mktemp("family")
    base = save_model(folder / "base", dtype=torch.float32)
    save_adapter(base, folder / "lora", seed=2)
    save_adapter(base, folder / "dora", seed=2, use_dora=True)
    save_finetuned(base, folder / "release", seed=1, scale=0.01)
    shutil.copyfile(base / "tokenizer_config.json", folder / "release" / "tokenizer_config.json")
    short = save_model(folder / "short", dtype=torch.float32, layers=2)
    taken = {name: t for name, t in tensors_of(base).items() if ".layers." not in name}
    for new, old in ((0, 0), (1, 2)):
        taken |= {n.replace(f".{old}.", f".{new}.", 1): t for n, t in tensors_of(base).items() if f".layers.{old}." in n}
    save_file(taken, short / "model.safetensors", metadata={"format": "pt"})
    widened(base, folder / "wide")
    save_model(folder / "gpt2", "gpt2", dtype=torch.float32)
    words = random.Random(0)
    rows = [{"text": " ".join(f"w{words.randrange(60)}" for _ in range(40))} for _ in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]), "utf-8")
    return folder


def widened(base: Path, out: Path) -> None:
    """A sibling with 64 neurons: those of the base in another order, and 16 that write nothing."""
    shutil.copytree(base, out)
    edit_json(out / "config.json", intermediate_size=64)
    tensors = tensors_of(base)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(64, generator=generator)
    for name, tensor in tensors.items():
        if ".mlp.down_proj." in name:
            tensors[name] = torch.cat([tensor, torch.zeros(32, 16)], 1)[:, order].contiguous()
        elif ".mlp." in name:
            tensors[name] = torch.cat([tensor, 0.2 * torch.randn(16, 32, generator=generator)])[order].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def carry(*arguments: object, texts: bool = False) -> dict[str, Any]:
    more = ("--texts", "texts.jsonl") if texts else ()
    return document("brick", "transplant", *map(str, arguments), *more, "--device", "cpu")  # type: ignore[no-any-return]


def deltas(folder: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Module -> B A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.model.").partition(".lora_A")[0]: scale
        * tensors[name.replace("lora_A", "lora_B")]
        @ tensors[name]
        for name in tensors
        if "lora_A" in name
    }


def test_skip_and_map(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the layers: layer j takes the delta of layer 2 j, or of the layers of the map."""
    monkeypatch.chdir(family)
    report = carry("lora", "--to", "short", "-o", tmp_path / "skip")
    old, new = deltas(family / "lora", 2.0), deltas(tmp_path / "skip")
    for name, delta in new.items():
        torch.testing.assert_close(delta, old[name.replace("layers.1", "layers.2")])
    assert (report["by"], report["layer_rule"], report["modules"], len(new)) == ("copy", "skip", 8, 8)
    assert {row["reason"] for row in report["not_carried"]} == {"no layer of the target takes its layer"}
    assert report["left_out"] == 8
    report = carry("lora", "--to", "short", "-o", tmp_path / "map", "--map", "1:3")
    torch.testing.assert_close(deltas(tmp_path / "map")["layers.1.mlp.down_proj"], old["layers.3.mlp.down_proj"])
    assert [(row["layer"], row["sources"], len(row["modules"])) for row in report["layers"]] == [(1, [3], 4)]


def test_other_widths_by_assignment(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons in another order beside new ones: the carried adapter computes what the original one does."""
    from peft import PeftModel

    monkeypatch.chdir(family)
    report = carry("lora", "--to", "wide", "-o", tmp_path / "out", "--by", "assign", texts=True)
    tokens = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(live(family / "base"), family / "lora").eval()(tokens).logits
        found = PeftModel.from_pretrained(live(family / "wide"), tmp_path / "out").eval()(tokens).logits
    assert (found - expected).abs().max() <= 1e-4
    assert report["match"]["above"]
    assert report["loss"]["after"] == pytest.approx(report["loss"]["source_with_brick"], abs=1e-5)


def test_losses_on_a_release(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of transformers and PEFT on the held-out texts; the adapter is written with card and report."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    monkeypatch.chdir(family)
    report = carry("lora", "--to", "release", "-o", tmp_path / "out", texts=True)
    lines = (family / "texts.jsonl").read_text("utf-8").splitlines()[4::5]
    tokenizer = AutoTokenizer.from_pretrained(family / "base")

    def loss(model: Any) -> float:
        total, count = 0.0, 0
        for line in lines:
            tokens = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
            with torch.no_grad():
                total += float(model(tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
            count += tokens.shape[1] - 1
        return total / count

    assert report["loss"]["before"] == pytest.approx(loss(live(family / "release")), abs=1e-4)
    carried = PeftModel.from_pretrained(live(family / "release"), tmp_path / "out").eval()
    assert report["loss"]["after"] == pytest.approx(loss(carried), abs=1e-4)
    own = PeftModel.from_pretrained(live(family / "base"), family / "lora").eval()
    assert report["loss"]["source_with_brick"] == pytest.approx(loss(own), abs=1e-4)
    assert report["loss"]["texts"] == 6
    assert json.loads((tmp_path / "out" / "transplant.json").read_text("utf-8"))["loss"] == report["loss"]
    card = read_card(tmp_path / "out")
    assert (card.kind, card.base.id, card.transplant["brick"], card.transplant["by"]) == ("adapter", "release", "lora", "copy")
    assert (card.transplant["base"], card.transplant["modules"]) == (report["from_base"], 16)
    shown = call("brick", "show", str(tmp_path / "out"), "--card").stdout
    assert f"carried  lora from {report['from_base']}, by copy, 16 modules" in shown
    assert "16 tensors fit release" in call("brick", "verify", str(tmp_path / "out"), "--base", "release").stdout


def test_another_tokenizer(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words with other ids: common positions are all of them."""
    target = tmp_path / "other"
    shutil.copytree(family / "base", target)
    order = [0, 1, *range(len(WORDS) - 1, 1, -1)]
    tokenizer = json.loads((target / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["vocab"] = {WORDS[old]: new for new, old in enumerate(order)}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    tensors = tensors_of(family / "base")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][order].contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(family)
    report = carry("lora", "--to", target, "-o", tmp_path / "out", "--by", "assign", texts=True)
    assert report["positions"]["share"] == 1
    assert report["match"]["matched"] == pytest.approx(1, abs=1e-3)
    assert report["loss"]["after"] == pytest.approx(report["loss"]["source_with_brick"], abs=1e-4)
    for name, delta in deltas(family / "lora", 2.0).items():
        assert deltas(tmp_path / "out")[name].shape == delta.shape


def test_weights_that_are_stored_transposed(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPT-2 with a trace of noise, the assignment is the identity: the carried adapter does what the old one does there."""
    from peft import PeftModel

    save_adapter(family / "gpt2", tmp_path / "lora", seed=2, family="gpt2")
    save_finetuned(family / "gpt2", tmp_path / "release", seed=1, scale=0.001)
    shutil.copyfile(family / "gpt2" / "tokenizer_config.json", tmp_path / "release" / "tokenizer_config.json")
    monkeypatch.chdir(family)
    report = carry(tmp_path / "lora", "--to", tmp_path / "release", "-o", tmp_path / "out", "--by", "assign", texts=True)
    tokens = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = live(tmp_path / "release")(tokens).logits
        old, new = (
            PeftModel.from_pretrained(live(tmp_path / "release"), tmp_path / n).eval()(tokens).logits for n in ("lora", "out")
        )
    assert (new - old).abs().max() <= 1e-4
    assert (old - plain).abs().max() > 0.1
    assert report["modules"] == 16


def test_what_is_printed(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    text = call("brick", "transplant", "lora", "--to", "short", "-o", str(tmp_path / "out"), "--device", "cpu").stdout
    assert "not carried: model.layers.1.mlp.down_proj and 7 more: no layer of the target takes its layer" in text
    assert "no texts: neither the match nor the loss was measured" in text
    assert "8 modules, rank 4, by copy" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lora", "--to", "base"), "--to base is the base of brick 'lora'"),
        (("lora", "--to", "lora"), "--to lora is an adapter, expected a model"),
        (("lora", "--to", "gone"), "--to: no such directory: gone"),
        (("release", "--to", "base"), "brick 'release' is a checkpoint, expected an adapter"),
        (("dora", "--to", "release"), "brick 'dora' has DoRA on "),
        (("lora", "--to", "release", "--on", "short"), "brick 'lora': module"),
        (("lora", "--to", "release", "--on", "wide"), "down_proj"),
        (("lora", "--to", "gpt2"), "no update of brick 'lora' has a counterpart in gpt2"),
        (("lora", "--to", "wide"), "the models have other widths (model.layers.0.mlp.down_proj.weight is [32, 64]"),
        (("lora", "--to", "wide", "--by", "copy"), "--by copy needs equal shapes"),
        (("lora", "--to", "wide", "--by", "ridge"), "--by ridge reads texts, and --texts is missing"),
        (("lora", "--to", "short", "--map", "2:0"), "--map 2:0: layer 2 of the target does not exist"),
        (("lora", "--to", "release", "--texts", "few.jsonl"), "few.jsonl: 3 texts, expected 10 or more"),
        (("lora", "--to", "release", "--texts", "gone.jsonl"), "gone.jsonl: no such file of texts"),
        (("lora", "--to", "release", "-o", "base"), "-o base: exists and is not an empty directory"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    out = () if "-o" in arguments else ("-o", "new")
    error = refused("brick", "transplant", *arguments, *out, "--device", "cpu")
    assert message in error.message
    assert error.hint
    assert not (family / "new").exists()


def test_an_adapter_of_another_base(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the same shapes that are not those on the card are refused, and taken with --force."""
    monkeypatch.chdir(family)
    carry("lora", "--to", "release", "-o", tmp_path / "carried")
    arguments = (str(tmp_path / "carried"), "--to", "base", "--on", "base2", "-o", str(tmp_path / "back"))
    save_finetuned(family / "base", family / "base2", seed=8, scale=0.3)
    error = refused("brick", "transplant", *arguments, "--device", "cpu")
    assert "was made on another base than base2" in error.message
    assert "--on MODEL" in str(error.hint)
    assert carry(*arguments, "--force")["forced"]


def test_a_mixture_of_experts(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forward updates have no counterpart in experts; --force carries the attention's alone."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixture")
    monkeypatch.chdir(family)
    arguments = ("lora", "--to", str(tmp_path / "mixture"), "-o", str(tmp_path / "out"))
    error = refused("brick", "transplant", *arguments, "--device", "cpu")
    assert "is a mixture of experts, and 4 modules that brick 'lora' updates have no counterpart there" in error.message
    report = carry(*arguments, "--force")
    assert {module.partition(".")[0] for row in report["layers"] for module in row["modules"]} == {"self_attn"}
    assert {row["reason"] for row in report["not_carried"]} == {"the target has no module of this name"}
