"""Inline SVG elements with escaped attributes and contents."""

from __future__ import annotations

from markupsafe import Markup


def svg(tag: str, content: str = "", **attributes: object) -> Markup:
    """An element; `class_` and the like lose the underscore at the end, inner underscores become hyphens."""
    names = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    listed = Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in names.items())
    return Markup("<{0}{1}>{2}</{0}>").format(tag, listed, content)


def joined(*parts: Markup) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)
