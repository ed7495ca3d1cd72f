"""Task files run no code: not by templates, by functions of an untrusted project, or by settings."""

from __future__ import annotations

import importlib.util
import json
import py_compile
import shutil
from pathlib import Path

import pytest
from jinja2.sandbox import SecurityError
from typer.testing import CliRunner, Result

from workbench.cli.app import app
from workbench.evaluate.gate import LOCALDATA, sandbox, sandbox_templates
from workbench.ground.errors import WorkbenchError
from workbench.ground.trust import VARIABLE, settings_file

OS = "__globals__['os'].system('touch {marker}')"
# Expressions that reach `os`, or that a template must not compute. {marker} is a file that the code would make.
TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch {marker}') }}",
    "{{ cycler['__init__']['__globals__']['os']['system']('touch {marker}') }}",
    "{{ cycler|attr('__init__')|attr('__globals__') }}",
    "{{ lipsum." + OS + " }}",
    "{{ joiner.__init__." + OS + " }}",
    "{{ namespace.__init__." + OS + " }}",
    "{{ self.__init__." + OS + " }}",
    "{{ self._TemplateReference__context.cycler.__init__." + OS + " }}",
    "{{ prompt.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__cl' ~ 'ass__'].__base__.__subclasses__() }}",
    "{{ [prompt]|map(attribute='__class__')|list|string ~ ([prompt]|map('attr', '__class__')|first).__subclasses__() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) ~ ('{0.__class__.__mro__[9]}'|format(1)) }}",
    "{% set f = '{0.__init__.__globals__[os]}'.format %}{{ f(cycler) }}",
    "{{ 'x'|regex_replace('x', '{0.__class__.__mro__}'.format) }}",
    "{{ ('{0.__init__.__globals__}'|attr('format'))(cycler) }}",
    "{% for key in cycler.__init__.__globals__ %}{{ key }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__call__." + OS + " }}",
    "{{ range(10 ** 9) }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ 7 ** (7 ** (7 ** 7)) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch {marker}') }}",
    "{{ 1 / 0 }}",
    "{{ prompt.nothing.at.all }}",
]
TASK = """\
task: pick
custom_dataset: !function localdata.jsonl
dataset_kwargs: {data_files: {test: data/copy.jsonl}}
output_type: multiple_choice
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(autouse=True)
def project(place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose user trusts nothing."""
    toy = place
    monkeypatch.chdir(toy)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    monkeypatch.delenv(VARIABLE)
    (toy / "recipes").mkdir(exist_ok=True)
    tasks = toy / "evals" / "tasks"
    (tasks / "copy.yaml").unlink()
    (tasks / "localdata.py").write_text(LOCALDATA, "utf-8")
    (tasks / "pick.yaml").write_text(TASK)
    (toy / "evals" / "suites" / "toy.yaml").write_text("suite: toy\ntasks: [pick]\ncluster: id\n")
    return toy


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def told(result: Result) -> str:
    """The error of a command, which must be one that users see."""
    assert isinstance(result.exception, WorkbenchError), result.exception
    return f"{result.exception.message} | {result.exception.hint}"


COMMANDS = (("suite", "check", "toy", "--base", "base"), ("eval", "base", "--suite", "toy", "--device", "cpu"))


def write(project: Path, field: str, value: str) -> None:
    lines = [line for line in TASK.splitlines() if not line.startswith(f"{field}:")]
    (project / "evals" / "tasks" / "pick.yaml").write_text("\n".join([*lines, f"{field}: {value}\n"]))


def test_the_project_is_sound(project: Path) -> None:
    for command in COMMANDS:
        result = call(*command)
        assert not isinstance(result.exception, WorkbenchError) or "suite toy: pick, clusters" in told(result)


@pytest.mark.parametrize(
    ("field", "template"),
    [("doc_to_text", template) for template in TEMPLATES]
    + [(field, TEMPLATES[0]) for field in ("doc_to_target", "doc_to_choice", "gen_prefix", "fewshot_config")],
)
def test_templates_run_no_code(project: Path, field: str, template: str) -> None:
    marker = project / "ran"
    text = json.dumps(template.replace("{marker}", str(marker)))
    write(project, field, text if field != "fewshot_config" else f"{{doc_to_text: {text}}}\nnum_fewshot: 1")
    for command in COMMANDS:
        assert "pick" in told(call(*command))
    assert not marker.exists()


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target"])
@pytest.mark.parametrize("output", ["multiple_choice", "generate_until"])
def test_templates_that_fail_on_one_document_alone(project: Path, field: str, output: str) -> None:
    """It is found before a model is asked."""
    write(project, field, json.dumps("{{ 1 // (id != 'copy-005') * gold }}"))
    task = project / "evals" / "tasks" / "pick.yaml"
    task.write_text(
        task.read_text()
        .replace("multiple_choice", output)
        .replace("{metric: acc,", "{metric: exact_match," if "gen" in output else "{metric: acc,")
    )
    for command in COMMANDS:
        assert "ZeroDivisionError" in told(call(*command))


