"""Fixtures shared by the tests: tiny models on disk, made once a session, and a project folder around them."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# The user's own settings and caches decide no test, and HOME may be read-only.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="workbench-settings-")
os.environ["HF_HOME"] = f"{os.environ['XDG_CONFIG_HOME']}/huggingface"
os.environ["WORKBENCH_TRUST_PROJECT_CODE"] = "1"  # tests write code beside their tasks; tests of trust unset it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two workers share two cores. Threads of theirs and of the processes that they start would wait for each other in loops: three notebooks took
# 295 seconds with two threads each, and 78 with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Which tenth of the nightly tests runs today: the workers, and a run that is repeated, take the day from here.
os.environ.setdefault("WORKBENCH_DAY", time.strftime("%Y-%m-%d", time.gmtime()))
if "WORKBENCH_TESTS_MADE" not in os.environ:  # in the process that starts the workers
    os.environ["WORKBENCH_TESTS_MADE"] = tempfile.mkdtemp(prefix="workbench-made-")
    atexit.register(shutil.rmtree, os.environ["WORKBENCH_TESTS_MADE"], ignore_errors=True)
# Where the shell forbids bytecode files, each of the processes that tests start would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch
import torch.utils.collect_env

from worlds.dense import save_dense
from worlds.mergekit_runs import save_models
from worlds.places import PARTS, TESTS
from worlds.project import Project
from worlds.tiny import edit_json, save_adapter, save_finetuned, save_model
from worlds.token_words import BASE, OTHER, THIRD, save_llama, save_tuned

from workbench.ground import identity
from workbench.ground.parts import parts

sys.dont_write_bytecode = False
gc.set_threshold(20_000, 10, 10)  # as in `workbench.cli.__main__`
torch.set_num_threads(1)
# Flushing protects files from a power failure, which no test causes, and takes about 10 ms a file here: minutes of the suite. Tests of what is
# flushed record the calls; processes that tests start flush as usual.
os.fsync = lambda descriptor: None
if sys.platform == "linux":
    # Two ticks of the kernel's clock, here 8 ms. The package waits 20 ms behind each new file, for file systems of other machines.
    identity._TICKS_NS = int(2e9 * time.clock_getres(5))  # CLOCK_REALTIME_COARSE, which Python does not name
# lm-eval's front end asks several programs about the machine each time, which takes a second.
torch.utils.collect_env.get_pretty_env_info = lambda: "not asked in tests"


LIMIT = pytest.StashKey[Any]()
"""A test's settings of pytest-timeout."""


class Overdue(BaseException):
    """A test has taken too long. Hypothesis takes pytest's own failure for that of one example, and runs the endless example again."""


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Iterator[Any]:
    """Repeat the alarm of pytest-timeout: its one exception ends neither code that catches it nor a `finally` that waits."""
    item.stash[LIMIT] = settings
    result = yield
    if settings.method == "signal":
        fail: Any = signal.getsignal(signal.SIGALRM)

        def alarm(number: int, frame: Any) -> None:
            try:
                fail(number, frame)
            except pytest.fail.Exception as failure:
                raise Overdue(str(failure)) from None

        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, settings.timeout, 20)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Limit the time of what a test cleans up, too: a failure ends the limit, since pytest-timeout expects a debugger then."""
    if LIMIT in item.stash:
        item.ihook.pytest_timeout_set_timer(item=item, settings=item.stash[LIMIT])


SLOW_LIST = Path(__file__).with_name("slow.txt")
"""Tests that take longer than SLOW seconds, a line each; `make slow` writes it."""
SLOW = 1.5
_seconds: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nightly", choices=("no", "tenth", "all"), default="no", help="tests marked nightly: none, today's tenth, all"
    )
    parser.addoption("--write-slow", action="store_true", help="write the list of slow tests anew, from what this run takes")


def pytest_report_header(config: pytest.Config) -> str:
    chosen = {"no": "none", "tenth": f"the tenth of {DAY} (DAY={DAY} repeats it)", "all": "all"}[config.option.nightly]
    missing = f"; without the tests that need a part that is not here: {', '.join(sorted(MISSING))}" if MISSING else ""
    return f"nightly tests: {chosen}{missing}"


MISSING = {*PARTS} - parts().keys()
"""Parts that cannot be used, because their folder or one that they need is not here."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the folder of tests of a part that is missing."""
    return True if collection_path.parent == TESTS and collection_path.name in MISSING else None


@pytest.fixture(autouse=True, scope="session")
def _commands_of_missing_parts() -> Iterator[None]:
    """Skip a test where it calls a command of a missing part. `test_parts.py` calls them in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        if MISSING:
            patch.setattr("workbench.cli.index.missing", lambda part, what: pytest.skip(f"{what} needs the part '{part}'"))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark slow tests, skip those of missing parts, leave out nightly ones that are not asked for.

    Both slow and nightly tests move to the front, so that the workers end together.
    """
    slow = set(SLOW_LIST.read_text("utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")
        if lost := sorted(MISSING & {part for marker in item.iter_markers("part") for part in marker.args}):
            item.add_marker(pytest.mark.skip(reason=f"needs the part '{lost[0]}'"))
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    chosen = {"no": [], "tenth": nightly[DAY.toordinal() % 10 :: 10], "all": nightly}[config.option.nightly]
    if left_out := set(nightly) - set(chosen):
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("slow", "nightly")))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":  # what a file's first test sets up, another would
        _seconds[report.nodeid] = report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.write_slow and not hasattr(session.config, "workerinput"):
        found = {name for name, seconds in _seconds.items() if seconds > SLOW}
        left = (
            set(SLOW_LIST.read_text("utf-8").splitlines()) - _seconds.keys()
        )  # a part of the tests says nothing about the others
        SLOW_LIST.write_text("".join(f"{name}\n" for name in sorted(found | left)), "utf-8")


