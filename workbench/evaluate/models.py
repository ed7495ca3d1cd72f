"""The lm-eval model `workbench`, which scores any configuration and can be used from lm-eval."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.evaluate import register
from workbench.evaluate.check import RefusedError, checked
from workbench.evaluate.hflm import SafeHFLM, Tokenized, recalled, without_recall
from workbench.evaluate.packed import Answer, Forward, Pair, answered
from workbench.evaluate.routed import acting, routed_groups
from workbench.models.prompts import load_tokenizer

log = logging.getLogger("workbench")


class WorkbenchLM(SafeHFLM):
    """lm-eval's model `workbench`: the configuration of a recipe, a model directory or a live model.

    Shared contexts are forwarded once.

    ```python
    import lm_eval, workbench.evaluate.models
    lm_eval.simple_evaluate("workbench", model_args="recipe=recipes/starter-ties.yaml,batch_size=32", tasks=["arc_easy"])
    ```

    Args:
        pretrained: Model directory, hub ID or live model; used instead of `recipe`.
        recipe: Path of a recipe. Its configuration is composed in memory, in its output dtype.
        device: auto, cpu, cuda or cuda:N.
        scorer: prefix, packed or hflm.
        batch_size: Requests per forward pass.
        settings: HFLM's other arguments.

    Raises:
        WorkbenchError: If neither or both of `recipe` and `pretrained` are given.
    """

    def __init__(
        self,
        pretrained: Any = None,
        recipe: str | None = None,
        device: str | None = None,
        scorer: str = "prefix",
        batch_size: int | str | None = 32,
        **settings: Any,
    ) -> None:
        if (pretrained is None) == (recipe is None):
            raise WorkbenchError(
                "model 'workbench': expected recipe=FILE or pretrained=MODEL", "model_args='recipe=recipes/x.yaml'"
            )
        torch_device = _device(device, pretrained)
        if recipe is not None:
            pretrained, settings["tokenizer"] = _configuration(recipe, torch_device)
        self.scorer = scorer
        self._forward: Forward | None = None
        super().__init__(pretrained, device=str(torch_device), batch_size=batch_size or 32, **settings)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Score requests task by task, because the prompts of one task share a beginning."""
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(i)
        answered: dict[int, Answer] = {}
        for members in groups.values():
            answers = super().loglikelihood([requests[i] for i in members], disable_tqdm=disable_tqdm)
            answered.update(zip(members, answers, strict=True))
        return [answered[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[Tokenized], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[Answer]:
        pairs = [(list(context), list(answer)) for _, context, answer in requests]
        if getattr(self.model, "routing", None) is not None:
            # lm-eval passes no strings for the windows of rolling requests, which have no prompt.
            return self._routed(pairs, {i: [] if requests[i][0] is None else context for i, (context, _) in enumerate(pairs)})
        with without_recall(self.model):
            answers = self._answers(pairs)
            longer = recalled(self.model, pairs)
            if longer:
                answers_with_facts = dict(zip(longer, self._answers(list(longer.values())), strict=True))
                answers = [answers_with_facts.get(i, answer) for i, answer in enumerate(answers)]
        return answers

    def _routed(self, pairs: list[Pair], contexts: dict[int, list[int]]) -> list[Answer]:
        """Return log-likelihoods of pairs, each with the bricks that the model's router chooses from what it sees of the pair."""
        answers: dict[int, Answer] = {}
        for group in routed_groups(self.model, contexts):
            with acting(self.model, group):
                if self._forward is not None:
                    self._forward.forget()
                answers |= dict(zip(group.members, self._answers([pairs[i] for i in group.members]), strict=True))
        return [answers[i] for i in range(len(pairs))]

    def _answers(self, pairs: list[Pair]) -> list[Answer]:
        """Return log-likelihoods of tokenized pairs; the first call checks the scorer against hflm."""
        if self._forward is None and self.scorer != "hflm":
            self._forward = Forward(self.model)
            try:
                checked(self, self._forward, [pairs], self.scorer)
            except RefusedError as error:
                log.warning("scorer %s is not used: %s", self.scorer, error)
                self.scorer = "hflm"
        return answered(self, self._forward if self.scorer != "hflm" else None, pairs, self.scorer)


register()


def _device(device: str | None, pretrained: Any) -> Any:
    from workbench.models.identity import pick_device

    return pretrained.device if isinstance(pretrained, PreTrainedModel) else pick_device(device or "auto")


def _configuration(recipe: str, device: Any) -> tuple[PreTrainedModel, Any]:
    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.materialize import materialize

    resolved = resolve(load_recipe(Path(recipe)))
    return materialize(resolved, device), load_tokenizer(resolved.tokenizer_path)
