"""Reader of PEFT adapter directories: configuration, tensors, and scales with their patterns of module names.

Patterns are matched in linear time, because the file may come from anyone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.adapters.flavours import BLOCKS, SIZES, TUNERS, check_config, check_kinds, meaning
from workbench.adapters.keys import Keys, sort_keys
from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.recognize import expecting, look
from workbench.weights.checkpoint import unwrapped
from workbench.weights.header import Entry, read_header

MAX_LENGTH = 10_000
MAX_EXPRESSIONS = 256
# Patterns that PEFT writes itself: a module's name, plain or escaped, possibly anchored by ^. An unescaped dot matches any character.
_NAME = re.compile(r"(\^?)((?:[A-Za-z0-9_-]|\\[.\-_]|\.)+)")
# Python and RE2 interpret these differently: x{,3}, [[:alpha:]].
_TWO_MEANINGS = re.compile(r"\{,|\[\[")
_HINT = (
    "Patterns are RE2 regular expressions, without lookaround and backreferences. Use module names instead, such as "
    '"layers.3.self_attn.q_proj", or join names with |.'
)


class Patterns:
    r"""Matcher for `alpha_pattern` or `rank_pattern`, by PEFT's rule: re.match(rf"(.*\.)?({pattern})$", module).

    Raises:
        WorkbenchError: If a pattern is not a regular expression, or requires lookaround or backreferences, which cannot be
            matched in linear time; if more than 256 patterns are not plain names.
    """

    def __init__(self, patterns: Mapping[str, float] | None, label: str) -> None:
        self._values = list((patterns or {}).values())
        # (length, positions of wildcards, anchored) -> name with wildcards blanked -> index of the first such pattern
        self._names: dict[tuple[int, tuple[int, ...], bool], dict[str, int]] = {}
        self._expressions: list[tuple[int, Any]] = []
        for number, pattern in enumerate(patterns or ()):
            if plain := _NAME.fullmatch(pattern):
                parts = re.findall(r"\\.|.", plain[2])
                anywhere = tuple(i for i, part in enumerate(parts) if part == ".")
                name = _with_wildcards_marked("".join(part[-1] for part in parts), anywhere)
                self._names.setdefault((len(parts), anywhere, bool(plain[1])), {}).setdefault(name, number)
            elif len(self._expressions) == MAX_EXPRESSIONS:
                raise WorkbenchError(f"{label}: more than {MAX_EXPRESSIONS} patterns that are not names of modules", _HINT)
            else:
                self._expressions.append((number, _compiled(pattern, label)))

    def value(self, module: str, default: float) -> float:
        """Return the number of the first pattern that matches the whole module name or its last components, else the default."""
        matches = [number for number, expression in self._expressions if expression.fullmatch(module)]
        ends = [0, *(i + 1 for i, character in enumerate(module) if character == ".")]
        for (length, anywhere, anchored), names in self._names.items():
            start = len(module) - length
            if start in ((0,) if anchored else ends) and (name := _with_wildcards_marked(module[start:], anywhere)) in names:
                matches.append(names[name])
        return self._values[min(matches)] if matches else default


def _with_wildcards_marked(name: str, anywhere: tuple[int, ...]) -> str:
    """Return the name with a marker in place of wildcard characters."""
    characters = list(name)
    for i in anywhere:
        characters[i] = "\0" if characters[i] != "\n" else "\n"
    return "".join(characters)


def _compiled(pattern: str, label: str) -> Any:
    """Compile PEFT's rule with RE2; raise WorkbenchError unless RE2 and Python both accept the pattern with the same meaning."""
    import re2

    problem = f"it has {len(pattern):,} characters, expected up to {MAX_LENGTH:,}" if len(pattern) > MAX_LENGTH else ""
    if _TWO_MEANINGS.search(pattern):
        problem = "{,n} and [[ mean different things in Python and RE2"
    if not problem:
        options = re2.Options()
        options.log_errors = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(rf"(.*\.)?({pattern})$")
            return re2.compile(rf"(?:.*\.)?(?:{pattern})", options)
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            problem = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        except (re.error, RecursionError, OverflowError) as error:
            problem = str(error)
    raise WorkbenchError(f"{label}: the pattern {pattern[:80]!r} is not supported: {problem[:120]}", _HINT)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DEFAULT = re.compile(
    r"(?<=\.)((?:lora|oft|hada|lokr|vera|boft|fourierft|randlora|vblora|trainable_tokens)_\w+|ia3_l|hra_u|modules_to_save)\.default(?=\.|$)"
)


