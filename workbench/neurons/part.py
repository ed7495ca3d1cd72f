"""The analyses of neurons: `workbench analyze` finds what functions and facts use, and `workbench edit trace` traces facts through layers. At most 305 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"analyze": "neurons.commands.analyze.analyze", "edit trace": "neurons.commands.trace.trace"},
    documents={"analyze": "neurons.analysis.NeuronsResult", "edit trace": "neurons.trace.TraceTable"},
)
