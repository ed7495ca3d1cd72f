"""Documents of `analyze`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.document import Document, optional
from workbench.results import Number


class LeftOutTexts(Document):
    """Rows of the file that the analysis does not use."""

    several_functions: int
    """Rows with more than one function."""
    labels_without_function: dict[str, int]
    """Label without a function -> its number of rows."""


class AnalyzedTexts(Document):
    """The labelled texts of an analysis."""

    file: str
    """The file, as it was named."""
    digest: str
    """Digest of the file."""
    items: int
    """Number of texts used."""
    tokens: int = optional()
    """Number of tokens that counted."""
    left_out: LeftOutTexts = optional()
    """Rows that were not used."""
    tasks: dict[str, dict[str, list[str]]] = optional()
    """Function -> split -> its tasks."""
    warnings: list[str]
    """What the texts cannot show."""


class Analysis(Document):
    """What all analyses of a model's neurons have in common."""

    version: Literal[1]
    """Version of the document."""
    kind: str
    """Kind of analysis."""
    model: str
    """Name of the model."""
    digest: str
    """Digest of the model's weights and configuration."""
    data: AnalyzedTexts
    """The texts."""
    settings: dict[str, Any]
    """Option -> its value."""


class TaskTestDocument(Document):
    """The test of single neurons, over the tasks of both splits."""

    tasks: int
    """Number of tasks."""
    draws: int
    """Number of assignments of tasks to functions."""
    alpha: Number
    """Probability that any neuron of the model is found for any function that it does not serve."""


class FunctionRow(Document):
    """Scores of all neurons for one function."""

    function: str
    """The function."""
    best_median: Number
    """Median over layers of the best neuron's average precision."""
    best_max: Number
    """Largest average precision."""
    layers_above_08: int = optional(alias="layers_above_0.8")
    """Layers whose best neuron exceeds 0.8."""
    top: Number
    """Score that 5 in 1000 neurons of a layer exceed, mean over layers."""
    mean: Number
    """Mean over all neurons."""
    prevalence: Number
    """Share of the function's texts, the expected score of a random neuron."""
    found: int
    """Neurons that the test finds."""
    largest_effect: Number
    """Largest effect of a neuron: root of its mean activation on the function's tasks above that on other tasks, in standard deviations
    over tasks."""
    smallest_effect: Number | None
    """Effect from which a neuron is found; null if the tasks are too few to find any."""
    overlap: Number
    """Share of the set that the held-out tasks choose too."""
    overlap_others: Number
    """The same with the sets that held-out tasks choose for other functions."""
    chance_overlap: Number
    """Overlap of random sets."""
    confounders: dict[str, Number]
    """Feature of the texts (length, language, template) -> its AUC for the function."""


class LayerScore(Document):
    """Scores of a function in one layer."""

    function: str
    """The function."""
    layer: int
    """The layer."""
    best: Number
    """Best score."""
    top: Number
    """Score that 5 in 1000 neurons exceed."""
    mean: Number
    """Mean score."""


class ModelBeside(Document):
    """A model beside a merge."""

    name: str
    """base, the name of a brick, or the name of the merge."""
    role: str
    """base, brick (alone on the base, with weight 1) or merge."""
    digest: str
    """Digest of its weights and configuration."""


class SetBeside(Document):
    """A function's set of neurons in one model, beside the merge's."""

    model: str
    """The model."""
    top: Number
    """Held-out score that 5 in 1000 neurons of a layer exceed, mean over layers."""
    score: Number
    """Mean held-out score of the model's set in the model itself."""
    score_in_merge: Number
    """Mean held-out score of the same neurons in the merge."""
    in_merge: Number
    """Share of the model's set that is in the merge's set too."""
    in_base: Number
    """Share of the model's set that is in the base's set too."""


class FunctionBeside(Document):
    """The sets of one function."""

    function: str
    """The function."""
    models: list[SetBeside]
    """Base, bricks and merge."""


class BesideDocument(Analysis):
    """The functions' sets of a merge beside those of its base and of each brick alone."""

    models: list[ModelBeside]
    """Base, bricks and merge."""
    functions: list[FunctionBeside]
    """The sets by function."""


class FunctionsDocument(Analysis):
    """Result of `analyze functions`; the neurons' own scores are in functions.safetensors."""

    version: Literal[2]  # type: ignore[assignment]
    """Version of the document."""
    neurons: dict[str, int]
    """Layer -> number of its neurons or experts."""
    unit: str
    """neurons or experts."""
    exact: bool
    """Whether scores are exact, and not those of histograms."""
    test: TaskTestDocument
    """The test of single neurons."""
    functions: list[FunctionRow]
    """Scores by function."""
    layers: dict[str, list[LayerScore]]
    """Split -> scores by function and layer."""
    overlap: dict[str, dict[str, Number]]
    """Function -> function -> share of the neurons that are in both sets."""
    residents: int
    """Neurons that are among the most active ones of their layer on every function."""
    beside: BesideDocument = optional()
    """The sets beside those of the base and of each brick alone, with `--beside`."""


