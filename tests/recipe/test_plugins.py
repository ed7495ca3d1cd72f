"""Methods outside the package: of a trusted project's methods/ folder and of installed distributions; trust, keys, bad plug-ins."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from worlds.project import Project
from worlds.search_world import searched
from worlds.tiny import tensors_of

from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError
from workbench.ground.trust import VARIABLE, settings_file
from workbench.recipe.methods import method_files, methods
from workbench.recipe.recipe import load_recipe
from workbench.recipe.space import FieldSpace
from workbench.steps.step import OUTSIDE

ROOT = Path(__file__).resolve().parents[2]
BRICKS = "bricks: {one: bricks/one, two: bricks/two, full: bricks/full}\noutput: {dtype: float32}\n"
WEIGHTS = {"one": 1.0, "two": 2.0, "full": -0.5}
MEDIAN = f"{BRICKS}steps: [{{id: mix, merge: median, bricks: {json.dumps(WEIGHTS)}}}]"
TIES = f"{BRICKS}steps: [{{merge: ties}}]"
HALF = '''
from typing import Literal
from workbench.steps import Combination, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks

@register
class Half(MergeMethod):
    """{factor} of the sum of the deltas."""

    merge: Literal["{name}"]
    bricks: Bricks[BrickEntry] | None = None
    """Brick name -> weight."""

    def prepare(self, group):
        return Combination([{factor} * w for w in group.values("weight")], 0.0)
'''


def example() -> str:
    """The complete method of CONTRIBUTING.md's section."""
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## A method outside the package")[2]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(block.splitlines()) < 30
    return str(block)


def half(name: str = "half", factor: float = 0.5) -> str:
    return HALF.format(name=name, factor=factor)


