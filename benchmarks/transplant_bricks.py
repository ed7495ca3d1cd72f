"""Bricks carried to siblings of their base, beside training anew: the source of the table in docs/carrying.md.

    python benchmarks/transplant_bricks.py
    python benchmarks/transplant_bricks.py --skills reverse --siblings release --limit 16 --steps 4 --seeds 1     a quick look
    python benchmarks/transplant_bricks.py --tiny --limit 4 --steps 2 --seeds 1                               tries the whole on a random model
    python benchmarks/transplant_bricks.py --folder DIR                                  keeps models and scores, so that a later call goes on
    python benchmarks/transplant_bricks.py --add --skills record                              adds skills to the results file, with the same other options

Three siblings of the starter base are made here:

    short      twelve of its thirty layers left out (every second one from layer 4 on), then distilled for some steps on plain texts
    wide       `grow: width` with a sixth more neurons
    release    the base after a full fine-tune on other text (pages of Python's reference)

Each skill's brick is carried to each sibling in the ways that fit it (`workbench brick transplant`, always forced, so that failures are measured too)
and scored on all items of the skill's task. The way with the lowest loss on held-out training texts is then trained for some steps, beside a new adapter of
the same modules and rank that is trained for equally many steps on the same texts; both with several seeds. `kept` is the share of the brick's own gain on its
base: (score - sibling) / (brick on base - base). Results go to benchmarks/results/transplant-bricks.json after every brick.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from edit_setup import CPU, PROJECT, STARTER, make_project, one_thread, show
from record import keep_head, parser_of, write_results

from workbench.adapters.bind import bind
from workbench.adapters.export import write_adapter
from workbench.adapters.read import Adapter
from workbench.bricks.locate import resolve_base
from workbench.compare.tables import tables_of
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.plans import plans
from workbench.evaluate.scoring import score_all
from workbench.models.hooks import frozen
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import TextRow, encode, read_texts
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.scores.paired import paired
from workbench.scores.store import ScoreStore
from workbench.scores.suite import Suite
from workbench.train.rows import batch_loss, collate
from workbench.transplant.carried import acting
from workbench.transplant.inputs import Wanted
from workbench.transplant.transplant import transplant
from workbench.weights.lowrank import Factors

SKILLS = ("add", "reverse", "glossary", "record")
PLAIN = "recipes/texts/plain.jsonl"
LEFT_OUT = 12
WIDTH = 96
"""Tokens of a row that a sibling is trained on."""
# Sibling -> way -> options of the transplant.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "short": {
        "skip": {},
        "map": {"mapping": "kept"},
        "map, ridge": {"mapping": "kept", "by": "ridge"},
    },
    "wide": {"assign": {"by": "assign"}, "ridge": {"by": "ridge"}},
    "release": {"copy": {"by": "copy"}, "ridge": {"by": "ridge"}},
}


def main() -> None:
    """Make siblings, carry, train, score, and write the results file after every brick."""
    parser = parser_of(__doc__, "transplant-bricks")
    parser.add_argument("--skills", nargs="+", default=list(SKILLS), choices=list(SKILLS))
    parser.add_argument("--siblings", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings of a kind")
    parser.add_argument("--steps", type=int, default=30, help="steps of each training of an adapter")
    parser.add_argument("--rate", type=float, default=1e-3, help="their learning rate")
    parser.add_argument("--texts", type=int, default=200, help="training texts of a skill to carry and train on")
    parser.add_argument("--sibling-steps", type=int, default=200, help="steps that distil `short` and fine-tune `release`")
    parser.add_argument("--limit", type=int, help="maximum number of items of a task, for a quick look")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers with random bricks, to try the whole")
    parser.add_argument("--add", action="store_true", help="keep the rows of other skills in the results file")
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call can resume")
    parser.add_argument("--note", default="", help="sentence for the results file, such as what else ran on the machine")
    options = parser.parse_args()
    one_thread()
    before = json.loads(options.out.read_text("utf-8")) if options.add else None
    started, rows = time.perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        project = (options.folder or Path(scratch)).resolve()
        if options.tiny:
            make_tiny(project, options.skills)
        else:
            make_project(project, PROJECT / STARTER, [])
        for sibling in options.siblings:
            make_sibling(project, sibling, options)
            for skill in options.skills:
                rows += carried(project, sibling, skill, options)
                found = document(rows, options, time.perf_counter() - started)
                write_results(options.out, found if before is None else together(before, found))
                if before is not None:
                    keep_head(options.out, before, options.skills)


def together(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return a results file with the rows of other skills that were measured before.

    Raises:
        SystemExit: If these were measured with other options.
    """
    if other := [key for key in ("base", "seeds", "steps", "texts", "sibling_steps", "limit") if before[key] != found[key]]:
        raise SystemExit(f"--add: the results file was measured with {', '.join(f'{k} {before[k]}' for k in other)}")
    skills = [*(skill for skill in before["skills"] if skill not in found["skills"]), *found["skills"]]
    rows = [row for row in before["rows"] if row["skill"] not in found["skills"]] + found["rows"]
    siblings = sorted({row["sibling"] for row in rows}, key=list(WAYS).index)
    rows.sort(key=lambda row: (siblings.index(row["sibling"]), skills.index(row["skill"])))
    return {**found, "skills": skills, "siblings": siblings, "rows": rows, "seconds": before["seconds"] + found["seconds"]}


