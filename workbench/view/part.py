"""The viewer: `workbench view` shows a project in the browser, and --watch a report that grows. At most 85 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"view": "view.commands.view"},
    watch="view.watch",
    extras={"view": {"starlette": "starlette", "uvicorn": "uvicorn"}},
    needs=("search", "upkeep"),
)
