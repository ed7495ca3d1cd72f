"""Replace rows of a results file by those of a later measurement of the same benchmark; the file then names both.

python benchmarks/edit_methods.py --neighbours 2 --methods memory --out later.json
python benchmarks/merge_rows.py later.json benchmarks/results/edit-methods.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

APART = ("machine", "command", "commit", "date", "rows")


def main() -> None:
    """Write the file of the second argument again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("later", type=Path)
    parser.add_argument("into", type=Path)
    options = parser.parse_args()
    later, into = (json.loads(path.read_text("utf-8")) for path in (options.later, options.into))
    if different := [key for key in later if key not in APART and later[key] != into.get(key)]:
        sys.exit(f"{options.later} was not measured as {options.into} was: {', '.join(different)} differ")
    rows = {row["row"]: row for row in later["rows"]}
    if unknown := rows.keys() - {row["row"] for row in into["rows"]}:
        sys.exit(f"{options.into} has no rows {', '.join(sorted(unknown))}")
    into["rows"] = [rows.get(row["row"], row) for row in into["rows"]]
    kept = [one for one in into.get("later", []) if not rows.keys() >= set(one["rows"])]
    into["later"] = [*kept, {**{key: later[key] for key in APART[:-1]}, "rows": list(rows)}]
    options.into.write_text(json.dumps(into, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
