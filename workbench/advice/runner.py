"""Run the models of `brick advise --measure`, and ask each of them the bricks' own prompts."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.adapters.read import WEIGHTS
from workbench.advice.evidence import ITEMS, TIMED, TOKENS, Candidate, RoutePrice
from workbench.advice.groups import Group, Places, route_recipes
from workbench.edit.places.knowledge import said_by
from workbench.facts.facts import Fact
from workbench.ground import yamldoc
from workbench.ground.lazy import no_grad, torch
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import Text, spread
from workbench.recipe.recipe import from_data, load_recipe
from workbench.resolve.resolve import resolve
from workbench.route.deciding.hidden import token_rows
from workbench.run.compose import Composition, compose
from workbench.run.device import Work
from workbench.run.routers import attach_router
from workbench.scores.statistics import Floats
from workbench.steps import Memo
from workbench.weights.device import exact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.resolve.resolved import Resolved


ROUTE, LEAST_OTHERS = "route", 4
"""Name of the route among the candidates, and the fewest prompts that it is fitted on, of those that are not asked."""


class Runner:
    """Runs models that recipes make from the bricks, and asks them the bricks' own prompts.

    Args:
        bricks: Brick -> directory or hub id.
        base: Directory or hub id.
        texts: Brick -> its prompts with answers; of each, equally many are asked.
        project: Folder that relative paths start from.
        work: Where to compute.
        most: Largest number of prompts of a brick.

    Attributes:
        items: Number of prompts of each brick.
        unfit: Bricks that no router can be fitted on, because too few prompts are left.
    """

    def __init__(
        self,
        bricks: Mapping[str, str],
        base: str,
        texts: Mapping[str, Sequence[Text]],
        project: Path,
        work: Work,
        most: int = ITEMS,
    ) -> None:
        self.items = min(most, *(len(rows) for rows in texts.values()))
        asked = {name: spread(rows, self.items) for name, rows in texts.items()}
        self._facts = {
            name: [Fact(row.place, row.prompt, None, row.answer, place=row.place) for row in rows] for name, rows in asked.items()
        }
        self.fit_on(texts)
        self._bricks, self._base = dict(bricks), base
        self._project, self._work, self._memo = project, work, Memo()

    def fit_on(self, texts: Mapping[str, Sequence[Text]]) -> None:
        """Fit routers on the prompts of these texts that are not asked."""
        known = {fact.prompt for facts in self._facts.values() for fact in facts}
        self._others = {
            name: list(dict.fromkeys(t.prompt for t in rows if t.prompt not in known)) for name, rows in texts.items()
        }
        self.unfit = [name for name, prompts in self._others.items() if len(prompts) < LEAST_OTHERS]

    def run(self, name: str, step: Mapping[str, object] | None, asked: Sequence[str] = ()) -> Candidate:
        """Run one model.

        Args:
            name: Name of the candidate.
            step: The step; None for the base.
            asked: Bricks whose prompts are asked; default: all.
        """
        recipe = {
            "version": 1,
            "name": "advise",
            "base": self._base,
            "bricks": self._bricks,
            "steps": [dict(step)] if step else [],
        }
        resolved = replace(resolve(from_data(recipe, self._project)), memo=self._memo)
        model, _ = self._live(name, resolved)
        tokenizer = load_tokenizer(resolved.tokenizer_path)
        right = {
            brick: np.array(said_by(model, tokenizer, self._facts[brick], self._work.device), np.float64)
            for brick in asked or self._facts
        }
        return Candidate(name, step, right)

    def route(self, groups: Sequence[Group]) -> tuple[Candidate, RoutePrice, list[list[str]]]:
        """Run a route between groups, which is fitted on prompts that are not asked, and ask it the prompts of their bricks.

        Returns:
            The answers, the price, and groups that prompts do not tell apart.
        """
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder)
            (project / "recipes").mkdir()
            texts = {brick: str(project / f"{brick}.jsonl") for group in groups for brick in group.bricks}
            for brick, file in texts.items():
                Path(file).write_text("".join(json.dumps({"prompt": p}) + "\n" for p in self._others[brick]), "utf-8")
            places = Places.of(self._base, self._bricks, texts, project, self._project)
            recipe, merges = route_recipes(groups, places, ROUTE)
            # Like the merges, in float32: a router is fitted on states of the precision in which it is asked.
            for file, content in {f"{ROUTE}.yaml": recipe | {"output": {"dtype": "float32"}}, **merges}.items():
                (project / file).write_text(yamldoc.dump(content), "utf-8")
            resolved = resolve(load_recipe(project / f"{ROUTE}.yaml"))
            model, made = self._live(ROUTE, resolved)
            assert made.router is not None
            routing = attach_router(model, made.router, resolved.tokenizer_path).routing
            size = sum((place / WEIGHTS).stat().st_size for place in made.router.adapters.values())
            tokenizer = load_tokenizer(resolved.tokenizer_path)
            right = {name: self._routed(model, tokenizer, self._facts[name]) for name in texts}
            prompts = [fact.prompt for fact in spread([fact for name in texts for fact in self._facts[name]], TIMED)]
            seconds, merged = _seconds(model, token_rows(tokenizer, prompts), self._work.device)
        price = RoutePrice(adapters=len(groups), bytes=size, seconds=seconds, merged_seconds=merged)
        return Candidate(ROUTE, {"route": "ridge"}, right), price, [list(names) for names in routing.ties]

    def _live(self, name: str, resolved: Resolved) -> tuple[PreTrainedModel, Composition]:
        """Return a recipe's live model, without its router, and what it is made of."""
        self._work.events({"stage": "measure", "text": f"running {name}"})
        device = self._work.device
        with exact(device):
            made = compose(resolved, device)
            tensors = compute(made.model, torch.float32, device)
            return live_model(made.model.config, tensors, resolved.tokenizer_path, device), made

    def _routed(self, model: Any, tokenizer: Any, facts: Sequence[Fact]) -> Floats:
        """Return for each fact whether the model says it by the bricks that the router chooses from the prompt alone."""
        chosen = model.routing.decide(token_rows(tokenizer, [fact.prompt for fact in facts])).weights
        right = np.zeros(len(facts))
        for weights in chosen.unique(dim=0):
            places = (chosen == weights).all(1).nonzero()[:, 0].tolist()
            with model.routing.fixed(weights):
                right[places] = said_by(model, tokenizer, [facts[i] for i in places], self._work.device)
        return right


@no_grad
def _seconds(model: Any, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[float, float]:
    """Return the median time to read a prompt and to write some tokens: as routed, and as the base alone, prompt by prompt."""
    found: list[list[float]] = [[], []]
    # The first prompt is read twice, because the first call prepares what later ones find.
    for number, row in enumerate([rows[0], *rows]):
        ids = torch.tensor([list(row)], device=device)
        for times, acting in zip(found, (nullcontext(), model.routing.fixed(None)), strict=True):
            with acting:
                start = time.perf_counter()
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=TOKENS,
                    max_new_tokens=TOKENS,
                )
                if number:
                    times.append(time.perf_counter() - start)
    return median(found[0]), median(found[1])