@pytest.fixture(autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A settings folder of the test's own; plug-ins that it loads are forgotten afterwards."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.delenv(VARIABLE, raising=False)
    before, modules = set(OUTSIDE), set(sys.modules)
    yield folder
    for key in set(OUTSIDE) - before:
        del OUTSIDE[key]
        if key[0] not in modules:
            sys.modules.pop(key[0], None)


@pytest.fixture
def call(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line, in the project."""
    monkeypatch.chdir(project.path)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def put(project: Project, text: str, name: str = "median.py") -> Path:
    """A method file of the project."""
    file = project.path / "methods" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, "utf-8")
    return file


def message(result: Result) -> str:
    """The error that a command ends with, and its hint."""
    assert isinstance(result.exception, WorkbenchError), result.exception
    return f"{result.exception.message} | {result.exception.hint}"


def lora(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The deltas of an adapter, from its files alone."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    scale = config["lora_alpha"] / (np.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = {name: tensor.double().numpy() for name, tensor in tensors_of(folder).items()}
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        f"{name.removeprefix('base_model.model.')}.weight": scale
        * tensors[f"{name}.lora_B.weight"]
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def medians(project: Project) -> dict[str, np.ndarray[Any, Any]]:
    """The merge of `MEDIAN`, computed by numpy in float64."""
    base = {name: tensor.double().numpy() for name, tensor in tensors_of(project.path / "base").items()}
    full = {name: tensor.double().numpy() - base[name] for name, tensor in tensors_of(project.path / "bricks/full").items()}
    one, two = (lora(project.path / "bricks" / name) for name in ("one", "two"))
    return {
        name: start
        + np.median(
            [WEIGHTS["one"] * one.get(name, 0 * start), WEIGHTS["two"] * two.get(name, 0 * start), WEIGHTS["full"] * full[name]],
            axis=0,
        )
        for name, start in base.items()
    }


def check_medians(project: Project, model: Path) -> None:
    found, expected = tensors_of(model), medians(project)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].double().numpy(), values, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(found[name], tensor.float()) for name, tensor in tensors_of(project.path / "base").items())


def test_the_example_runs_in_a_project(project: Project, call: Callable[..., Result]) -> None:
    file = put(project, example())
    project.write(MEDIAN)
    result = call("run", "test", "--trust-project-code", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    check_medians(project, project.path / document["model"])
    record = document["steps"][0]["plugin"]
    assert record["source"] == "methods/median.py"
    assert json.loads((project.path / document["run"] / "run.json").read_text("utf-8"))["steps"][0]["plugin"] == record
    assert not list((project.path / "methods").glob("__pycache__")), "nothing is written beside the method"
    # The digest of the file is in the keys: a changed file is another method.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        assert list(project.resolve(MEDIAN).keys) == [document["steps"][0]["key"]]
        file.write_text(example() + "# another\n", "utf-8")
        changed = project.resolve(MEDIAN)
        assert changed.keys != [document["steps"][0]["key"]]
        assert changed.recipe.steps[0].plugin.digest != record["digest"]
        file.write_text(example(), "utf-8")
        assert list(project.resolve(MEDIAN).keys) == [document["steps"][0]["key"]]


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, module: str = "median_method", version: str = "1.2"
) -> None:
    """A distribution with one module and two entry points that name it, as pip leaves it."""
    (folder / f"{module}.py").write_text(text, "utf-8")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[workbench.methods]\nmedian = {module}\nagain = {module}\n", "utf-8")
    monkeypatch.syspath_prepend(str(folder))


def test_the_example_runs_as_a_distribution(
    project: Project, call: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed method needs no trust, and every project has it."""
    install(tmp_path_factory.mktemp("site"), monkeypatch, example())
    project.write(MEDIAN)
    result = call("run", "test", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    check_medians(project, project.path / document["model"])
    assert document["steps"][0]["plugin"]["source"] == "median-method 1.2"
    listed = call("methods").stdout
    assert re.search(r"merge +median +median-method 1\.2 +The element-wise median", listed)
    assert re.search(r"merge +ties +built in ", listed)
    shown = json.loads(call("methods", "median", "--json").stdout)
    assert shown["plugin"] == document["steps"][0]["plugin"]
    assert shown["fields"][-1]["text"] == "Brick name -> weight; default: all bricks with weight 1."


def test_the_version_of_a_distribution_is_in_the_keys(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for version in ("1.2", "1.3"):
        with monkeypatch.context() as patch:
            install(tmp_path_factory.mktemp("site"), patch, example(), version=version)
            digests.append(load_recipe(project.write(MEDIAN)).steps[0].plugin.digest)  # type: ignore[union-attr]
        sys.modules.pop("median_method")
        OUTSIDE.pop(("median_method", "merge:median"))
    assert digests[0] != digests[1]


def test_a_broken_distribution(
    project: Project, call: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named where it may matter, and breaks nothing else."""
    site = tmp_path_factory.mktemp("site")
    install(site, monkeypatch, "import no_such_module\n", "broken_method", "0.1")
    install(site, monkeypatch, half("ties"), "replacing_method", "2")
    project.write(TIES)
    assert call("recipe", "check", "test").exit_code == 0
    project.write(MEDIAN)
    told = message(call("plan", "test"))
    assert (
        "unknown merge method 'median', and a plug-in could not be loaded: distribution broken-method 0.1: its methods in" in told
    )
    assert "broken_method cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'" in told
    assert "pip uninstall broken-method" in told
    listed = call("methods")
    assert listed.exit_code == 0
    said = " ".join(listed.stderr.split())
    assert "distribution broken-method 0.1" in said
    assert "merge method 'ties' is defined in distribution replacing-method 2 and in workbench/merge/ties.py" in said
    assert "built-in methods cannot be replaced" in said


def test_an_untrusted_project(project: Project, call: Callable[..., Result]) -> None:
    """Nothing of its code runs, whatever the recipe names."""
    marker = project.path / "ran"
    put(project, f"open({str(marker)!r}, 'w').close()\n{half('median')}")
    project.write(MEDIAN)
    for command in ("run", "plan", "eval", "chat"):
        result = call(command, "test")
        told = message(result)
        assert result.exception.exit_code == 2  # type: ignore[union-attr]
        assert "steps.0.merge: unknown merge method 'median'; the project's methods/ (median.py) is not loaded" in told
        assert f"add --trust-project-code to the command, or type once: workbench trust {project.path}" in told
    assert "methods/ (median.py) is not loaded" in " ".join(call("methods").stderr.split())
    assert "methods/ (median.py) is not loaded" in message(call("methods", "median"))
    project.write(TIES)
    assert call("recipe", "check", "test").exit_code == 0
    assert not marker.exists()
    project.write(MEDIAN)
    assert call("recipe", "check", "test", "--trust-project-code").exit_code == 0
    assert marker.exists()
    assert "not a trusted project" in message(call("plan", "test")), "the option holds for one command"


def test_trust_is_in_the_users_settings(project: Project, call: Callable[..., Result], settings: Path) -> None:
    put(project, half("median"))
    project.write(MEDIAN)
    assert call("trust").stdout == ""
    assert "is now trusted: methods/median.py" in " ".join(call("trust", ".").stderr.split())
    assert "is already trusted" in " ".join(call("trust", project.path).stderr.split())
    assert settings_file() == settings / "workbench" / "settings.yaml"
    assert f"trusted_projects:\n  {project.path.resolve()}:\n    methods/median.py: " in settings_file().read_text("utf-8")
    assert call("trust").stdout == f"{project.path.resolve()}\n"
    assert call("recipe", "check", "test").exit_code == 0
    assert re.search(r"merge +median +methods/median\.py ", call("methods").stdout)
    assert call("trust", "--remove", ".").exit_code == 0
    assert "not a trusted project" in message(call("plan", "test"))
    assert "not a trusted project" in message(call("trust", "--remove", "."))
    assert "no such folder" in message(call("trust", "nowhere"))
    assert "no project is named" in message(call("trust", "--remove"))
    assert f"belongs to the project {project.path.resolve()}" in message(call("trust", "recipes"))
    settings_file().write_text("trusted: [x]\n", "utf-8")
    assert "settings.yaml:1:1 trusted" in message(call("plan", "test"))


@pytest.mark.parametrize("home", ["", "relative", None])
def test_without_a_home_folder(
    project: Project, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    """The settings have no place: `trust` says so, and nothing is trusted but what the option names."""
    monkeypatch.delenv("XDG_CONFIG_HOME")
    if home is None:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    else:
        monkeypatch.setenv("HOME", home)
    put(project, half("median"))
    project.write(MEDIAN)
    assert "this user has no home folder | Set HOME, or XDG_CONFIG_HOME" in message(call("trust", "."))
    assert "not a trusted project" in message(call("plan", "test"))
    assert call("recipe", "check", "test", "--trust-project-code").exit_code == 0


def test_projects_of_one_process_have_their_own_methods(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    second, third = (Project(tmp_path_factory.mktemp("other")) for _ in range(2))
    for other in (second, third):
        for name in ("base", "bricks"):
            (other.path / name).symlink_to(project.path / name)
        (other.path / "recipes").mkdir()
    put(project, half("half", 0.5))
    put(second, half("half", 0.25))
    text = "bricks: {one: bricks/one}\nsteps: [{merge: half}]"
    base, sums = project.tensors(""), project.tensors("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]")
    for where, factor in ((project, 0.5), (second, 0.25), (project, 0.5)):
        for name, tensor in where.tensors(text).items():
            torch.testing.assert_close(tensor - base[name], factor * (sums[name] - base[name]), rtol=1e-4, atol=1e-6)
    assert project.resolve(text).keys != second.resolve(text).keys
    with pytest.raises(WorkbenchError, match="unknown merge method 'half'"):
        third.resolve(text)
    # The brick of another project is a recipe of its own methods.
    inner = second.write(text, "inner.yaml")
    outer = f"bricks: {{two: {{recipe: {inner}}}}}\nsteps: [{{merge: half}}]"
    for name, tensor in project.tensors(outer).items():
        torch.testing.assert_close(tensor - base[name], 0.125 * (sums[name] - base[name]), rtol=1e-4, atol=1e-6)


BAD = {
    "a syntax error": ("def (:\n", "methods/median.py: cannot be loaded: line 1: invalid syntax"),
    "a failing import": ("import no_such_module\n", "methods/median.py: cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
    "an exit": ("raise SystemExit(3)\n", "methods/median.py: cannot be loaded: SystemExit: 3"),
    "no text": ("\0", "methods/median.py: cannot be loaded: "),
    "a kind of its own": ("from workbench.steps import Step\n\nclass Prune(Step):\n    verb = 'prune'\n", "cannot declare a new kind of step ('prune')"),
    "no method": ("x = 1\n", "methods/median.py: has no method"),
    "a class that is no step": ("from workbench.steps import register\n\n@register\nclass A: ...\n", "methods/median.py: cannot be loaded: AttributeError"),
    "a step without its name": (half("median").replace('merge: Literal["median"]', "name_: str"), 'expected a field merge: Literal["NAME"]'),
    "two classes of one name": (half("median") + half("median").replace("class Half", "class Other"), "Half and Other are both merge method 'median'"),
    "a method that is half there": (half("median") + "\nraise ValueError('late')\n", "methods/median.py: cannot be loaded: ValueError: late"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "told"), BAD.values(), ids=BAD)
def test_bad_method_files(project: Project, call: Callable[..., Result], text: str, told: str) -> None:
    """The file is named with its fault, and recipes that do not need it work."""
    put(project, text)
    project.write(MEDIAN)
    found = message(call("plan", "test", "--trust-project-code"))
    assert "steps.0.merge: unknown merge method 'median', and a plug-in could not be loaded: " in found
    assert told in found
    assert not [name for name in sys.modules if name.startswith("_workbench_project_method")]
    project.write(TIES)
    assert call("recipe", "check", "test", "--trust-project-code").exit_code == 0
    assert "methods/median.py" in " ".join(call("methods", "--trust-project-code").stderr.split())


def test_two_files_of_one_name(project: Project, call: Callable[..., Result]) -> None:
    put(project, half("median"), "a.py")
    put(project, half("median", 0.25), "b.py")
    project.write(MEDIAN)
    told = message(call("plan", "test", "--trust-project-code"))
    assert "merge method 'median' is defined in methods/b.py and in methods/a.py: a name can have one method" in told
    assert "Rename or remove one of them." in told


def test_built_in_methods_cannot_be_replaced(project: Project, call: Callable[..., Result]) -> None:
    put(project, half("ties"), "mine.py")
    project.write(TIES)
    assert call("recipe", "check", "test").exit_code == 0, "an untrusted file changes nothing"
    told = message(call("plan", "test", "--trust-project-code"))
    assert (
        "merge method 'ties' is defined in methods/mine.py and in workbench/merge/ties.py: built-in methods cannot be replaced"
        in told
    )
    assert methods()["merge:ties"].plugin is None


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_links_out_of_the_project(
    project: Project, call: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory, whole: bool
) -> None:
    """The project is trusted, and not what lies elsewhere and may be changed by others."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "median.py").write_text(half("median"), "utf-8")
    if whole:
        (project.path / "methods").symlink_to(elsewhere)
    else:
        (project.path / "methods").mkdir()
        (project.path / "methods" / "median.py").symlink_to(elsewhere / "median.py")
    project.write(MEDIAN)
    told = message(call("plan", "test", "--trust-project-code"))
    assert f"methods/median.py: links to {elsewhere.resolve() / 'median.py'}, outside the project" in told


def test_files_that_are_no_methods(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    put(project, "raise ValueError\n", "_draft.py")
    put(project, "raise ValueError\n", "__init__.py")
    put(project, "not Python", "notes.txt")
    put(project, half("median"))
    assert [file.name for file in method_files(project.path)] == ["median.py"]
    assert load_recipe(project.write(MEDIAN)).steps[0].name == "median"


def test_a_search_may_choose_a_plug_in(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    put(project, half("median"))
    text = searched("{mix.merge: [ties, median]}", "", f"{BRICKS}steps: [{{id: mix, merge: ties, density: 0.5}}]\n")
    recipe = load_recipe(project.write(text))
    assert recipe.fields.search is not None
    space = FieldSpace(recipe, recipe.fields.search.space)
    assert space.recipe_of({"mix.merge": "median"}).steps[0].plugin is not None


def test_keys_of_built_in_methods_have_their_version_alone() -> None:
    assert all(cls.plugin is None and cls.code_key() == cls.version for cls in methods().values())
