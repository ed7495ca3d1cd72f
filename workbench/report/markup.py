"""A page as a tree, and the style that its style sheet gives to the elements of drawings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "input", "img", "hr"}
_VARIABLE = re.compile(r"var\((--[\w-]+)(?:,\s*((?:[^()]|\([^()]*\))*))?\)")
_COLOR = re.compile(r"rgb\((\d+)\s+(\d+)\s+(\d+)(?:\s*/\s*([\d.]+))?\)")
STYLED = (
    "fill",
    "fill-opacity",
    "stroke",
    "stroke-opacity",
    "stroke-width",
    "stroke-dasharray",
    "stroke-linejoin",
    "stroke-linecap",
    "paint-order",
    "opacity",
    "vector-effect",
    "font-size",
    "font-weight",
    "text-anchor",
    "display",
)
"""Properties of the style sheet that drawings need."""
COLORED = ("background", "border-color", "color")


@dataclass(eq=False)
class Node:
    """An element of a page.

    Attributes:
        tag: Name of the element.
        attributes: Its attributes.
        parent: The element around it.
        children: Elements and texts in it.
    """

    tag: str
    attributes: dict[str, str]
    parent: Node | None = None
    children: list[Node | str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Names of its style classes."""
        return self.attributes.get("class", "").split()

    def each(self, *tags: str) -> Iterator[Node]:
        """Yield the elements inside with one of these tags, in the order of the page; without tags, all of them."""
        for child in self.children:
            if isinstance(child, Node):
                if not tags or child.tag in tags:
                    yield child
                yield from child.each(*tags)

    def nodes(self) -> list[Node]:
        """Return the elements that are its children."""
        return [child for child in self.children if isinstance(child, Node)]

    def text(self, apart: Sequence[str] = ()) -> str:
        """Return the text inside with single spaces, without that of titles, scripts and elements of the classes `apart`."""
        return " ".join("".join(self._texts(apart)).split())

    def _texts(self, apart: Sequence[str]) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            elif child.tag not in ("title", "script", "template") and not set(apart) & set(child.classes):
                apart_here = {"sub", "brick"} & set(child.classes) or (child.tag == "span" and self.tag in ("h3", "h4"))
                yield from (" ", *child._texts(apart)) if apart_here else child._texts(apart)

    def above(self) -> Iterator[Node]:
        """Yield the elements around it, the nearest first."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent


class _Builder(HTMLParser):
    """Builds the tree of a page of this package, whose elements are all closed, options of a select excepted."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.at = Node("page", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        node = Node(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(node)
        if tag not in VOID:
            self.at = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Add an element without content."""
        self.at.children.append(Node(tag, {name: value or "" for name, value in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        """Close an element, and those in it that were left open."""
        for node in (self.at, *self.at.above()):
            if node.tag == tag and node.parent is not None:
                self.at = node.parent
                return

    def handle_data(self, data: str) -> None:
        """Add a text."""
        self.at.children.append(data)


def parsed(page: str) -> Node:
    """Return a page as a tree; HTMLParser writes names of tags and attributes in small letters."""
    builder = _Builder()
    builder.feed(page)
    builder.close()
    return builder.root


@dataclass(frozen=True)
class _Rule:
    """A rule of the style sheet: the parts of its selector from the outside in, its weight, and its properties."""

    parts: tuple[tuple[str, frozenset[str], str], ...]
    weight: tuple[int, int, int]
    properties: Mapping[str, str]


class Styles:
    """The style that a page's style sheet gives to elements, in light colors.

    Selectors of tags, classes and ids, one inside another, are followed. Rules of media, states and other selectors are left out, since
    drawings do not need them.
    """

    def __init__(self, css: str) -> None:
        plain = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", re.sub(r"/\*.*?\*/", "", css, flags=re.S))
        self._variables: dict[str, str] = {}
        self._rules: list[_Rule] = []
        for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", plain):
            pairs = (entry.split(":", 1) for entry in body.split(";") if ":" in entry)
            properties = {name.strip(): value.strip() for name, value in pairs}
            kept = {n: v for n, v in properties.items() if n in STYLED or n in COLORED or n.startswith("--")}
            for selector in map(str.strip, selectors.split(",")):
                if selector == ":root":
                    self._variables |= kept
                elif kept and re.fullmatch(r"[\w\s.#-]+", selector):
                    self._rules.append(_rule(selector, kept))
        self._rules.sort(key=lambda rule: rule.weight)
        self._known: dict[tuple[object, ...], dict[str, str]] = {}

    def own(self, node: Node) -> dict[str, str]:
        """Return the properties that the style sheet and the element's `style` give to an element itself."""
        chain = [(n.tag, frozenset(n.classes), n.attributes.get("id", "")) for n in (node, *node.above())]
        key = tuple(chain)
        if key not in self._known:
            found: dict[str, str] = {}
            for rule in self._rules:
                if _matches(rule.parts, chain):
                    found |= rule.properties
            self._known[key] = found
        inline = (entry.split(":", 1) for entry in node.attributes.get("style", "").split(";") if ":" in entry)
        return self._known[key] | {name.strip(): value.strip() for name, value in inline}

    def resolved(self, value: str, around: Sequence[Node]) -> str:
        """Return a value with its variables replaced by what the elements around it set, the nearest first."""
        for _ in range(8):
            if (found := _VARIABLE.search(value)) is None:
                break
            name, default = found.groups()
            set_here = next((v for node in around if (v := self.own(node).get(name)) is not None), None)
            text = set_here if set_here is not None else self._variables.get(name, default or "")
            value = value[: found.start()] + text + value[found.end() :]
        return value

    def presentation(self, node: Node, around: Sequence[Node]) -> dict[str, str]:
        """Return the attributes that give an element of a drawing its look without a style sheet.

        Args:
            node: The element.
            around: The element and those around it, the nearest first.
        """
        attributes: dict[str, str] = {}
        for name, raw in self.own(node).items():
            if name not in STYLED:
                continue
            value = self.resolved(raw, around).replace("!important", "").strip()
            color, opacity = solid(value)
            attributes[name] = "none" if value == "transparent" else color.removesuffix("px")
            if opacity is not None and name in ("fill", "stroke"):
                attributes.setdefault(f"{name}-opacity", opacity)
        return attributes


