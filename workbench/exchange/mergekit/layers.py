"""Translation of mergekit's slices to a `grow: stack` step: layers of several models, copied or merged slice by slice."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from workbench.exchange.mergekit.config import (
    Config,
    ImportReport,
    ModelSource,
    Reference,
    Scope,
    note_unknown,
    read_reference,
    read_top,
    scope_of,
)
from workbench.exchange.mergekit.methods import MethodInputs, ParameterEntry, Part, entries_of, glob_of, step_of
from workbench.exchange.mergekit.places import Places
from workbench.ground import yamldoc
from workbench.merge.mergekit.table import KNOWN, base_policy, parameters
from workbench.models.layout import Layout

Step = dict[str, object]
_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
_OUTSIDE = ("embeddings", "norm", "head")


@dataclass(frozen=True)
class SliceSources:
    """A slice of the result.

    Attributes:
        path: Its place in the file.
        base: The base of its merge.
        sources: The models, each with its range of layers; None stands for all layers.
        scopes: Parameters for all its models, in the order of precedence.
    """

    path: yamldoc.KeyPath
    base: Reference | None
    sources: list[ModelSource]
    scopes: list[Scope]

    @property
    def length(self) -> int | None:
        """The number of layers; None if the slice has all layers."""
        span = self.sources[0].layers
        return None if span is None else span[1] - span[0]


def is_layered(data: Any) -> bool:
    """Return True if a configuration needs a stack: several slices, or one that starts after layer 0."""
    if not isinstance(data, Mapping) or "merge_method" not in data:
        return False
    module = (data.get("modules") or {}).get("default") if isinstance(data.get("modules"), Mapping) else None
    slices = module.get("slices") if isinstance(module, Mapping) else data.get("slices")
    if not isinstance(slices, list) or not slices:
        return False
    starts = set()
    for entry in slices:
        for source in (entry.get("sources") if isinstance(entry, Mapping) else None) or []:
            span = source.get("layer_range") if isinstance(source, Mapping) else None
            starts.add(span[0] if isinstance(span, list) and span and isinstance(span[0], int) else 0)
    return len(slices) > 1 or starts - {0} != set()


def read_slices(document: yamldoc.Document) -> tuple[Config, list[SliceSources]]:
    """Read a file with slices.

    Returns:
        The configuration, with every model once as its sources, and the slices.

    Raises:
        WorkbenchError: If fields cannot be translated; the message lists all of them with their lines.
    """
    report, data = ImportReport(document), document.data
    method, base, (above, _, module), scopes = read_top(report, data)
    listed = (module or data)["slices"]
    slices = [
        made
        for i, entry in enumerate(listed if isinstance(listed, list) else ())
        if (made := _slice(report, entry, (*above, "slices", i), base, scopes)) is not None
    ]
    report.stop()
    if not slices:
        raise document.error((*above, "slices"), "names no model to start from", "Name a model in every slice.")
    sources = {source.reference: source for part in slices for source in part.sources}
    return Config(data, method, base, list(sources.values()), scopes, None, report), slices


def whole_slice(config: Config) -> list[SliceSources]:
    """Return the inputs of a file as one slice over all layers."""
    sources = [replace(source, layers=None) for source in config.sources]
    return [SliceSources(config.sources[0].path, config.base, sources, config.scopes)]


def _slice(
    report: ImportReport, entry: Any, path: yamldoc.KeyPath, base: Reference | None, scopes: list[Scope]
) -> SliceSources | None:
    """Return one slice; None, with a problem in the report, if it is invalid."""
    listed = entry.get("sources") if isinstance(entry, Mapping) else None
    if not isinstance(listed, list) or not listed:
        report.refuse(path, "expected {sources: [{model:, layer_range:}]} with at least one source")
        return None
    note_unknown(report, path, entry, ("sources", "base_model", "parameters", "residual_weight"))
    if entry.get("residual_weight") is not None:
        report.note((*path, "residual_weight"), "mergekit does not use it, so it is omitted")
    if entry.get("base_model"):
        base = read_reference(report, entry["base_model"], (*path, "base_model"))
    sources: list[ModelSource] = []
    for i, source in enumerate(listed):
        where = (*path, "sources", i)
        if not isinstance(source, Mapping) or "model" not in source or "layer_range" not in source:
            report.refuse(where, "expected {model:, layer_range:, parameters:}")
            continue
        note_unknown(report, where, source, ("model", "layer_range", "parameters"))
        span = source["layer_range"]
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] < span[1]):
            report.refuse((*where, "layer_range"), f"found {span}: expected [first, end] with 0 <= first < end")
            continue
        reference = read_reference(report, source["model"], (*where, "model"))
        if reference is not None:
            if reference in [s.reference for s in sources]:
                report.refuse((*where, "model"), f"{reference} is listed twice among the inputs of the slice")
            sources.append(ModelSource(reference, (*where, "model"), scope_of(report, source, where), (span[0], span[1])))
    if len({s.layers[1] - s.layers[0] for s in sources if s.layers}) > 1:
        report.refuse((*path, "sources"), "the inputs' layer ranges have different lengths; mergekit rejects this too")
    return SliceSources(path, base, sources, [scope_of(report, entry, path), *scopes]) if sources else None


def stack_step(config: Config, slices: Sequence[SliceSources], places: Places) -> Step:
    """Return the `grow: stack` step with the same numbers. Problems and notes go to the configuration's report.

    mergekit merges the embeddings as the first slice and the final norm and head as the last one, with the first value of gradients.
    """
    for part in slices:
        _check_inputs(config, part)
    config.report.stop()
    translate = _Translation(config, places)
    step: Step = {"grow": "stack", "slices": [entry for part in slices for entry in translate.layers(part)]}
    outside = {group: translate.outside(slices[-1 if group != "embeddings" else 0], group) for group in _OUTSIDE}
    named = [places.named(source.reference) for part in (slices[0], slices[-1]) for source in part.sources]
    if all(names is not None and names.tied for names in named):
        outside["head"] = {}  # mergekit writes no head for models that tie it
    if None in named and outside["head"] != outside["embeddings"]:
        config.report.note(
            (),
            "the models are not local: if they tie the head to the embeddings, remove `head`, because mergekit then writes none",
        )
    for group, made in outside.items():
        if made:
            step[group] = made["brick"] if list(made) == ["brick"] else made
    return step


def _check_inputs(config: Config, part: SliceSources) -> None:
    """Report inputs that the method cannot use in a slice."""
    policy, report, references = base_policy(config.method), config.report, [source.reference for source in part.sources]
    if policy == "required" and part.base is None:
        report.refuse(("merge_method",), f"{config.method} needs a base_model; mergekit rejects this too")
    if policy != "ignored" and part.base and part.base not in references:
        report.refuse((*part.path, "sources"), f"the base {part.base} is not among the sources; mergekit rejects this too")
    least, most = KNOWN[config.method].laws.arity
    merged = [r for r in references if policy == "ignored" or r != part.base]
    if not least <= len(merged) <= (most or len(merged)):
        expected = f"exactly {least}" if least == most else f"at least {least}"
        suffix = " beside the base" if policy != "ignored" else ""
        many = "s" if (most or 2) > 1 else ""
        report.refuse(part.path, f"{config.method} takes {expected} model{many} in a slice{suffix}, found {len(merged)}")


class _Translation:
    """Translates slices to the fields of a stack."""

    def __init__(self, config: Config, places: Places) -> None:
        self.config, self.places = config, places

    def layers(self, part: SliceSources) -> Iterator[Step]:
        """Yield the slices of the step: one, or several if factors differ from layer to layer."""
        (first, *_), length = part.sources, part.length
        if self.config.method != "passthrough":
            yield self._merged(part, self._view(part))
            return
        brick, span = self._brick(first.reference), first.layers
        entries = entries_of(parameters("passthrough")["scale"], [first.parameters, *part.scopes], self.config.report)
        for key_path, mapping in [part.sources[0].parameters, *part.scopes]:
            for name in mapping:
                if name != "scale":
                    self.config.report.note((*key_path, name), "passthrough does not use it, so it is omitted")
        if span is None or length is None:
            yield {**brick, **_scale(self._factors(entries, None, 0.0, first.reference))}
            return
        numbers = range(*span)
        scales = [
            (layer, self._factors(entries, layer, 1.0 if length == 1 else (layer - span[0]) / (length - 1), first.reference))
            for layer in numbers
        ]
        for factors, group in groupby(scales, key=lambda pair: pair[1]):
            members = [layer for layer, _ in group]
            yield {**brick, "layers": [members[0], members[-1] + 1], **_scale(factors)}

    def outside(self, part: SliceSources, group: str) -> Step:
        """Return the source of a part outside the layers; empty if it is the base's."""
        if self.config.method != "passthrough":
            return self._merged(replace(part, sources=[replace(s, layers=None) for s in part.sources]), self._view(part, group))
        source = part.sources[0]
        entries = entries_of(parameters("passthrough")["scale"], [source.parameters, *part.scopes], self.config.report)
        names = self._names(source.reference, group)
        factors = self._matched([(name, name) for name in names] if names is not None else None, entries, 0.0)
        return {**self._brick(source.reference), **_scale(factors)}

    def _brick(self, reference: Reference) -> Step:
        return {} if reference == self.places.root else {"brick": self.places.name(reference)}

    def _merged(self, part: SliceSources, view: Part) -> Step:
        """Return a merge of the slice's models."""
        config, places = self.config, self.places
        policy = base_policy(config.method)
        for key_path, filter_text in _filters(config.method, part):
            if _NUMBERED.search(filter_text):
                config.report.refuse(key_path, f"filter {filter_text!r} names layers by number, which a slice counts from 0")
        anchor = part.base if part.base in [s.reference for s in part.sources] else part.sources[0].reference
        assert anchor is not None
        merged = [s for s in part.sources if policy == "ignored" or s.reference != part.base]
        own = replace(config, base=part.base, sources=part.sources, scopes=part.scopes, layers=part.length)
        inputs = MethodInputs(own, {places.name(s.reference): s for s in merged}, places.name(anchor), view)
        spans = {places.name(s.reference): list(s.layers) for s in part.sources if s.layers}
        step = step_of(inputs)
        bricks = step.get("bricks")
        layers = spans.get(places.name(anchor))
        base = {} if anchor == places.root else {"base": places.name(anchor)}
        ranges = {
            name: span for name, span in spans.items() if span != layers and isinstance(bricks, Collection) and name in bricks
        }
        return {**({"layers": layers} if layers else {}), **step, **base, **({"ranges": ranges} if ranges else {})}

    def _names(self, reference: Reference, group: str) -> list[str] | None:
        """Return the tensors of a part outside the layers; None if the model is not known."""
        named = self.places.named(reference)
        return None if named is None else [name for name in named.layout.names if named.layout.group(name) == group]

    def _view(self, part: SliceSources, group: str = "layers") -> Part:
        """Return the names that filters of a merge are matched with."""
        source = next((s for s in part.sources if s.reference == part.base), part.sources[0])
        named, inside = self.places.named(source.reference), group == "layers"
        if named is None:
            return Part(Layout("", part.length or 0 if inside else 0, ()), inside, unknown=True)
        if not inside:
            return Part(Layout(named.layout.prefix, 0, tuple(self._names(source.reference, group) or ())), inside)
        first, stop = source.layers or (0, named.layout.depth)
        prefix, names = named.layout.prefix, list[str]()  # the layers are numbered from 0
        for number, layer in enumerate(range(first, min(stop, named.layout.depth))):
            start = len(f"{prefix}{layer}.")
            names += [f"{prefix}{number}.{name[start:]}" for name in named.layout.in_layer(layer)]
        return Part(Layout(prefix, stop - first, tuple(names)), inside)

    def _factors(self, entries: Sequence[ParameterEntry], layer: int | None, t: float, reference: Reference) -> dict[str, float]:
        """Return the factors of a layer by glob over names within it, where the first match wins."""
        named = self.places.named(reference)
        pairs = None
        if named is not None and layer is not None:
            start = len(f"{named.layout.prefix}{layer}.")
            pairs = [(name, name[start:]) for name in named.layout.in_layer(layer)]
        return self._matched(pairs, entries, t)

    def _matched(self, pairs: Sequence[tuple[str, str]] | None, entries: Sequence[ParameterEntry], t: float) -> dict[str, float]:
        """Return factors by glob."""
        values = [(entry.filter, float(_value_at_depth(entry.value, t))) for entry in entries]
        by_glob: dict[str, float] = {}
        for text, value in values:
            by_glob.setdefault("*" if text is None else glob_of(text), value)
        if pairs is None:
            for entry in entries:
                if entry.filter and _NUMBERED.search(entry.filter):
                    self.config.report.refuse(
                        entry.path, f"filter {entry.filter!r} names layers by number; the model is not local"
                    )
            return by_glob
        exact = {ours: next((v for text, v in values if text is None or text in theirs), 1.0) for theirs, ours in pairs}
        used = {text: next((i for i, (f, _) in enumerate(values) if f is None or f in theirs), None) for theirs, text in pairs}
        kept = {i for i in used.values() if i is not None}
        globs = {glob: v for i, (glob, v) in enumerate(by_glob.items()) if i in kept} if len(by_glob) == len(values) else None
        local = {ours: next((i for i, (f, _) in enumerate(values) if f is None or f in ours), None) for _, ours in pairs}
        return globs if globs is not None and local == used else {ours: v for ours, v in exact.items() if v != 1}


def _filters(method: str, part: SliceSources) -> Iterator[tuple[yamldoc.KeyPath, str]]:
    """Yield the place and the text of every filter in the parameters of a slice."""
    known = parameters(method)
    for key_path, mapping in [*(source.parameters for source in part.sources), *part.scopes]:
        for name, value in mapping.items():
            conditions = [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []
            for condition in conditions:
                if name in known and isinstance(condition, Mapping) and condition.get("filter"):
                    yield (*key_path, name), str(condition["filter"])


def _value_at_depth(value: Any, t: float) -> float:
    """Return the value of a number or of a gradient at a relative depth, as mergekit interpolates it."""
    if not isinstance(value, list):
        return float(value)
    place = t * (len(value) - 1)
    low = int(place)
    high = min(len(value) - 1, low + 1)
    return float((1 - (place - low)) * value[low] + (place - low) * value[high])


def _scale(factors: Mapping[str, float]) -> Step:
    """Return the field `scale`; nothing if all factors are 1."""
    return {"scale": dict(factors)} if any(value != 1 for value in factors.values()) else {}
