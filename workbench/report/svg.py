"""Inline SVG elements with escaped attributes and contents.

The reports draw their charts with these few lines and not with a chart library, for three reasons. A page stays below 2 MB: an interval chart
of 12 rows takes 7 kB with its hover texts, twice that from matplotlib without them, and 900 kB from Altair with its script. A page works
offline under a content security policy that allows one script by its hash; charts that are drawn by scripts would be empty in print, in mail
and without scripts. And a page has colors for light and dark, verdicts that shapes tell apart in gray, intervals inside intervals and labels
without overlaps; with a library, each of these would be a layer written by hand. `figures` makes files that need no style sheet from the same
drawings.
"""

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