class Adapter:
    """A PEFT adapter directory.

    It holds LoRA or a variant, AdaLoRA, DoRA, LoHa, LoKr, OFT, (IA)³, VeRA, BOFT, HRA, FourierFT, RandLoRA, VB-LoRA or trainable tokens.

    Raises:
        WorkbenchError: If there is no safetensors file, the tuner is not supported, or the stored tensors and the base do not
            determine the update.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label
        try:
            self.config: dict[str, Any] = jsondoc.read_object(path / CONFIG, f"{label}: {path / CONFIG}", unique=True)
        except FileNotFoundError:
            raise WorkbenchError(f"{label}: no {CONFIG} in {path}") from None
        with expecting(path, "an adapter of PEFT", "adapter", "pickle", "checkpoint"):
            check_kinds(self.config, f"{label}: {path / CONFIG}")
            check_config(self.config, label)
        if not (path / WEIGHTS).is_file():
            thing = look(path)
            raise WorkbenchError(
                f"{label}: expected {WEIGHTS} in {path}, found {thing.says if thing else 'no weights'}",
                thing.hint if thing else "Save it again with PEFT: model.save_pretrained(DIR, safe_serialization=True).",
            )
        self.entries = unwrapped(read_header(path / WEIGHTS), label, _DEFAULT)
        self._matchers: dict[str, Patterns] = {}

    @cached_property
    def keys(self) -> Keys:
        """The tensors by module and role."""
        return sort_keys(self.entries, TUNERS[self.config["peft_type"]], self.label)

    def modules(self) -> dict[str, tuple[Entry, Entry]]:
        """Return the factors of each module: (lora_A, lora_B) or (lora_embedding_A, lora_embedding_B)."""
        factors: dict[str, tuple[Entry, Entry]] = {}
        for part in self.keys.parts:
            a, b = (next((part.fields[n] for n in (f"lora_{x}", f"lora_embedding_{x}") if n in part.fields), None) for x in "AB")
            if a and b:
                factors[part.module + ".base_layer" * part.depth] = (a.entry, b.entry)
        return factors

    @property
    def meaning(self) -> dict[str, object]:
        """Configuration fields that change what the tensors mean."""
        return meaning(self.config)

    def scale(self, module: str, rank: int | None) -> float:
        """Return the scale of a module's update: alpha / rank, or alpha / √rank for rsLoRA.

        Args:
            module: The live module, or the live parameter of `target_parameters`.
            rank: Rank of the stored factors; None if they are stored whole (LoKr).
        """
        kind, size = self.config["peft_type"], self.size(module, rank)
        alpha = self.config.get("alpha" if kind in ("LOHA", "LOKR") else "lora_alpha")
        alpha = 8 if alpha is None else alpha
        if kind == "ADALORA":  # as in PEFT: the rank before pruning, plus 1e-5
            return float((alpha if alpha > 0 else size) / (self.config.get("init_r", 12) + 1e-5))
        alpha = self._patterns("alpha_pattern").value(module, alpha)
        return float(alpha / size**0.5 if kind == "LORA" and self.config.get("use_rslora") else alpha / size)

    def size(self, module: str, stored: int | None) -> float:
        """Return the rank that the configuration states for a module; for FourierFT, the number of frequencies.

        Args:
            module: The live module, or the live parameter of `target_parameters`.
            stored: What the stored tensors have; None if they do not tell.

        Raises:
            WorkbenchError: If the two differ. PEFT refuses such an adapter too, and with another rank the scale alpha / rank would be
                another one without a sign of it.
        """
        kind = self.config["peft_type"]
        field, pattern, default = SIZES[kind]
        value = self.config.get(field)
        size: float = default if value is None else value
        if pattern:
            size = self._patterns(pattern).value(module, size)
        elif kind == "ADALORA":
            masks = self.config.get("rank_pattern") or {}
            if (mask := masks.get(f"{module}.lora_E", masks.get(f"{module}.lora_E.default"))) is not None:
                field, size = "rank_pattern", sum(mask)
        if size < (kind != "ADALORA") or (stored is not None and stored != size):
            fields = f"{field} and {pattern}" if pattern and self.config.get(pattern) else field
            found, expected = (f"{n:g} frequencies" if kind == "FOURIERFT" else f"rank {n:g}" for n in (stored or 0, size))
            raise self.size_error(module, found, expected, fields)
        return size

    def check_blocks(self, module: str, inputs: int, stored: int) -> None:
        """Check the size of the blocks of a module of OFT or BOFT against the configuration.

        Raises:
            WorkbenchError: If the configuration states another size. PEFT itself changes a size that does not divide the inputs.
        """
        number, width, default = BLOCKS[self.config["peft_type"]]
        count, size = self.config.get(number) or 0, self.config.get(width)
        size = default if size is None else size
        if bool(count) != bool(size) and inputs % (size or count) == 0 and (size or inputs // count) != stored:
            stated = f"blocks of {size}" if size else f"{count} blocks of {inputs // count}"
            raise self.size_error(module, f"blocks of {stored}", stated, width if size else number)

    def size_error(self, module: str, stored: str, stated: str, fields: str) -> WorkbenchError:
        """Return the error of a module whose tensors have another size than the configuration states."""
        return WorkbenchError(
            f"{self.label}: {module} has {stored} in {self.path / WEIGHTS}; expected {stated}, by {fields} in {CONFIG}",
            f"PEFT refuses this adapter too. Save it again with PEFT, or correct {fields} in {self.path / CONFIG} to what it was trained with.",
        )

    def _patterns(self, field: str) -> Patterns:
        if field not in self._matchers:
            self._matchers[field] = Patterns(self.config.get(field), f"{self.label}: {self.path / CONFIG}: {field}")
        return self._matchers[field]