MARK = "import pathlib\npathlib.Path({marker!r}).touch()\n"
# Lines of the task file, which a command refuses, and a part of its message. The code of the project makes the marker.
REFUSED = {
    "a function of the project": ("process_docs: !function own.same", "own.py, which a task names, does not run"),
    "a class of the project": ("class: !function own.Task", "own.py, which a task names, does not run"),
    "a changed reader": ("custom_dataset: !function changed.jsonl", "changed.py, which a task names, does not run"),
    "an include from elsewhere": ("include: ../../elsewhere/more.yaml", "own.py, which a task names, does not run"),
    "the system": ("process_docs: !function os.system", "the function os.system does not run"),
    "a process": ("custom_dataset: !function subprocess.run", "the function subprocess.run does not run"),
    "lm-eval itself": ("custom_dataset: !function lm_eval.evaluator.simple_evaluate", "simple_evaluate does not run"),
    "a reader of lm-eval": ("custom_dataset: !function lm_eval.tasks.ruler.common_utils.get_tokenizer", "it calls lm-eval with"),
    "an included reader of lm-eval": ("include: {lm_eval}/tasks/babilong/babilong_qa1.yaml", "it calls lm-eval with arguments"),
    "a script as metric": ("metric_list: [{{metric: ./own.py, aggregation: mean}}]", "the metric ./own.py does not run"),
    "a metric by force": ("metric_list: [{{metric: acc, hf_evaluate: true}}]", "the metric acc does not run"),
    "no function for metrics": ("process_results: null", "`process_results` is not removed"),
    "a pickle": ("custom_dataset:\ndataset_path: pandas", "`pandas` reads pickle files, which run code"),
}


@pytest.mark.parametrize(("lines", "message"), REFUSED.values(), ids=REFUSED)
def test_code_of_an_untrusted_project_does_not_run(project: Path, lines: str, message: str) -> None:
    """It is refused with the commands that allow it, before any of it runs."""
    marker, tasks = project / "ran", project / "evals" / "tasks"
    code = MARK.format(marker=str(marker)) + "def same(docs):\n    return docs\nclass Task: ...\n"
    (project / "elsewhere").mkdir()
    (project / "elsewhere" / "more.yaml").write_text("process_docs: !function own.same\n")
    for place in (tasks / "own.py", project / "own.py", project / "elsewhere" / "own.py"):
        place.write_text(code)
    (tasks / "changed.py").write_text(code + LOCALDATA.partition("annotations")[2])
    package = Path(str(importlib.util.find_spec("lm_eval").origin)).parent  # type: ignore[union-attr]
    field, _, value = lines.format(lm_eval=package).partition(": ")
    if "dataset_path" in lines:
        field, value = "custom_dataset", "\ndataset_path: pandas"
    write(project, field, value)
    if field == "include":
        text = (tasks / "pick.yaml").read_text()
        (tasks / "pick.yaml").write_text(
            text.replace("custom_dataset: !function localdata.jsonl\n", "") if str(package) in value else text
        )
    for command in COMMANDS:
        found = told(call(*command))
        assert message in found
        assert "If you trust this code, add --trust-project-code to the command" in found
    assert not marker.exists()


def test_trust_is_in_the_content_of_the_code(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A project that was trusted is asked for again if a file changed, was added, or lies elsewhere."""
    tasks = project / "evals" / "tasks"
    helper = tasks / "helper.py"
    helper.write_text("def same(docs):\n    return docs\n")
    write(project, "process_docs", "!function helper.same")
    for command in COMMANDS:
        found = told(call(*command))
        assert f"because {project} is not a trusted project" in found
        assert f"or type once: workbench trust {project}" in found
        assert call(*command, "--trust-project-code").exit_code in (0, 3)
    assert "evals/tasks/helper.py, evals/tasks/localdata.py" in " ".join(call("trust", project).stderr.split())
    check = COMMANDS[0]
    assert call(*check).exit_code == 0
    (project / "methods").mkdir()
    for name in ("evals/tasks/helper.py", "evals/tasks/new.py", "methods/new.py"):
        with (project / name).open("a") as file:
            file.write("#")
        assert f"because {name} changed since {project} was trusted" in told(call(*check))
        assert call("trust", project).exit_code == 0
        assert call(*check).exit_code == 0
    settings_file().write_text(f"trusted_projects: [{project}]\n")
    assert "changed since" in told(call(*check)), "versions up to 0.2 wrote this list, without digests"
    assert call("trust", project).exit_code == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "package"
    elsewhere.mkdir()
    helper.rename(elsewhere / "helper.py")
    (tasks / "package").symlink_to(elsewhere)
    write(project, "process_docs", "!function package.helper.same")
    assert "outside the project's methods/ and evals/" in told(call(*check))


def test_compiled_files_beside_the_reader_are_not_run(project: Path) -> None:
    """Python would run a compiled file that says that its source need not be compared."""
    source, marker = project / "evals" / "tasks" / "localdata.py", project / "ran"
    evil = project / "evil.py"
    evil.write_text(MARK.format(marker=str(marker)) + LOCALDATA.partition("annotations")[2])
    compiled = Path(importlib.util.cache_from_source(str(source)))
    for command in COMMANDS:
        compiled.parent.mkdir(exist_ok=True)
        py_compile.compile(str(evil), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        result = call(*command)
        assert not isinstance(result.exception, WorkbenchError) or "clusters" in told(result)
        shutil.rmtree(compiled.parent, ignore_errors=True)
    assert not marker.exists()


class Image:
    """A value of a document that can write a file, as images can."""

    def save(self, path: str) -> None:
        Path(path).touch()


def test_values_of_documents_run_no_methods(project: Path) -> None:
    from lm_eval import utils

    sandbox_templates()
    assert isinstance(utils.env, sandbox())
    with pytest.raises(SecurityError):
        utils.apply_template("{{ image.save('ran') }}", {"image": Image()})
    assert not (project / "ran").exists()
    text = "{{ s.upper() ~ d['_k'] ~ d.k|join ~ 2 * 3 ~ '-' * 3 ~ 2 ** 10 ~ (s|regex_replace('b+', 'c')) }}\n"
    assert utils.apply_template(text, {"s": "abb", "d": {"_k": 1, "k": [1, 2]}}) == "ABB1126---1024ac\n"
