"""Say what texts are about by a sentence encoder, a small model beside the base that gives each a vector of length 1.

A folder in the layout of sentence-transformers holds one: config.json, model.safetensors and a tokenizer, and in 1_Pooling/config.json
whether the vector is the mean over the tokens or the state of the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import file_digest, json_digest
from workbench.ground.lazy import no_grad, torch
from workbench.models.prompts import load_tokenizer
from workbench.models.sentences import modules_in, pooling_modes

if TYPE_CHECKING:
    from torch import Tensor

POOLING = "1_Pooling/config.json"
FILES = ("config.json", "model.safetensors", "modules.json", "tokenizer.json", POOLING)
"""Files of an encoder that decide its vectors."""
LAST = 48
"""Largest number of last tokens of a text that are read: the request stands at the end, and a text before it may be about anything."""
_BATCH = 32
_MODULES = ["Transformer", "Pooling", "Normalize"]


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder on disk, which is loaded when it is first used, and runs in float32 on the CPU.

    Attributes:
        path: Its folder.
        digest: Digest of its files.
        named: The folder as the recipe names it.
    """

    path: Path
    digest: str
    named: str

    @classmethod
    def of(cls, named: str, project: Path, expected: str | None = None) -> Encoder:
        """Return the encoder in a folder.

        Args:
            named: The folder, relative to the project.
            project: The project's folder.
            expected: Digest that it must have.

        Raises:
            WorkbenchError: If a file is missing, it makes its vectors in another way than the two that are known, or it is another.
        """
        path = project / Path(named).expanduser()
        if missing := [name for name in FILES if not (path / name).is_file()]:
            raise WorkbenchError(
                f"sentence encoder {named}: {missing[0]} is missing",
                "Name a folder that sentence-transformers wrote: config.json, model.safetensors, modules.json, tokenizer.json, 1_Pooling.",
            )
        found = cls(path, json_digest([file_digest(path / name) for name in FILES]), named)
        if expected not in (None, found.digest):
            raise WorkbenchError(
                f"sentence encoder {named}: is not the one that the router was fitted with (digest {found.digest[:10]}, recorded "
                f"{str(expected)[:10]})",
                "Put that one back, or run the recipe again.",
            )
        found.first  # noqa: B018  refuses other ways of pooling
        return found

    @cached_property
    def first(self) -> bool:
        """True if the vector is the state of the first token, and not the mean over all tokens."""
        modules = [name for name, _ in modules_in(self.path)]
        ways = pooling_modes(jsondoc.read_object(self.path / POOLING))
        way = ways[0] if len(ways) == 1 else None
        if modules not in (_MODULES, _MODULES[:2]) or way not in ("mean", "cls"):
            raise WorkbenchError(
                f"sentence encoder {self.named}: expected a transformer whose vector is the mean over its tokens or the state of the "
                f"first one, found the modules {', '.join(modules) or 'none'} with pooling {', '.join(ways) or 'none'}",
                "Name another encoder, such as all-MiniLM-L6-v2.",
            )
        return way == "cls"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        from transformers import AutoModel

        try:
            tokenizer = load_tokenizer(self.path)
            tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
            model = AutoModel.from_pretrained(self.path, dtype=torch.float32, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise WorkbenchError(
                f"sentence encoder {self.named}: transformers cannot load it: {str(error).splitlines()[0][:200]}"
            ) from error
        return model, tokenizer

    @no_grad
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return vectors of length 1 [text, size], float32, of the last tokens of each text."""
        model, tokenizer = self._loaded
        longest = LAST + tokenizer.num_special_tokens_to_add()
        different = sorted(dict.fromkeys(texts), key=len)
        found: dict[str, Tensor] = {}
        for start in range(0, len(different), _BATCH):
            batch = different[start : start + _BATCH]
            rows = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            states = model(**rows).last_hidden_state
            mask = rows["attention_mask"][..., None].float()
            vectors = states[:, 0] if self.first else (states * mask).sum(1) / mask.sum(1)
            found |= zip(batch, torch.nn.functional.normalize(vectors, dim=1), strict=True)
        return torch.stack([found[text] for text in texts])
