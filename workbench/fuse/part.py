"""Steps with `fuse`: the base learns the distributions of several models, whatever their architectures and tokenizers are."""

from workbench.ground.parts import Part

PART = Part(kinds={"fuse": "fuse.teaching.kind.KIND"})
