"""Write every test file under evals/tasks/data and every training file under bricks/.

python evals/skills/build.py           writes the files that differ
python evals/skills/build.py --check   writes nothing; exit status 1 when a file differs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import actions
import add
import dates
import facts
import families
import forgetting
import fresh
import glossary
import paraphrases
import record
import replay
import retention
import reverse
import triage
from skillkit import Skill, encode, sync, test_rows, train_rows

SKILLS: tuple[Skill, ...] = (
    add.SKILL,
    reverse.SKILL,
    triage.SKILL,
    actions.SKILL,
    glossary.SKILL,
    record.SKILL,
    dates.DMY,
    dates.MDY,
)
PROJECT = Path(__file__).resolve().parents[2]


def negatives(project: Path) -> list[dict[str, str]]:
    """Return requests that no brick is for, with which routers are fitted: the first four tasks of each function of evals/abilities.jsonl."""
    tasks: dict[str, list[str]] = {}
    rows = [json.loads(line) for line in (project / "evals" / "abilities.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        own = tasks.setdefault(row["function"], [])
        if row["task"] not in own:
            own.append(row["task"])
    return [{key: row[key] for key in ("task", "prompt")} for row in rows if row["task"] in tasks[row["function"]][:4]]


def files(project: Path) -> dict[Path, bytes]:
    """Every generated file of the project with the bytes it has to hold."""
    data = project / "evals" / "tasks" / "data"
    found = {
        data / "retention.jsonl": encode(retention.rows()),
        data / "facts.jsonl": encode(facts.rows(rephrased=False)),
        data / "facts-rephrased.jsonl": encode(facts.rows(rephrased=True)),
        data / "functions-told.jsonl": encode(families.rows(told=True)),
        data / "functions-stripped.jsonl": encode(families.rows(told=False)),
        project / "evals" / "routing" / "development.jsonl": encode(paraphrases.rows(SKILLS, "development")),
        project / "evals" / "routing" / "unseen.jsonl": encode(paraphrases.rows(SKILLS, "unseen")),
        project / "evals" / "routing" / "near-misses.jsonl": encode(paraphrases.near_rows(SKILLS)),
        project / "evals" / "routing" / "chat.jsonl": encode(paraphrases.chat_rows()),
        project / "evals" / "routing" / "two-requests.jsonl": encode(paraphrases.two_rows(SKILLS)),
        project / "evals" / "routing" / "fresh.jsonl": encode(fresh.rows(SKILLS)),
        project / "workbench" / "route" / "deciding" / "negatives.jsonl": encode(negatives(project)),
        data / "known-facts.jsonl": encode(forgetting.far_rows()),
        project / "recipes" / "facts" / "harbour.jsonl": encode(facts.edit_rows()),
        project / "recipes" / "facts" / "capitals-forget.jsonl": encode(forgetting.edit_rows("forget")),
        project / "recipes" / "facts" / "capitals-kept.jsonl": encode(forgetting.edit_rows("kept")),
    }
    # What recipes that train on two summed skills rehearse: rows of both, and neutral prompts.
    parts = zip(
        *(rows[:200] for rows in (train_rows(add.SKILL), train_rows(reverse.SKILL), replay.rows("glossary"))), strict=True
    )
    rehearsal = [{key: row[key] for key in ("prompt", "completion") if key in row} for rows in parts for row in rows]
    found[project / "recipes" / "texts" / "rehearsal.jsonl"] = encode(rehearsal)
    for group in forgetting.GROUPS:
        found[data / f"capitals-{group}.jsonl"] = encode(forgetting.capital_rows(group))
    for skill in SKILLS:
        found[data / f"{skill.name}.jsonl"] = encode(test_rows(skill))
        found[project / "bricks" / skill.name / "train.jsonl"] = encode(train_rows(skill))
        found[project / "bricks" / skill.name / "replay.jsonl"] = encode(replay.rows(skill.name))
    return found


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status."""
    check = "--check" in arguments
    stale = sync(files(PROJECT), check=check)
    for path in stale:
        sys.stdout.write(f"{'differs' if check else 'written'}: {path.relative_to(PROJECT)}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
