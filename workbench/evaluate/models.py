"""lm-eval model classes: HFLM that leaves weights alone, and `workbench`, which scores any configuration and can be used from lm-eval."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.evaluate.check import RefusedError, checked
from workbench.evaluate.hflm import SafeHFLM, Tokenised, recalled, without_recall
from workbench.evaluate.packed import Answer, Forward, Pair, bounds_of, lay_out, start_for
from workbench.models.tokenizer import load_tokenizer

log = logging.getLogger("workbench")


class WorkbenchLM(SafeHFLM):
    """lm-eval's model `workbench`: a recipe's configuration, a model directory or a live model, scored with shared contexts forwarded once.

    ```python
    import lm_eval, workbench.evaluate
    lm_eval.simple_evaluate("workbench", model_args="recipe=recipes/starter-ties.yaml,batch_size=32", tasks=["arc_easy"])
    ```

    Args:
        recipe: Path of a recipe, whose configuration is composed in memory in its output dtype.
        pretrained: Instead of it a model directory, hub id or live model.
        device: auto, cpu, cuda or cuda:N.
        scorer: prefix, packed or hflm.
        settings: HFLM's other arguments.
    Errors: neither or both of recipe and pretrained.
    """

    def __init__(
        self, pretrained: Any = None, recipe: str | None = None, device: str | None = None, scorer: str = "prefix",
        batch_size: int | str | None = 32, **settings: Any,
    ) -> None:  # fmt: skip
        if (pretrained is None) == (recipe is None):
            raise WorkbenchError(
                "model 'workbench': expected recipe=FILE or pretrained=MODEL", "model_args='recipe=recipes/x.yaml'"
            )
        place = _device(device, pretrained)
        if recipe is not None:
            pretrained, settings["tokenizer"] = _configuration(recipe, place)
        self.scorer = scorer
        self._forward: Forward | None = None
        super().__init__(pretrained, device=str(place), batch_size=batch_size or 32, **settings)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Task by task, since the prompts of one task begin alike."""
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(i)
        found: dict[int, Answer] = {}
        for members in groups.values():
            answers = super().loglikelihood([requests[i] for i in members], disable_tqdm=disable_tqdm)
            found.update(zip(members, answers, strict=True))
        return [found[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[Tokenised], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[Answer]:
        pairs = [(list(context), list(answer)) for _, context, answer in requests]
        with without_recall(self.model):
            found = self._answers(pairs)
            longer = recalled(self.model, pairs)
            if longer:
                again = dict(zip(longer, self._answers(list(longer.values())), strict=True))
                found = [again.get(i, answer) for i, answer in enumerate(found)]
        return found

    def _answers(self, pairs: list[Pair]) -> list[Answer]:
        if self._forward is None and self.scorer != "hflm":
            self._forward = Forward(self.model)
            try:
                checked(self, self._forward, [pairs], self.scorer)
            except RefusedError as error:
                log.warning("scorer %s is not used: %s", self.scorer, error)
                self.scorer = "hflm"
        if self.scorer == "hflm" or self._forward is None:
            return list(self.referee(pairs))
        bounds = bounds_of(self)
        found = self._forward.answers(lay_out(pairs, bounds, start_for(self.scorer, pairs, bounds)))
        return [found[i] for i in range(len(pairs))]


def _device(device: str | None, pretrained: Any) -> Any:
    from workbench.models.device import pick_device

    return pretrained.device if isinstance(pretrained, PreTrainedModel) else pick_device(device or "auto")


def _configuration(recipe: str, device: Any) -> tuple[PreTrainedModel, Any]:
    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.materialize import materialize

    resolved = resolve(load_recipe(Path(recipe)))
    return materialize(resolved, device), load_tokenizer(resolved.tokenizer_path)