class DistributionDocument(Document):
    """Distribution of a normalized indicator."""

    indicator: str
    """activation or magnitude."""
    normalizer: str
    """Maximum that the indicator is divided by."""
    layers: list[int]
    """The layers."""
    grid: list[Number]
    """Values from 0 to 1."""
    cdf: list[list[Number]]
    """Layer -> share of the neurons at or below each value."""
    small: list[Number]
    """Share below 0.2 by layer."""
    mean_small: Number
    """Mean of these shares."""
    tokens: int
    """Tokens in the sample."""
    available: int
    """Tokens that the sample was drawn from."""


class MaskPointDocument(Document):
    """The loss with a share of the neurons masked."""

    percent: Number
    """Share masked, in percent."""
    loss: Number
    """Mean loss in nats per token."""
    rise: Number
    """Its rise over the unchanged model."""
    low: Number | None
    """Lower end of the rise's 95 % interval."""
    high: Number | None
    """Upper end."""


class MaskCurveDocument(Document):
    """Losses of a function for all shares."""

    function: str | None
    """The function; null for all texts."""
    indicator: str
    """Indicator that chooses the masked neurons."""
    points: list[MaskPointDocument]
    """The losses."""
    clusters: int
    """Clusters of the intervals."""
    tolerance: Number
    """Rise in nats that counts as no loss."""
    free: Number
    """Largest share, in percent, without a loss."""
    surely_free: Number
    """Largest share whose interval excludes a loss."""


class CettDocument(Document):
    """Thresholds of equal truncation error."""

    target: Number
    """Error that no layer exceeds."""
    layers: list[int]
    """Layers with neurons."""
    thresholds: list[Number]
    """Threshold of the output magnitude by layer."""
    reached: list[Number]
    """Error at the threshold by layer."""
    sparsity: list[Number]
    """Share of the neurons below the threshold by layer."""
    mean_sparsity: Number | None
    """Mean of these shares."""
    tokens: int
    """Tokens in the sample."""


class SparsityDocument(Analysis):
    """Result of `analyze sparsity`."""

    distributions: list[DistributionDocument]
    """Distribution of each indicator."""
    curves: list[MaskCurveDocument]
    """Loss against the share masked, by function and indicator."""
    cett: CettDocument
    """Thresholds of equal truncation error."""


class DamageDocument(Document):
    """What every function loses when a set is switched off."""

    functions: list[str]
    """Names of rows (switched off) and columns (measured)."""
    changes: list[list[Number | None]]
    """(PPL off - PPL) / PPL; null if infinite."""
    low: list[list[Number | None]]
    """Lower ends of 95 % intervals."""
    high: list[list[Number | None]]
    """Upper ends."""
    dominant: list[bool]
    """Row -> whether its own function loses most."""
    dominance: list[Number]
    """Row -> share of resamplings in which it does."""
    dominant_rows: int
    """Number of such rows."""
    coupling: Number | None
    """Median over rows of the mean of the others over the diagonal; null if undefined."""
    interval: list[Number | None]
    """95 % interval of the coupling."""
    couplings: list[Number | None]
    """Coupling of each row."""


class AblationControl(DamageDocument):
    """Damage by control sets of equal size."""

    kind: str
    """random, matched (by mean activation) or shuffled (chosen by a shuffled label)."""
    exceeds: list[Number]
    """Function -> share of resamplings in which its own set harms it more than the control."""


class RangeDamage(DamageDocument):
    """Damage by the functions' sets when they are switched off only within a range of their activation."""

    range: list[Number]
    """Ends of the range, in standard deviations around the mean activation on the function's own texts."""


class AblationDocument(Analysis, DamageDocument):
    """Result of `analyze ablate`."""

    share: Number
    """Share of the neurons in a set."""
    overlap: dict[str, Number]
    """Mean overlap of two sets, and its value by chance."""
    centered: list[list[Number]]
    """Rise of the loss in nats, without the means of rows and columns."""
    centered_dominant: list[bool]
    """Row -> whether its diagonal is its largest number there."""
    base_perplexity: list[Number | None]
    """Perplexity of each function on the unchanged model."""
    controls: dict[str, AblationControl]
    """Kind of control -> its damage."""
    between: RangeDamage = optional()
    """Damage within a range of activation, with `--between`."""
    items: int
    """Number of texts."""
    clusters: list[int]
    """Clusters of each function."""
    warnings: list[str]
    """What the intervals cannot show."""


class EverythingDocument(Document):
    """Result of `analyze all`."""

    functions: FunctionsDocument
    """Scores of neurons for functions."""
    sparsity: SparsityDocument
    """Sparsity of activations."""
    ablation: AblationDocument
    """Damage by switching sets off."""
