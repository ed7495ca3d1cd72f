"""Inline SVG elements with escaped attributes and contents."""

from __future__ import annotations

from markupsafe import Markup


def svg(tag: str, content: str = "", **attributes: object) -> Markup:
    """Return an element; in attribute names a trailing underscore is removed and others become hyphens."""
    names = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    listed = Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in names.items())
    return Markup("<{0}{1}>{2}</{0}>").format(tag, listed, content)


def joined(*parts: Markup) -> Markup:
    """Concatenate elements."""
    return Markup("").join(parts)