DAY = date.fromisoformat(os.environ["WORKBENCH_DAY"])
FROZEN_EVERY = 5
"""Tests between two exemptions from garbage collection."""
_ended = 0


def pytest_collection_finish() -> None:
    freeze()


def pytest_runtest_logfinish() -> None:
    global _ended
    _ended += 1
    if _ended % FROZEN_EVERY == 0:
        freeze()


def freeze() -> None:
    """Exempt what exists by now from garbage collection, which the package asks for whenever it frees a live model.

    Otherwise each collection scans all that the session has imported and kept: 1 ms at its start, 200 ms after 2,000 tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Family (and dtype) -> directory of a random model, made when first asked for. Not to be changed by a test."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
        key = (family, dtype)
        if key not in made:
            made[key] = shared(save_model(tmp_path_factory.mktemp("models") / family, family, dtype=dtype))
        return made[key]

    return get


@pytest.fixture(scope="session")
def dense_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family of `dense.py`, or "gpt_neox sequential" -> a tiny float32 model. Not to be changed by a test."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_dense(family.partition(" ")[0], tmp_path_factory.mktemp("dense") / family.replace(" ", "-"))
            if family == "gpt_neox sequential":
                edit_json(made[family] / "config.json", use_parallel_residual=False)
        return made[family]

    return get


@pytest.fixture(scope="session")
def llama(model_of: Callable[..., Path]) -> Path:
    """Four layers, tied embeddings, bf16."""
    return model_of("llama")


@pytest.fixture(scope="session")
def bricks(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with LoRA adapters one, two, three (one r=8, two rsLoRA) and a checkpoint full, all on `llama`."""
    out = tmp_path_factory.mktemp("bricks")
    save_adapter(llama, out / "one", seed=1, r=8)
    save_adapter(llama, out / "two", seed=2, use_rslora=True)
    save_adapter(llama, out / "three", seed=3)
    save_finetuned(llama, out / "full", seed=4)
    return shared(out)


@pytest.fixture
def project(tmp_path: Path, llama: Path, bricks: Path) -> Project:
    """An empty project on the tiny llama."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "base").symlink_to(llama)
    (tmp_path / "bricks").symlink_to(bricks)
    return Project(tmp_path)


@pytest.fixture(scope="module")
def mergekit_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with the float32 models of `save_models`, for what is compared with mergekit."""
    path = tmp_path_factory.mktemp("imported")
    (path / "recipes").mkdir()
    save_models(path)
    return path


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 llamas of two layers: base, other and third with other vocabularies (untied), and the same three below tied/."""
    top = tmp_path_factory.mktemp("vocabularies")
    for place, tied in ((top, False), (top / "tied", True)):
        base = save_llama(place / "base", BASE, tied=tied)
        save_tuned(base, place / "other", BASE, OTHER, seed=1)
        save_tuned(base, place / "third", BASE, THIRD, seed=2)
    return top


@pytest.fixture
def words_project(tmp_path: Path, vocabularies: Path) -> Project:
    """A project on them."""
    return Project.of(tmp_path, vocabularies)


@pytest.fixture(scope="session")
def score_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Project, str], None]:
    """Score a recipe of the project that is the working directory, as `workbench eval NAME` does.

    A later test with the same recipe and the same suites gets a copy of the scores and of the cache.
    """
    from worlds.commands import call

    scored: dict[tuple[bytes, ...], Path] = {}

    def score(project: Project, name: str) -> None:
        suites = sorted(file for file in (project.path / "evals").rglob("*") if file.is_file())
        key = tuple(file.read_bytes() for file in (project.path / "recipes" / f"{name}.yaml", *suites))
        if key not in scored:
            call("eval", name)
            scored[key] = tmp_path_factory.mktemp("scored")
            places = project.path, scored[key]
        else:
            places = scored[key], project.path
        for part in ("runs/scores", ".workbench"):
            shutil.copytree(places[0] / part, places[1] / part, dirs_exist_ok=True)

    return score


SHARED: dict[Path, dict[str, tuple[int, int]]] = {}
"""Folder of a model or a brick that tests share -> size and time of its files."""


def shared(folder: Path) -> Path:
    """Note the files of a folder that no test may change."""
    SHARED[folder] = state_of(folder)
    return folder


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return {str(file): (info.st_size, info.st_mtime_ns) for file in files if (info := file.stat())}


@pytest.fixture(autouse=True, scope="module")
def _shared_folders_stay(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail after a file of tests one of which changes a model or a brick that other tests use."""
    yield
    for folder, state in SHARED.items():
        if (now := state_of(folder)) != state:
            SHARED[folder] = now
            pytest.fail(f"a test of {request.path.name} has changed {folder}, which other tests use")


@pytest.fixture(autouse=True)
def _talkative() -> None:
    """The command line's one output keeps --quiet for the process; a test starts without it."""
    from workbench.console.output import out

    out.quiet = False


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder, which is that of its project, as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def _bundled_index() -> Iterator[None]:
    """Every manager of tasks shares one index of the tasks that come with lm-eval, which takes seconds to build.

    Where no file of tests has imported lm-eval, few managers are made, and importing it would take as long.
    """
    if "lm_eval.tasks" not in sys.modules:
        yield
        return
    from worlds.bundled import build_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks._index.TaskIndex.build", staticmethod(build_once))
        yield


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    """A folder with the tasks `copy` and `pick` of `local_tasks`."""
    from worlds.local_tasks import lay_out_tasks

    return lay_out_tasks(tmp_path / "tasks")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer with one token a byte."""
    from worlds.local_tasks import byte_tokenizer

    return byte_tokenizer()
