"""Settings of the documentation site. `make site` builds it from the pages as they stand, without the network.

The pages are plain Markdown, so that they read well on GitHub. What only the site needs is added while it is built:

- The navigation. `docs/index.md` lists the pages by section; a page `NAME.md` is the parent of the pages `NAME-*.md` and `NAME/*.md` that it links.
- The API reference. A comment `<!-- autodoc MODULE: NAMES -->` becomes the signatures and docstrings of these names.
- Notebooks as pages: their Markdown cells, their code and the texts that it shows.
- Links to folders, and to Markdown files that are no pages, lose their target: the site holds pages and files only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import yaml
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))  # its neighbors

from notebook_outputs import text_of

ROOT = Path(__file__).resolve().parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))

project = "brick-workbench"
author = "The brick-workbench contributors"
version = release = CITATION["version"]
copyright = author

root_doc = "docs/index"
include_patterns = ["docs/**", "CONTRIBUTING.md", "CHANGELOG.md", "README.md", "SECURITY.md", "CODE_OF_CONDUCT.md"]
exclude_patterns = ["docs/schemas/**"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
suppress_warnings = ["misc.highlighting_failure"]  # excerpts of JSON and YAML with an ellipsis

myst_heading_anchors = 4
smartquotes = False  # `--set` is no dash
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_static_path = ["site.css", "site.js"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_title = f"{project} {version}"
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_theme_options: dict[str, list[str]] = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "friendly", "monokai"

LINK = re.compile(r"\[([^\]\n]+)\]\(([^()\s#]+\.(?:md|ipynb))(?:#[^)\s]*)?\)")
ANY_LINK = re.compile(r"\[([^\]\n]+)\]\(([^()\s#:]+)(?:#[^)\s]*)?\)")
# A paragraph that links a CSV file: the site shows its table.
CSV = re.compile(r"^\[[^]]*\]\(([\w-]+\.csv)\).*$", re.MULTILINE)
AUTODOC = re.compile(r"<!-- autodoc (?P<module>[\w.]+): (?P<names>.+?) -->")


def setup(app: Sphinx) -> None:
    """Connect the transformations of the pages."""
    app.connect("source-read", on_source)
    app.connect("build-finished", write_entrance)


def on_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace a page's text by the text that the site shows."""
    text = source[0]
    if str(app.env.doc2path(docname)).endswith(".ipynb"):
        text = notebook(text)
    text = CSV.sub(csv_table, text)
    text = ANY_LINK.sub(lambda m: m[0] if is_linked(app, docname, m[2]) else m[1], text)
    text = AUTODOC.sub(lambda m: autodoc(m["module"], m["names"].split(", ")), text)
    if docname == root_doc:
        text += index_trees(text)
    else:
        name = PurePosixPath(docname).name
        children = {target: "" for _, target in LINK.findall(text) if parent_of(target) == name}
        text += tree("", children) if children else ""
    source[0] = text


def csv_table(link: re.Match[str]) -> str:
    """Return the table of a CSV file that a paragraph links."""
    return f"```{{csv-table}}\n:file: {link[1]}\n:header-rows: 1\n:class: searched\n```"


def parent_of(page: str) -> str | None:
    """Return the page of docs/ under which a page stands: the longest beginning of its name that is a page."""
    name = page.removesuffix(".md")
    ends = [m.start() for m in re.finditer(r"[-/]", name)]
    return next((name[:end] for end in reversed(ends) if (ROOT / "docs" / f"{name[:end]}.md").is_file()), None)


def is_linked(app: Sphinx, docname: str, target: str) -> bool:
    """Return True unless a link leads to a folder, or to a Markdown file that is no page. A missing target stays, as an error."""
    path = (Path(app.env.doc2path(docname)).parent / target).resolve()
    if path.is_dir():
        return False
    return path.suffix != ".md" or not path.is_file() or app.env.path2doc(path) in app.env.found_docs


def notebook(text: str) -> str:
    """Return a notebook as Markdown, with the texts among its outputs."""
    parts = []
    for cell in json.loads(text)["cells"]:
        body = "".join(cell["source"]).strip()
        parts.append(body if cell["cell_type"] == "markdown" else f"```python\n{body}\n```")
        if said := text_of(cell.get("outputs", [])).strip():
            parts.append(f"````text\n{said}\n````")
    return "\n\n".join(parts) + "\n"


def autodoc(module: str, names: list[str]) -> str:
    """Return the directives that document some names of a module."""
    lines = [f".. currentmodule:: {module}", ""]
    for name in names:
        kind = "autoclass" if name[:1].isupper() else "autofunction"
        lines += [f".. {kind}:: {name}", *(["   :members:", ""] if kind == "autoclass" else [""])]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def index_trees(text: str) -> str:
    """Return a navigation tree for each section of the index, with the pages that the section links."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return "".join(
        tree(caption, {page: label for label, page in LINK.findall(body)})
        for caption, body in zip(parts[::2], parts[1::2], strict=True)
        if LINK.search(body)
    )


def tree(caption: str, pages: Mapping[str, str]) -> str:
    """Return a hidden table of contents.

    Args:
        caption: Heading of the section; empty for the children of a page.
        pages: Page, as a link names it -> its title in the navigation; empty: the page's own.
    """
    head = f":caption: {caption}\n" if caption else ""
    lines = []
    for page, label in pages.items():
        # A page of the repository's root stands outside docs/, and names of documents have no suffix.
        name = re.sub(r"\.(md|ipynb)$", "", f"/{page.removeprefix('../')}" if page.startswith("../") else page)
        lines.append(f"{label} <{name}>" if label else name)
    return f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n{head}\n" + "\n".join(lines) + "\n```\n"


def write_entrance(app: Sphinx, exception: Exception | None) -> None:
    """Write index.html at the site's root, which leads to the documentation's first page."""
    if exception is None and app.builder.format == "html":
        text = '<!doctype html><meta charset="utf-8"><title>brick-workbench</title><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(text + '<a href="docs/index.html">Documentation</a>\n', "utf-8")
