"""The chat of the viewer: one prompt for up to three configurations, whose answers are sent while they are generated."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from workbench.api.chatting import Speaker, open_speakers
from workbench.api.naming import find, open_named
from workbench.ground.errors import UsageError, WorkbenchError, shell
from workbench.view.growing import event

MOST, LONGEST = 512, 20_000
"""Largest number of tokens of an answer, and of characters of a prompt."""
Tell = Callable[[str, object], None]


class Asked(BaseModel):
    """What the page asks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    names: list[Annotated[str, Field(min_length=1, max_length=500)]] = Field(min_length=1, max_length=3)
    prompt: str = Field(min_length=1, max_length=LONGEST)
    tokens: int = Field(ge=1, le=MOST)
    plain: bool = False


class Talk:
    """The models that the chat page asks. Those of the last question stay in memory; one question is answered at a time.

    Args:
        device: Value of `--device`.
    """

    def __init__(self, device: str) -> None:
        self._device, self._busy = device, threading.Lock()
        self._loaded: tuple[tuple[object, ...], list[Speaker], str] = ((), [], "")

    async def answers(self, asked: Asked) -> AsyncIterator[str]:
        """Yield events: for each configuration `model` with its number, `piece`s of its answer and `done`; `note` and `error`; and `end`."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        loop, stopped = asyncio.get_running_loop(), threading.Event()

        def tell(name: str, data: object) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event(name, data))

        def work() -> None:
            try:
                self._answer(asked, tell, stopped.is_set)
            except WorkbenchError as error:
                tell("error", {"message": error.message, "hint": error.hint or ""})
            except Exception as error:  # noqa: BLE001  the page says it: a model's own code may fail in any way
                tell("error", {"message": f"{type(error).__name__}: {error}", "hint": ""})
            finally:
                self._busy.release()
                loop.call_soon_threadsafe(queue.put_nowait, None)

        if not self._busy.acquire(blocking=False):
            yield event("error", {"message": "another question is being answered", "hint": "Wait for it, or stop it."})
            return
        threading.Thread(target=work, daemon=True).start()
        try:
            while (text := await queue.get()) is not None:
                yield text
            yield event("end")
        finally:
            stopped.set()

    def _answer(self, asked: Asked, tell: Tell, stop: Callable[[], bool]) -> None:
        speakers, note = self._speakers(asked, tell)
        tell("note", note)
        for number, speaker in enumerate(speakers):
            if stop():
                return
            started = time.monotonic()
            kind = "chat template" if speaker.templated else "plain text"
            tell("model", {"number": number, "kind": kind})
            speaker.history.clear()  # each question stands alone
            reply = speaker.answer(asked.prompt, asked.tokens, partial(tell, "piece"), stop)
            seconds = round(time.monotonic() - started, 1)
            tell("done", {"seconds": seconds, "first": reply.first, "acted": reply.acted, "make": makes(speaker.name)})

    def _speakers(self, asked: Asked, tell: Tell) -> tuple[Sequence[Speaker], str]:
        """Return the models, loaded anew if another choice was asked before or their files have changed."""
        from workbench.models.identity import pick_device

        for name in asked.names:
            if find(name).path is None:
                raise UsageError(f"{name}: is no recipe, run or model on this machine", "Download it first: workbench chat NAME")
        stamps = [open_named(name).resolved.stamp for name in asked.names]
        key = (*asked.names, *stamps, asked.plain)
        if self._loaded[0] != key:
            self._loaded = ((), [], "")
            gc.collect()
            tell("note", "Loading.")
            notes: list[str] = []
            speakers = open_speakers(asked.names, None, pick_device(self._device), plain=asked.plain, say=notes.append)
            self._loaded = key, speakers, " ".join(f"{note[0].upper()}{note[1:]}." for note in notes)
        return self._loaded[1], self._loaded[2]


def makes(name: str) -> str:
    """Return the command that makes a configuration; "" for a model that is made already."""
    found = find(name)
    if found.kind == "recipe":
        return shell("workbench", "run", name)
    return shell("workbench", "run", f"{found.typed}/recipe.yaml") if found.kind == "run" else ""