def document(rows: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the results file."""
    return {
        **({"note": options.note} if options.note else {}),
        "base": "a random tiny model" if options.tiny else "the starter base",
        "skills": options.skills,
        "siblings": sorted({row["sibling"] for row in rows}, key=list(WAYS).index),
        "seeds": options.seeds,
        "steps": options.steps,
        "texts": options.texts,
        "sibling_steps": options.sibling_steps,
        "limit": options.limit,
        "seconds": round(seconds),
        "rows": rows,
    }


def make_tiny(project: Path, skills: list[str]) -> None:
    """Write a project with a random base that has the starter's tokenizer, and random adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    (project / "recipes").mkdir(parents=True, exist_ok=True)
    (project / "evals").symlink_to(PROJECT / "evals", target_is_directory=True)
    tokenizer = load_tokenizer(PROJECT / STARTER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(project / "base")
    tokenizer.save_pretrained(project / "base")
    for skill in skills:
        settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(project / "base"), settings)
        adapted.peft_config["default"].base_model_name_or_path = "base"
        adapted.save_pretrained(project / "bricks" / skill, save_embedding_layers=False)
        (project / "bricks" / skill / "train.jsonl").symlink_to(PROJECT / "bricks" / skill / "train.jsonl")


def kept_layers(project: Path) -> list[int]:
    """Return the layers of the base that `short` keeps."""
    depth = resolve_base("base", project)[0].config["num_hidden_layers"]
    count = LEFT_OUT if depth > 2 * LEFT_OUT else depth // 2
    first = max(0, (depth - 2 * count) // 2 + 1)
    gone = set(range(first, first + 2 * count, 2)[:count])
    return [layer for layer in range(depth) if layer not in gone]


def make_sibling(project: Path, sibling: str, options: argparse.Namespace) -> None:
    """Write a sibling of the base as a checkpoint, unless it is there."""
    if (project / sibling).is_dir():
        return
    config = resolve_base("base", project)[0].config
    steps: dict[str, list[dict[str, Any]]] = {
        "short": [{"grow": "stack", "order": kept_layers(project)}],
        "wide": [{"grow": "width", "neurons": config["intermediate_size"] * 7 // 6}],
        "release": [],
    }
    if not steps[sibling]:
        train(project, "base", sibling, list(topics.values()), options.sibling_steps)
        return
    data = {"version": 1, "name": sibling, "base": "base", "steps": steps[sibling], "output": {"dtype": "float32"}}
    made = execute(resolve(from_data(data, project)), project / "runs", Work(CPU, 1, show))
    if sibling == "wide":
        Path(made.place).rename(project / sibling)
        return
    plain = [text.prompt + " " + text.answer for text in read_texts(PROJECT / PLAIN, PLAIN)]
    train(project, made.place, sibling, plain, options.sibling_steps, teacher="base")


def train(project: Path, start: str, out: str, texts: list[str], steps: int, teacher: str | None = None) -> None:
    """Train all weights of a model on texts, or on what a teacher says on them, and write it."""
    model, tokenizer = live(project, start), load_tokenizer(project / "base")
    other = live(project, teacher) if teacher else None
    tokens = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if other else 2e-5, weight_decay=0.0)
    for step in range(steps):
        starts = torch.randint(0, max(1, len(tokens) - WIDTH), (8,), generator=generator).tolist()
        batch = torch.stack([tokens[s : s + WIDTH] for s in starts])
        logits = model(batch).logits
        if other is None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = other(batch).logits.log_softmax(-1).flatten(0, 1)
            loss = torch.nn.functional.kl_div(
                logits.log_softmax(-1).flatten(0, 1), wanted, reduction="batchmean", log_target=True
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"{out}, step {step}: {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(project / out)
    tokenizer.save_pretrained(project / out)


def live(project: Path, name: str) -> Any:
    """Return a model of the project in float32."""
    checkpoint, _ = resolve_base(name, project)
    return live_model(checkpoint.config, compute(Model(checkpoint, checkpoint.config), torch.float32, CPU), checkpoint.path, CPU)


def carried(project: Path, sibling: str, skill: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Carry a brick in all ways, train the best one and a new one, and return one row for each configuration that is scored."""
    folder = project / "carried" / sibling / skill
    texts = folder / "texts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = (project / "bricks" / skill / "train.jsonl").read_text("utf-8").splitlines()
    texts.write_text("\n".join(lines[: options.texts]) + "\n", "utf-8")
    reports: dict[str, dict[str, Any]] = {}
    for way, settings in WAYS[sibling].items():
        chosen = {**settings}
        if "mapping" in chosen:
            chosen["mapping"] = ",".join(f"{new}:{old}" for new, old in enumerate(kept_layers(project)))
        out = folder / way.replace(", ", "-")
        if not (out / "transplant.json").is_file():
            wanted = Wanted(project / "bricks" / skill, sibling, "base", texts=texts, force=True, **chosen)
            transplant(wanted, out, project=project, device=CPU, events=show)
        reports[way] = json.loads((out / "transplant.json").read_text("utf-8"))
    best = min(reports, key=lambda way: float(reports[way]["loss"]["after"]))
    trainings = trained(project, sibling, folder, best, options)
    arms = {way: folder / way.replace(", ", "-") for way in reports} | trainings
    rows = scored(project, sibling, skill, arms, options)
    for row in rows:
        way = row["way"]
        if way in reports:
            report = reports[way]
            row |= {"loss": report["loss"], "matched": report["match"]["matched"], "chance": report["match"]["chance"]}
            row |= {"above": report["match"]["above"], "best": way == best}
        print(json.dumps(row), flush=True)
    return rows


def trained(project: Path, sibling: str, folder: Path, best: str, options: argparse.Namespace) -> dict[str, Path]:
    """Train the best transplant and new adapters of the same modules and rank; return name -> directory."""
    model, tokenizer = live(project, sibling), load_tokenizer(project / sibling)
    start = folder / best.replace(", ", "-")
    checkpoint, _ = resolve_base(sibling, project)
    bound = bind(Adapter(start, "carried"), checkpoint.specs, Model(checkpoint, checkpoint.config))
    found = {name.removesuffix(".weight"): bound.factors(name, CPU) for name in bound.places}
    carried_updates = {name: one for name, one in found.items() if one is not None}
    rows = encode(read_texts(folder / "texts.jsonl", "texts.jsonl"), tokenizer, 256)
    rows = [row for number, row in enumerate(rows) if number % 5 != 4]
    made = {}
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        # As PEFT starts a LoRA: A uniform in ±1/√inputs, B zero.
        new = {
            name: Factors(
                torch.zeros_like(one.left), (2 * torch.rand(one.right.shape, generator=generator) - 1) / one.right.shape[1] ** 0.5
            )
            for name, one in carried_updates.items()
        }
        for kind, updates in (("from the transplant", carried_updates), ("anew", new)):
            out = folder / f"{kind.replace(' ', '-')}-{options.steps}-{seed}"
            if not out.is_dir():
                distilled = adapted(model, updates, rows, options, seed)
                write_adapter(out, {f"{name}.weight": one for name, one in distilled.items()}, sibling)
            made[f"{kind}/{seed}"] = out
    return made


def adapted(
    model: Any, updates: dict[str, Factors], rows: list[TextRow], options: argparse.Namespace, seed: int
) -> dict[str, Factors]:
    """Train the factors of updates on texts, eight at a time, with the model frozen."""
    parts = {n: Factors(*(f.detach().clone().requires_grad_() for f in (u.left, u.right))) for n, u in updates.items()}
    learned = [part for one in parts.values() for part in (one.left, one.right)]
    optimizer = torch.optim.AdamW(learned, lr=options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    with frozen(model):
        for _ in range(options.steps):
            while len(order) < min(8, len(rows)):
                order += torch.randperm(len(rows), generator=generator).tolist()
            batch, order = collate([(rows[i].tokens, rows[i].learned) for i in order[:8]]), order[8:]
            with acting(model, parts):
                loss = batch_loss(model, batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
    return {n: Factors(one.left.detach(), one.right.detach()) for n, one in parts.items()}


def scored(project: Path, sibling: str, skill: str, arms: dict[str, Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Score the base, the brick on it, the sibling and all arms on the skill's task."""
    adapters = {"base": ("base", None), "brick": ("base", project / "bricks" / skill), "sibling": (sibling, None)}
    adapters |= {way: (sibling, out) for way, out in arms.items()}
    store, suite, tables = ScoreStore(project / "scores"), own_suite(skill), {}
    values, items = dict[str, Any](), dict[str, Any]()
    for base in dict.fromkeys(model for model, _ in adapters.values()):
        entries = []
        names = [way for way, (model, _) in adapters.items() if model == base]
        for way in names:
            brick = adapters[way][1]
            data: dict[str, Any] = {
                "version": 1,
                "name": way.replace(", ", "-").replace(" ", "-").replace("/", "-"),
                "base": base,
                "steps": [],
            }
            if brick is not None:
                data |= {
                    "bricks": {"carried": {"adapter": str(brick), "any_base": True}},
                    "steps": [{"merge": "task_arithmetic"}],
                }
            role = "base" if brick is None else "configuration"
            entries.append(LineupEntry(data["name"], role, resolve(from_data(data, project))))
        planned = plans(entries, [suite], batch_size=options.batch_size, limit=options.limit, device=CPU, events=show)
        scores = score_all(entries, planned, store, device=CPU, events=show)
        (tables[base],) = tables_of(store, scores, {suite.suite: suite})
        for way, score in zip(names, scores, strict=True):
            table, digest = tables[base], score.configuration.digest
            low, high = table.interval(digest)
            values[way] = {"n": len(table.items), "value": table.value(digest), "low": low, "high": high}
            items[way] = table.values[digest]
    gain = values["brick"]["value"] - values["base"]["value"]
    clusters = next(iter(tables.values())).cluster.tolist()
    rows = []
    for way, found in values.items():
        name, _, seed = way.partition("/")
        row = {"sibling": sibling, "skill": skill, "way": name, "seed": int(seed) if seed else None, **found}
        if way not in ("base", "brick", "sibling"):
            pair = paired(items["sibling"], items[way], clusters)
            low, high = pair.interval()
            row["gain"] = {"diff": pair.diff, "low": low, "high": high}
            row["kept"] = pair.diff / gain if gain else None
        rows.append(row)
    return rows


def own_suite(skill: str) -> Suite:
    """Return the suite of a skill's task."""
    return Suite(
        suite=f"transplant-{skill}", tasks=(skill,), primary={skill: "exact_match"}, cluster="cluster", owners={skill: skill}
    )


if __name__ == "__main__":
    main()
