"""Tokens a second and memory of routed models: the mixing kernel against PEFT's mixed batches and PEFT's Arrow.

    python benchmarks/route.py
    python benchmarks/route.py --model DIR --bricks 1 4 8 16

All contestants run in turn in one process, on one model and the same random rank-8 adapters on all linear layers of its blocks.
`one` gives every row of a batch the same brick, `mixed` gives row i the brick i. Each number is the best of some rounds, because other
work on the machine only slows a round down; `ratio` is the median over rounds of a contestant's time divided by the kernel's time next
to it; `decode_ratio` is the same for one token a row, as in a step of generation. Memory is what a call needs at its peak beyond model and adapters, of torch's own allocations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import parser_of, write_results

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.models.prompts import load_tokenizer
from workbench.route.fixed import FixedRouter
from workbench.route.mixing.live import attach

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Call = Callable[[], Any]


def main() -> None:
    """Time every contestant for every number of bricks, and write the results file."""
    parser = parser_of(__doc__, "route")
    parser.add_argument("--model", type=Path, default=BASE, help="model directory, of the Llama family")
    parser.add_argument("--bricks", type=int, nargs="+", default=[1, 4, 8, 16], help="numbers of bricks")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--note", default="", help="sentence for the results file, such as what else ran on the machine")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = torch.randint(5, 1000, (given.rows, given.tokens), device=given.device)
    results = []
    for count in given.bricks:
        with TemporaryDirectory() as folder:
            places = save_adapters(given.model, Path(folder), count)
            results.append(compare(given, places, rows))
        print(results[-1])
    write_results(
        given.out,
        {
            **({"note": given.note} if given.note else {}),
            "device": given.device,
            "threads": torch.get_num_threads(),
            "rows": given.rows,
            "tokens": given.tokens,
            "rank": 8,
            "results": results,
        },
    )


def base_model(model: Path, device: str) -> Any:
    """Return the live model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()


def save_adapters(model: Path, folder: Path, count: int) -> dict[str, Path]:
    """Write random LoRA adapters of rank 8, and return name -> directory."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        base_model(model, "cpu"), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    places = {}
    for number in range(count):
        torch.manual_seed(number)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.01)
        places[f"b{number}"] = folder / f"b{number}"
        wrapped.save_pretrained(places[f"b{number}"], save_embedding_layers=False)
    return places


def compare(given: Any, places: dict[str, Path], rows: torch.Tensor) -> dict[str, Any]:
    """Return tokens a second, ratios and memory of all contestants for some adapters."""
    names = list(places)
    model = base_model(given.model, given.device)
    factors = {name: linear_factors(Adapter(place, name)) for name, place in places.items()}
    routing = attach(model, load_tokenizer(given.model), FixedRouter(tuple(names), weights=torch.zeros(len(names))), factors)
    mixed = torch.eye(len(names))[torch.arange(len(rows)) % len(names)]
    ours = {
        "base": lambda: forward(model, rows, routing.fixed(None)),
        "one": lambda: forward(model, rows, routing.fixed(names[0])),
        "mixed": lambda: forward(model, rows, routing.fixed(mixed)),
    }
    peft: Any = peft_model(given, places)
    of_row = [names[i % len(names)] for i in range(len(rows))]
    theirs = {
        "one": lambda: forward(peft, rows, adapter_names=None),
        "mixed": lambda: forward(peft, rows, adapter_names=of_row),
    }
    differences = {kind: float((theirs[kind]() - ours[kind]()).abs().max()) for kind in theirs}
    found: dict[str, Any] = {"bricks": len(names), "difference": differences}
    for kind, call in ours.items():
        found[f"kernel {kind}"] = measured(given, call, rows)
    for kind, call in theirs.items():
        found[f"peft {kind}"] = {**measured(given, call, rows), "ratio": ratio(given, call, ours[kind])}
    step = rows[:, :1]
    steps = {"one": (names[0], None), "mixed": (mixed, of_row)}
    for kind, (choice, adapters) in steps.items():
        found[f"peft {kind}"]["decode_ratio"] = ratio(
            given,
            lambda adapters=adapters: forward(peft, step, adapter_names=adapters),  # type: ignore[misc]
            lambda choice=choice: forward(model, step, routing.fixed(choice)),  # type: ignore[misc]
        )
    theirs.clear()
    peft = None  # frees the adapters
    arrow = arrow_model(given, places)
    call = lambda: forward(arrow, rows)  # noqa: E731
    found["peft arrow"] = {**measured(given, call, rows), "ratio": ratio(given, call, ours["mixed"])}
    found["peft arrow"]["decode_ratio"] = ratio(
        given, lambda: forward(arrow, step), lambda: forward(model, step, routing.fixed(mixed))
    )
    return found


def peft_model(given: Any, places: dict[str, Path]) -> Any:
    """Return the model with all adapters under PEFT, the first one active."""
    from peft import PeftModel

    first, *others = places
    wrapped = PeftModel.from_pretrained(base_model(given.model, given.device), places[first], adapter_name=first)
    for name in others:
        wrapped.load_adapter(places[name], adapter_name=name)
    return wrapped.eval()


def arrow_model(given: Any, places: dict[str, Path]) -> Any:
    """Return the model with all adapters under PEFT's Arrow, which mixes the best of them for each token."""
    from peft import ArrowConfig, create_arrow_model

    config = ArrowConfig(top_k=min(3, len(places)))
    paths = [str(place) for place in places.values()]
    return create_arrow_model(
        base_model(given.model, given.device), task_specific_adapter_paths=paths, arrow_config=config
    ).eval()


@torch.no_grad()
def forward(model: Any, rows: torch.Tensor, context: AbstractContextManager[None] | None = None, **settings: Any) -> torch.Tensor:
    """Return the logits of the last position."""
    used = {name: value for name, value in settings.items() if value is not None}
    with context or nullcontext():
        logits: torch.Tensor = model(input_ids=rows, use_cache=False, logits_to_keep=1, **used).logits
    return logits


def timed(given: Any, call: Call) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    if given.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(given: Any, call: Call, rows: torch.Tensor) -> dict[str, float]:
    """Return tokens a second of the best round, and the peak of memory in MB."""
    call()
    best = min(timed(given, call) for _ in range(given.rounds))
    return {"tokens_per_second": round(rows.numel() / best, 1), "peak_mb": peak(given, call)}


def peak(given: Any, call: Call) -> float:
    """Return the largest sum of torch's live allocations during a call, in MB."""
    if given.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return round(most / 1e6, 1)


def ratio(given: Any, call: Call, reference: Call) -> float:
    """Return the median over rounds of a call's time divided by the reference's time next to it."""
    pairs = [(timed(given, call), timed(given, reference)) for _ in range(given.rounds)]
    return round(statistics.median(a / b for a, b in pairs), 2)


if __name__ == "__main__":
    main()
