"""Layers added as identities, as copies, or as learned sums of the old ones (LiGO, Wang et al. 2023), at equal steps: the source of a table in docs/growing-results.md.

    python benchmarks/grow_maps.py
    python benchmarks/grow_maps.py --seeds 1 --budgets 40      a quick look

A small Llama of four layers is trained for a while on the functions of benchmarks/pool_worlds.py. Each arm continues with six layers, all of whose parameters are trained
on the same rows: `zero start` is `grow: depth`, `copies` is `grow: stack` with the same layers twice. For learned maps, each matrix of a new model's layer
is a sum of the matrices of that kind of all old layers; the coefficients are trained for the first --map-steps steps, which count, while the old
matrices stay (arXiv 2303.00980, equations 6 to 8, depth alone). They begin as the copies do, or as the zero start. `no growth` trains the four
layers. Loss is that of held-out answers, in nats a token. Results go to benchmarks/results/grow-maps.json after each seed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from edit_setup import CPU, one_thread
from pool_worlds import BASE_TASKS, COPIES, LENGTH, World, train
from record import parser_of, write_results
from torch.func import functional_call
from transformers import LlamaForCausalLM

from workbench.models.live import compute, live_model
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose

ORDER = (0, 1, 1, 2, 3, 3)
"""The old layer that each new one copies; `grow: depth` with two blocks adds those that stand here twice."""
ADDED = (2, 5)
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
ARMS = ("no growth", "zero start", "copies", "learned maps", "learned maps from the zero start")


class Mapped(torch.nn.Module):
    """A model whose layers are sums of the layers of a smaller one; its parameters are their coefficients.

    Attributes:
        grown: A model with the number of layers of the result, and with all other parameters.
        coefficients: Kind of matrix, such as mlp.up_proj.weight -> [new layers, old layers].
    """

    def __init__(self, small: LlamaForCausalLM, grown: LlamaForCausalLM, zero: bool) -> None:
        """Set the coefficients so that new layers are copies; with `zero`, the added ones write nothing."""
        super().__init__()
        self.grown = [grown]  # in a list, so that its parameters are none of this module
        olds = small.model.layers
        self.stacked = {
            name: torch.stack([dict(one.named_parameters())[name].detach() for one in olds])
            for name, _ in olds[0].named_parameters()
        }
        start = torch.zeros(len(ORDER), len(olds))
        start[range(len(ORDER)), ORDER] = 1.0
        self.coefficients = torch.nn.ParameterDict()
        for name in self.stacked:
            first = start.clone()
            if zero and name.startswith(OUTPUTS):
                first[list(ADDED)] = 0.0
            self.coefficients[name.replace(".", "/")] = torch.nn.Parameter(first)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return name -> matrix of all layers."""
        named: dict[str, torch.Tensor] = {}
        for key, chosen in self.coefficients.items():
            name = key.replace("/", ".")
            mixed = torch.tensordot(chosen, self.stacked[name], dims=1)
            named |= {f"model.layers.{number}.{name}": matrix for number, matrix in enumerate(mixed)}
        return named

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Run the grown model with the mapped layers."""
        return functional_call(self.grown[0], self.weights(), (), inputs)


def main() -> None:
    """Train all arms with all seeds, and write the results file after each seed."""
    parser = parser_of(__doc__, "grow-maps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=300, help="training steps of the base, 64 rows each")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[100, 400], help="training steps after growth; one training each"
    )
    parser.add_argument("--map-steps", type=int, default=25, help="how many of them train the coefficients of learned maps")
    parser.add_argument("--map-rate", type=float, default=1e-2, help="peak learning rate of the coefficients")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    one_thread()
    settings = {name: getattr(options, name) for name in ("base_steps", "map_steps", "map_rate")}
    rows: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder), seed)
            world.make_base(options.base_steps)
            before = held_out_loss(world.model())
            for budget in options.budgets:
                for arm in ARMS:
                    row = {"seed": seed, "budget": budget, "arm": arm, "before": before, **trained(world, arm, budget, options)}
                    rows.append(row)
                    print(row, flush=True)
        write_results(options.out, {**settings, "rows": rows})


def trained(world: World, arm: str, budget: int, options: Any) -> dict[str, float]:
    """Grow the base in one way, train it, and return the losses after growth and after training."""
    started, rest = time.process_time(), budget
    model = grown(world, arm)
    first = held_out_loss(model)
    if arm.startswith("learned maps"):
        mapped = Mapped(world.model(), model, zero=arm.endswith("zero start"))
        train(mapped, [*BASE_TASKS, *COPIES], options.map_steps, options.map_rate, world.seed, replay=0.0)
        with torch.no_grad():
            model.load_state_dict(mapped.weights(), strict=False)
        rest -= options.map_steps
    mapped_loss = held_out_loss(model)
    train(model, [*BASE_TASKS, *COPIES], rest, 1e-3, world.seed + 1, replay=0.0)
    seconds = round(time.process_time() - started, 1)
    return {
        "grown": first,
        "mapped": mapped_loss,
        "loss": held_out_loss(model),
        "accuracy": world.retention(model),
        "seconds": seconds,
    }


def grown(world: World, arm: str) -> LlamaForCausalLM:
    """Return the base with six layers, or with its own where nothing grows."""
    steps: list[dict[str, Any]] = {
        "no growth": [],
        "zero start": [{"grow": "depth", "blocks": len(ADDED)}],
        "learned maps from the zero start": [{"grow": "depth", "blocks": len(ADDED)}],
    }.get(arm, [{"grow": "stack", "order": list(ORDER)}])
    resolved = resolve(from_data({"version": 1, "name": "grown", "base": str(world.base), "steps": steps}, world.folder))
    model = compose(resolved, CPU).model
    live: Any = live_model(model.config, compute(model, torch.float32, CPU), world.base, CPU)
    for parameter in live.parameters():
        parameter.requires_grad_(True)
    return live


def held_out_loss(model: Any) -> float:
    """Return the mean loss of the base's held-out answers, in nats a token."""
    rows = torch.cat([task.rows(100, seed=-1) for task in (*BASE_TASKS, *COPIES)])
    labels = rows.clone()
    labels[:, : rows.shape[1] - LENGTH] = -100
    with torch.no_grad():
        return float(model(input_ids=rows, labels=labels).loss)


if __name__ == "__main__":
    main()
