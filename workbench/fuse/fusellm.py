"""FuseLLM: the distributions of several models become one, that of the best model or the weighted mean of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ConfigDict, Field

from workbench.ground.lazy import np
from workbench.steps import FuseMethod, register
from workbench.train.spec import HubData
from workbench.train.step import RowTraining

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Fused(FuseMethod, RowTraining):
    """A fuse step with the fields of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "Wan et al. 2024, Knowledge Fusion of Large Language Models, arXiv 2401.10491"
    takes_chat: ClassVar[bool] = False
    """False: teachers read the text itself, without a chat template."""

    data: str | HubData = Field()
    """Training rows: a JSONL file, relative to the project, with {"prompt":, "completion":} or {"text":} a line; or a data set of
    the Hugging Face Hub, {hub:, revision:, config:, split:, prompt:, completion:}. Conversations are refused, because teachers read
    the text without a chat template."""
    method: Literal["lora", "full"] = "full"
    """Training method: `full` trains all weights, `lora` trains an adapter. Both are saved in bfloat16."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW. The default is the paper's, for models of 7 billion parameters; small models need a higher one,
    and so does `method: lora`."""

    def names(self) -> list[str]:
        """Return the teachers, and the bricks to which a new adapter is kept orthogonal."""
        return list(dict.fromkeys([*self.teachers, *self.orthogonal_to]))


@register
class MinCE(Fused):
    """Train the base on the distribution of the teacher that predicts each row, or each span of a row, best (FuseLLM).

    A token that this model gives no distribution for is learned from the text alone.
    """

    formula: ClassVar[str] = "(1 − w) · CE(text, Q) + w · CE(P_j, Q), j = argmin over models of CE(text, P_j)"

    fuse: Literal["mince"]

    def shares(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return 1 for the model with the lowest loss of a span, the first one if several are equal, and 0 for the others."""
        chosen = np.zeros_like(losses)
        chosen[np.arange(len(losses)), losses.argmin(1)] = 1.0
        return chosen


@register
class AvgCE(Fused):
    """Train the base on the weighted mean of all teachers' distributions (FuseLLM).

    The weights are the softmax of 1 / perplexity over the models. At a token that some models give no distribution for, the
    others' weights are scaled to sum to 1.
    """

    formula: ClassVar[str] = "(1 − w) · CE(text, Q) + w · CE(Σ aⱼPⱼ, Q), a = softmax over models of exp(−CE(text, Pⱼ))"

    fuse: Literal["avgce"]

    def shares(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the softmax of the reciprocal perplexities of each span."""
        rewards = np.exp(np.exp(-losses))
        return np.asarray(rewards / rewards.sum(1, keepdims=True))
