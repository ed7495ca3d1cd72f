"""Steps with `fuse`: the base learns the distributions of several models, whatever their architectures and tokenizers are. At most 62 names."""

from workbench.ground.parts import Part

PART = Part(kinds={"fuse": "fuse.teaching.kind.KIND"})
