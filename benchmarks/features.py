"""Features beside neurons, measured: a small sparse autoencoder and a small transcoder of the starter base, and what they tell apart.

    python benchmarks/features.py
    python benchmarks/features.py --layers 9 15 21 --data functions.jsonl

For each layer, a TopK autoencoder of the residual stream behind the layer and a TopK transcoder of its feed-forward part are trained on texts of
this repository (docs, source, task files; never on --data), saved in the layouts of SAELens and sparsify, read again, and compared
with the layer's neurons on labelled texts. The dictionaries are small and trained on few tokens of one kind: the results say how much variance
they explain on held-out texts of that kind, beside as many singular directions as they keep features, and on the labelled texts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from record import parser_of, write_results
from torch import Tensor

from workbench.activations.labelled import read_labelled
from workbench.models.hooks import Stopped
from workbench.neurons.dictionary import Dictionary, read_dictionary
from workbench.neurons.features import compare_features
from workbench.neurons.sparse_coder import Place, seeing
from workbench.neurons.subject import NeuronSubject, open_neurons
from workbench.run.opened import resolve_model
from workbench.weights.header import save_tensors

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
DATA = PROJECT / "evals" / "abilities.jsonl"
LENGTH, ROWS, BATCH = 128, 8, 1024  # tokens of a text, texts of a forward pass, tokens of a step
HELD_OUT = 0.1
RATE, DEAD_AFTER, AUXILIARY = 2e-3, 20_000, 64  # learning rate; tokens without activation; features that learn what is missed
Kind = Literal["autoencoder", "transcoder"]
READS: dict[Kind, tuple[Place, Place]] = {"autoencoder": ("resid_post", "resid_post"), "transcoder": ("mlp_in", "mlp_out")}


def main() -> None:
    """Train, save, read and compare the dictionaries of each layer, and write the results file."""
    parser = parser_of(__doc__, "features")
    parser.add_argument("--data", type=Path, default=DATA, help="labelled texts")
    parser.add_argument("--layers", type=int, nargs="+", default=[15], help="layers of the model")
    parser.add_argument("--tokens", type=int, default=80_000, help="tokens of training and of the held-out part")
    parser.add_argument("--epochs", type=int, default=5, help="passes over these tokens")
    parser.add_argument("--features", type=int, default=4096, help="features of a dictionary")
    parser.add_argument("--k", type=int, default=32, help="features that a token keeps")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and comparison")
    given = parser.parse_args()
    torch.set_num_threads(1)
    subject = open_neurons(replace(resolve_model(str(BASE), PROJECT), name="starter base"), torch.device("cpu"))
    texts, tokens = read_labelled(given.data, given.data.name), corpus(subject, given.tokens, given.data)
    found: list[dict[str, Any]] = []
    for layer in given.layers:
        started = time.perf_counter()
        states = activations(subject, layer, tokens)
        seconds = {"activations": round(time.perf_counter() - started, 1)}
        for kind, (reads, writes) in READS.items():
            started = time.perf_counter()
            x, y = states[reads], states[writes]
            split = int(len(x) * (1 - HELD_OUT))
            trained = train(kind, x[:split], y[:split], given)
            seconds["training"] = round(time.perf_counter() - started, 1)
            with TemporaryDirectory() as place:
                folder = trained.save(Path(place), kind, layer)
                dictionary = read_dictionary(folder)
            quality = judged(dictionary, x[split:], y[split:], largest(y[:split], given.k))
            started = time.perf_counter()
            result = compare_features(subject, texts, replace(dictionary, name=folder.name), given.seed).to_dict()
            seconds["comparison"] = round(time.perf_counter() - started, 1)
            record = {
                "kind": kind,
                "layer": layer,
                "features": given.features,
                "k": given.k,
                "tokens": split,
                "epochs": given.epochs,
                **quality,
                "dead": trained.dead,
                "seconds": dict(seconds),
            }
            found.append({"dictionary": record, "result": result})
            print(kind, layer, json.dumps(record), json.dumps(result["summary"]))
    write_results(given.out, {"dictionaries": found})


def corpus(subject: NeuronSubject, count: int, data: Path) -> Tensor:
    """Return texts of the repository in a random order [texts, LENGTH]."""
    files = [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), *(PROJECT / "workbench").rglob("*.py")]
    files += [path for path in (PROJECT / "evals").rglob("*.jsonl") if path.resolve() not in (DATA, data.resolve())]
    rows: list[list[int]] = []
    for path in sorted(files):
        ids = subject.tokenizer(path.read_text("utf-8"), add_special_tokens=False)["input_ids"]
        rows += [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return torch.tensor(rows)[order][: count // LENGTH]


@torch.no_grad()
def activations(subject: NeuronSubject, layer: int, tokens: Tensor) -> dict[Place, Tensor]:
    """Return the activations at all places of a layer in float16, without first tokens [tokens, hidden]; later layers do not run."""
    site = next(site for site in subject.sites if site.layer == layer)
    places: tuple[Place, ...] = ("resid_post", "mlp_in", "mlp_out")
    states: dict[Place, list[Tensor]] = {place: [] for place in places}

    def see(place: Place, x: Tensor) -> None:
        states[place].append(x[:, 1:].reshape(-1, x.shape[-1]).half())
        if place == "resid_post":
            raise Stopped

    with seeing(subject.model, subject.config, site, places, see):
        for rows in torch.split(tokens, ROWS):
            try:
                subject.model.base_model(input_ids=rows, use_cache=False)
            except Stopped:
                continue
    return {place: torch.cat(parts) for place, parts in states.items()}


@dataclass
class Trained:
    """A dictionary in the model's units: f = topk(W_enc (x − b_dec if it is an autoencoder) + b_enc), y = f W_dec + b_dec."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    offset: Tensor
    k: int
    dead: float

    def save(self, place: Path, kind: Kind, layer: int) -> Path:
        """Save an autoencoder in SAELens' layout and a transcoder in sparsify's; return its folder."""
        features, width = self.encoder.shape
        if kind == "autoencoder":
            folder, file = place / f"blocks.{layer}.hook_resid_post", "sae_weights.safetensors"
            tensors = {"W_enc": self.encoder.T, "b_enc": self.bias, "W_dec": self.decoder, "b_dec": self.offset}
            metadata = {"sae_lens_version": "6.54.12", "model_name": "starter base", "hook_name": folder.name}
            config = {
                "architecture": "topk",
                "d_in": width,
                "d_sae": features,
                "k": self.k,
                "dtype": "float32",
                "device": "cpu",
                "apply_b_dec_to_input": True,
                "normalize_activations": "none",
                "reshape_activations": "none",
                "rescale_acts_by_decoder_norm": False,
                "metadata": metadata,
            }
        else:
            folder, file = place / f"layers.{layer}.mlp", "sae.safetensors"
            tensors = {"encoder.weight": self.encoder, "encoder.bias": self.bias, "W_dec": self.decoder, "b_dec": self.offset}
            config = {
                "activation": "topk",
                "expansion_factor": 32,
                "normalize_decoder": False,
                "num_latents": features,
                "k": self.k,
                "multi_topk": False,
                "skip_connection": False,
                "transcode": True,
                "d_in": width,
            }
        save_tensors({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / file)
        (folder / "cfg.json").write_text(json.dumps(config), "utf-8")
        return folder


def train(kind: Kind, x: Tensor, y: Tensor, given: Any) -> Trained:
    """Train on activations in units of their mean norm / √width, with an auxiliary loss for dead features (Gao et al. 2024).

    Args:
        kind: Whether y is x.
        x: Inputs [tokens, hidden].
        y: Outputs [tokens, hidden].
        given: The options epochs, features, k and seed.
    """
    draw = torch.Generator().manual_seed(given.seed)
    width, count = x.shape[1], given.features
    units = [float(v.float().norm(dim=1).mean()) / width**0.5 for v in (x, y)]
    rows = torch.randn(count, width, generator=draw)
    rows /= rows.norm(dim=1, keepdim=True)
    parameters = [
        rows.clone(),
        torch.zeros(count),
        rows.clone() if kind == "autoencoder" else rows * 0,
        (y.float() / units[1]).mean(0),
    ]
    encoder, bias, decoder, offset = (p.requires_grad_() for p in parameters)
    steps, quiet = given.epochs * (len(x) // BATCH), torch.zeros(count, dtype=torch.long)
    optimizer = torch.optim.Adam([encoder, bias, decoder, offset], RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - step / steps))
    )
    for batch in batches(len(x), given.epochs, draw):
        a, b = x[batch].float() / units[0], y[batch].float() / units[1]
        z = a - offset.detach() if kind == "autoencoder" else a
        before = torch.addmm(bias, z, encoder.T)
        chosen = before.detach().topk(given.k, dim=1).indices
        missed = b - offset - written(before, chosen, decoder)
        loss = missed.square().mean()
        dead = quiet > DEAD_AFTER
        if int(dead.sum()) > AUXILIARY:
            revived = before.detach().masked_fill(~dead, -torch.inf).topk(AUXILIARY, dim=1).indices
            loss = loss + (missed.detach() - written(before, revived, decoder)).square().mean() / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        quiet += len(batch)
        quiet[chosen[before.detach().gather(1, chosen) > 0]] = 0
    dead_share = float((quiet > len(x)).float().mean())
    with torch.no_grad():
        return Trained(encoder / units[0], bias, decoder * units[1], offset * units[1], given.k, dead_share)


