"""Models of sentence-transformers: whether bricks have the base's modules. At most 5 names."""

from workbench.ground.parts import Part

PART = Part(sentences="embeddings.modules")
