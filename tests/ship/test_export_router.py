"""`export --for semantic-router`: router.yaml from cards and calibration prompts, and its references as the router resolves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import chdir
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from worlds.commands import document, refused
from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.routing import write_prompts
from worlds.tiny import save_adapter

from workbench.adapters.read import Adapter
from workbench.ground.errors import UsageError
from workbench.ship.servers import routed_adapters, write_router_file

ROUTER = ("--for", "semantic-router", "--served-base", "org/small", "--tokens", "2", "--prompts", "prompts.jsonl")


def card(place: Path, **more: str) -> None:
    data = {"version": 1, "name": place.name, "kind": "adapter", "base": {"id": "base"}, **more}
    (place / "brick.yaml").write_text(yaml.safe_dump(data), "utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[..., Path]) -> Iterator[Project]:
    """A project with adapters that have a card, a card without a skill, and none; it is the working directory."""
    project = Project(tmp_path_factory.mktemp("router"))
    (project.path / "recipes").mkdir()
    base = model_of("llama", torch.float32)
    (project.path / "base").symlink_to(base)
    for seed, name in enumerate(("one", "two", "mute", "bare")):
        save_adapter(base, project.path / "bricks" / name, seed=seed)
    card(project.path / "bricks" / "one", skill="words\n  with: a 'colon'", prompt_format="w1 w2 is")
    card(project.path / "bricks" / "two", skill="on")
    card(project.path / "bricks" / "mute")
    write_jsonl(project.path / "prompts.jsonl", [{"prompt": "w1 w2 w3 is"}])
    names = ("one", "two", "mute", "bare")
    project.write(f"bricks: {{{', '.join(f'{n}: bricks/{n}' for n in names)}}}\nsteps: []\n", "all.yaml")
    project.write("bricks: {one: bricks/one, same: bricks/one}\nsteps: []\n", "twice.yaml")
    with chdir(project.path):
        yield project


def resolved(place: Path) -> dict[str, tuple[list[str], str | None]]:
    """Decision -> its examples, and the adapter that answers; every reference resolved as the router does it."""
    data: Any = yaml.safe_load(place.read_text("utf-8"))
    assert data["version"] == "v0.3"
    models = [model["name"] for model in data["providers"]["models"]]
    assert data["providers"]["defaults"]["model"] in models
    cards = {one["name"]: {lora["name"] for lora in one["loras"]} for one in data["routing"]["modelCards"]}
    signals = {one["name"]: one for one in data["routing"]["signals"]["embeddings"]}
    found = {}
    for decision in data["routing"]["decisions"]:
        (reference,) = decision["modelRefs"]
        assert reference["model"] in models
        lora = reference.get("lora_name")
        assert lora is None or lora in cards[reference["model"]]
        examples: list[str] = []
        for condition in decision["rules"]["conditions"]:
            assert condition["type"] == "embedding"
            examples += signals[condition["name"]]["candidates"]
        found[decision["name"]] = (examples, lora)
    assert min(data["routing"]["decisions"], key=lambda one: one["priority"])["name"] == "base", "the base answers last"
    return found


def test_cards_become_routes_to_the_names_of_the_server(world: Project, tmp_path: Path) -> None:
    found = document("export", "all", *ROUTER, "--brick", "one", "--brick", "two", "-o", str(tmp_path / "out"))
    assert found["for"] == "semantic-router"
    place = tmp_path / "out" / "router.yaml"
    assert resolved(place) == {"one": (["w1 w2 is", "words with: a 'colon'"], "one"), "two": (["on"], "two"), "base": ([], None)}
    data = yaml.safe_load(place.read_text("utf-8"))
    assert data["routing"]["modelCards"] == [
        {
            "name": "org/small",
            "loras": [{"name": "one", "description": "words with: a 'colon'"}, {"name": "two", "description": "on"}],
        }
    ]
    script = (tmp_path / "out" / "serve.sh").read_text("utf-8")
    assert 'vllm serve "${MODEL:-$model}"' in script
    assert '--lora-modules one="$here/adapters/one" two="$here/adapters/two"' in script


def test_a_routed_configuration_gives_its_prompts_and_descriptions(world: Project, tmp_path: Path) -> None:
    write_prompts(world.path / "calibration", {"one": 0, "bare": 1, "more": 2}, count=40, templates=4)
    files = "[calibration/bare.jsonl, calibration/more.jsonl]"
    bare = f"{{description: plain words, calibration: {files}}}"
    route = f"{{route: text, calibration: 'calibration/{{brick}}.jsonl', bricks: {{one: {{}}, bare: {bare}}}}}"
    routed = Path(world.run(f"bricks: {{one: bricks/one, bare: bricks/bare}}\nsteps: [{route}]\n", "routed.yaml")["run"])
    document("export", str(routed / "configuration"), *ROUTER, "-o", str(tmp_path / "out"))
    found = resolved(tmp_path / "out" / "router.yaml")
    assert list(found) == ["one", "bare", "base"]
    for name, sources in (("one", ("one",)), ("bare", ("bare", "more"))):
        text = "".join((world.path / "calibration" / f"{source}.jsonl").read_text("utf-8") for source in sources)
        assert len(found[name][0]) == 16
        assert all(f'"{prompt}"' in text for prompt in found[name][0])
    data = yaml.safe_load((tmp_path / "out" / "router.yaml").read_text("utf-8"))
    assert [one["description"] for one in data["routing"]["modelCards"][0]["loras"]] == ["words with: a 'colon'", "plain words"]


@pytest.mark.parametrize(
    ("options", "code", "message", "hint"),
    [
        (("all", "--brick", "mute"), 1, "brick 'mute': has no description", "bricks/mute/brick.yaml"),
        (("all", "--brick", "bare"), 1, "brick 'bare': has no description", "in a route step"),
        (("twice",), 1, "bricks 'one' and 'same' have the same example prompts", "descriptions"),
    ],
)
def test_what_the_router_cannot_tell_apart_is_refused(
    options: tuple[str, ...], code: int, message: str, hint: str, world: Project, tmp_path: Path
) -> None:
    error = refused("export", *options, *ROUTER, "-o", str(tmp_path / "out"))
    assert (error.exit_code, message in error.message, hint in str(error.hint)) == (code, True, True)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_has_nothing_to_choose_from(world: Project, tmp_path: Path) -> None:
    error = refused("export", "base", "--for", "semantic-router", "-o", str(tmp_path / "out"))
    assert (error.exit_code, "a whole model has no adapters" in error.message) == (2, True)
    with pytest.raises(UsageError, match="an adapter is named 'base'"):
        routed_adapters({"base": Adapter(world.path / "bricks" / "one", "base")}, {}, {})


def test_the_validator_of_vllm_sr_accepts_the_file(world: Project, tmp_path: Path) -> None:
    try:
        version("vllm-sr")
    except PackageNotFoundError:
        pytest.skip("vllm-sr is not installed")
    from cli.parser import parse_user_config  # type: ignore[import-not-found]
    from cli.validator import validate_user_config  # type: ignore[import-not-found]

    adapters = {name: Adapter(world.path / "bricks" / name, name) for name in ("one", "two")}
    write_router_file("org/small", routed_adapters(adapters, {}, {"two": ["w5 of", "w6 is: yes"]}), 8000, tmp_path)
    assert validate_user_config(parse_user_config(str(tmp_path / "router.yaml")), log_summary=False) == []
