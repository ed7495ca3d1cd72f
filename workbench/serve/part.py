"""The server: `workbench serve` answers OpenAI's clients with a configuration, in this process or before a LoRA server. At most 193 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"serve": "serve.commands.serve"},
    extras={"view": {"starlette": "starlette", "uvicorn": "uvicorn"}, "json": {"llguidance": "llguidance"}},
    needs=("ship",),
)
