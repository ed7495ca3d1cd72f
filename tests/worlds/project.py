"""A project folder on the tiny llama, as tests use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch

from workbench.ground.events import Events, no_events

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Project:
    """A project folder: recipes/, bricks/ and base/ (links to the session's)."""

    path: Path

    def write(self, text: str, name: str = "test.yaml") -> Path:
        """A recipe file; `version` and `base` are added where the text has none."""
        text = dedent(text)
        head = "" if "version:" in text else "version: 1\n"
        head += "" if "base:" in text else "base: base\n"
        file = self.path / "recipes" / name
        file.write_text(head + text, "utf-8")
        return file

    @classmethod
    def of(cls, folder: Path, models: Path) -> Project:
        """A project in a new folder, with links to all models in another one."""
        (folder / "recipes").mkdir()
        for path in models.iterdir():
            (folder / path.name).symlink_to(path)
        return cls(folder)

    def resolve(self, text: str, name: str = "test.yaml") -> Any:
        """The resolved recipe of a text."""
        from workbench.recipe.recipe import load_recipe
        from workbench.resolve.resolve import resolve

        return resolve(load_recipe(self.write(text, name)))

    def run(
        self,
        text: str,
        name: str = "test.yaml",
        *,
        device: torch.device = CPU,
        threads: int = 1,
        events: Events = no_events,
        out: Path | None = None,
    ) -> dict[str, Any]:
        """Execute the recipe of a text."""
        from workbench.run.device import Work
        from workbench.run.execute import execute

        return execute(self.resolve(text, name), self.path / "runs", Work(device, threads, events), out=out).to_dict()

    def tensors(self, text: str, dtype: torch.dtype | None = torch.float32) -> dict[str, torch.Tensor]:
        """The configuration's tensors in memory."""
        from workbench.models.live import compute
        from workbench.run.compose import compose

        return compute(compose(self.resolve(text), CPU).model, dtype, CPU)