def solid(value: str) -> tuple[str, str | None]:
    """Return a color as hexadecimal digits and its opacity, None if it is opaque; other values are returned as they are."""
    found = _COLOR.fullmatch(value.strip())
    if found is None:
        return value, None
    red, green, blue, opacity = found.groups()
    return f"#{int(red):02x}{int(green):02x}{int(blue):02x}", opacity


def _rule(selector: str, properties: Mapping[str, str]) -> _Rule:
    parts = []
    for part in selector.split():
        tag, classes = re.match(r"[\w-]*", part), frozenset(re.findall(r"\.([\w-]+)", part))
        ident = re.search(r"#([\w-]+)", part)
        parts.append((tag.group() if tag else "", classes, ident.group(1) if ident else ""))
    weight = (sum(bool(p[2]) for p in parts), sum(len(p[1]) for p in parts), sum(bool(p[0]) for p in parts))
    return _Rule(tuple(parts), weight, properties)


def _matches(parts: Sequence[tuple[str, frozenset[str], str]], chain: Sequence[tuple[str, frozenset[str], str]]) -> bool:
    """Return True if the last part of a selector fits the first element of the chain, and the others fit elements around it."""
    if not _fits(parts[-1], chain[0]):
        return False
    rest = iter(chain[1:])
    return all(any(_fits(part, node) for node in rest) for part in reversed(parts[:-1]))


def _fits(part: tuple[str, frozenset[str], str], node: tuple[str, frozenset[str], str]) -> bool:
    tag, classes, ident = part
    return (not tag or tag == node[0]) and classes <= node[1] and (not ident or ident == node[2])