def largest(y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the k largest singular directions [k, hidden]: as many numbers a token as a dictionary keeps, without choice."""
    mean = y.float().mean(0)
    centered = y.float() - mean
    return mean, torch.linalg.eigh(centered.T @ centered).eigenvectors.T[-k:]


@torch.no_grad()
def judged(dictionary: Dictionary, x: Tensor, y: Tensor, reference: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the share of variance that the dictionary, the reference's directions and its largest one explain, and silent features."""
    mean, directions = reference
    centered = y.float() - mean
    variance, along = float(centered.square().sum()), (centered @ directions.T).square().sum(0)
    missed, fired = 0.0, torch.zeros(len(dictionary.bias), dtype=torch.bool)
    for a, b in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
        missed += float((b.float() - dictionary.reconstruct(a.float())).square().sum())
        fired |= (dictionary.features(a.float()) > 0).any(0)
    return {
        "explained": 1 - missed / variance,
        "explained_by_k_directions": float(along.sum()) / variance,
        "explained_by_one_direction": float(along[-1]) / variance,
        "silent_on_held_out": 1 - float(fired.float().mean()),
    }


def batches(count: int, epochs: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Yield the numbers of the tokens of each step."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=draw)
        yield from torch.split(order[: count // BATCH * BATCH], BATCH)


def written(before: Tensor, chosen: Tensor, decoder: Tensor) -> Tensor:
    """Return what chosen features [tokens, k] write [tokens, hidden]."""
    return torch.nn.functional.embedding_bag(chosen, decoder, per_sample_weights=before.gather(1, chosen).relu(), mode="sum")


if __name__ == "__main__":
    main()
