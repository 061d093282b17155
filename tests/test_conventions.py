"""The rules that can be checked by reading the source; `docs/conventions.md` gives the reasons.

Each rule is a function from a syntax tree to the lines that break it. The second half of the
file plants a violation of every rule, so that a rule that finds nothing fails.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncflow"
PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = sorted(
    file for name in ("asyncflow", "tests", "examples", "benchmarks") for file in ROOT.glob(f"{name}/**/*.py")
)

Rule = Callable[[ast.Module], Iterator[int]]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}

CODE_LOADERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
CODE_RUNNERS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system", "os.popen"}
LOOSE_TASKS = {"asyncio.create_task", "asyncio.gather", "asyncio.ensure_future"}
OUTSIDE_MODULES = {"time", "random", "secrets", "uuid", "socket", "subprocess", "multiprocessing"}
OUTSIDE_CALLS = {
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "date.today",
    "os.urandom",
    "os.fork",
    "os.getrandom",
}
FILE_WRITERS = {"write_text", "write_bytes", "touch", "unlink", "rename", "rmdir", "symlink_to", "hardlink_to"}

MAY_TOUCH_THE_WORLD = {
    "asyncflow/core/world.py": "it is the world",
    "asyncflow/data/arena.py": "stamps begin at a drawn number, which no data looks like",
    "asyncflow/data/client_memory.py": "a client waits for room, in a process outside the event loop and simulation",
    "asyncflow/data/connection.py": "a client blocks, in a process outside the event loop and simulation",
    "asyncflow/data/log_reader.py": "compaction replaces the log's segments whole",
    "asyncflow/data/log_segments.py": "the log's thread writes, and opening it cuts what a crash left",
    "asyncflow/data/restore.py": "the generation of a queue without a log is drawn, so that no two have the same",
    "asyncflow/data/serve.py": "it is a process of its own, outside simulation",
    "asyncflow/data/server.py": "it owns the sockets to other processes, which no simulation has",
    "asyncflow/data/server_process.py": "it owns the server's process and the socket to it",
    "asyncflow/engines/rollout/process.py": "it owns the worker's process and the socket to it",
    "asyncflow/engines/rollout/worker.py": "it is a process of its own, outside simulation",
    "asyncflow/plan/virtual.py": "it is the simulated world: it draws schedules from a seed",
    "asyncflow/recipes/run_log.py": "a log that a run does not go on with is renamed",
    "asyncflow/workflow/checkpoint_folder.py": "a checkpoint appears by renaming a folder that engines wrote",
}
"""Files that may, each with the reason."""

MAY_START_TASKS = {
    "asyncflow/plan/virtual.py": "it is the event loop: the main task is the loop's own",
}


def name_of(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; calls and other expressions in it become `()`."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "()"


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the name of what is called."""
    return ((node, name_of(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported: `from os import system` is `os.system`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def option(call: ast.Call, name: str) -> object:
    """The literal value of a keyword argument; None where there is none."""
    values = [word.value for word in call.keywords if word.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def runs_foreign_code(tree: ast.Module) -> Iterator[int]:
    """Data must never become code."""
    for line, name in imports(tree):
        if name.split(".")[0] in CODE_LOADERS or name in CODE_RUNNERS:
            yield line
    for call, name in calls(tree):
        if name in CODE_RUNNERS or option(call, "shell") is True or option(call, "allow_pickle") is True:
            yield call.lineno


def starts_loose_tasks(tree: ast.Module) -> Iterator[int]:
    """A task belongs to a task group, and has a name that reports can show."""
    yield from (line for line, name in imports(tree) if name in LOOSE_TASKS)
    for call, name in calls(tree):
        owner, _, method = name.rpartition(".")
        is_task = method == "create_task"
        is_named = any(word.arg == "name" for word in call.keywords)
        if name in LOOSE_TASKS or (is_task and ("loop" in owner or owner == "()" or not is_named)):
            yield call.lineno


def touches_the_world(tree: ast.Module) -> Iterator[int]:
    """Time, randomness, network, processes and files to write come from `core.world`."""
    for line, name in imports(tree):
        if name.split(".")[0] in OUTSIDE_MODULES or name.startswith("numpy.random"):
            yield line
    for call, name in calls(tree):
        is_random = name.startswith(("np.random.", "numpy.random."))
        if is_random or name.endswith(tuple(OUTSIDE_CALLS)) or writes_a_file(call, name):
            yield call.lineno


def writes_a_file(call: ast.Call, name: str) -> bool:
    """Whether the call opens a file for writing, or changes the file system."""
    if name.rpartition(".")[2] in FILE_WRITERS and "disk" not in name:
        return True
    if name == "os.open" or name.rpartition(".")[2] != "open":
        return False
    modes = [option(call, "mode"), *(arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant))]
    return any(isinstance(mode, str) and len(mode) <= 3 and set(mode) & set("wax+") for mode in modes)


def swallows_cancellation(tree: ast.Module) -> Iterator[int]:
    """A task that swallows its cancellation can't be stopped."""
    raised = {name_of(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and catches_cancellation(node.type):
            inside = list(ast.walk(node))
            kept = {name_of(target) for inner in inside if isinstance(inner, ast.Assign) for target in inner.targets}
            is_raised_here = any(isinstance(inner, ast.Raise) for inner in inside)
            if not is_raised_here and not kept & raised:  # or kept, and raised later
                yield node.lineno
    for call, name in calls(tree):
        if name.endswith("suppress") and any(catches_cancellation(argument) for argument in call.args):
            yield call.lineno


def catches_cancellation(caught: ast.expr | None) -> bool:
    """Whether this `except` catches `CancelledError`, by name or as `BaseException`."""
    if isinstance(caught, ast.Tuple):
        return any(catches_cancellation(element) for element in caught.elts)
    return caught is None or name_of(caught).rpartition(".")[2] in {"CancelledError", "BaseException"}


def is_too_long(tree: ast.Module) -> Iterator[int]:
    """A function is read at one glance."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield node.lineno


def lacks_a_docstring(tree: ast.Module) -> Iterator[int]:
    """What others use says what it gives."""
    if not ast.get_docstring(tree):
        yield 1
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    while scopes:
        for node in scopes.pop().body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node) and not is_overload(node):
                yield node.lineno
            if isinstance(node, ast.ClassDef):
                scopes.append(node)


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """An overload or a setter is described by the function that it belongs to."""
    return any(name_of(mark).rpartition(".")[2] in {"overload", "setter"} for mark in node.decorator_list)


def prints(tree: ast.Module) -> Iterator[int]:
    """Only the command line speaks to the terminal."""
    return (call.lineno for call, name in calls(tree) if name in {"print", "sys.stdout.write"})


def broken(rule: Rule, files: list[Path], *, exempt: Iterable[str] = ()) -> list[str]:
    """Places, as `file:line`, at which the files break the rule."""
    names = {str(file.relative_to(ROOT)): file for file in files}
    return [
        f"{name}:{line}"
        for name, file in names.items()
        if name not in exempt
        for line in sorted(set(rule(ast.parse(file.read_text()))))
    ]


def test_data_never_becomes_code() -> None:
    assert broken(runs_foreign_code, PACKAGE_FILES) == []


def test_every_task_has_an_owner_and_a_name() -> None:
    assert broken(starts_loose_tasks, ALL_FILES, exempt=MAY_START_TASKS) == []


def test_only_the_world_touches_the_outside() -> None:
    assert broken(touches_the_world, PACKAGE_FILES, exempt=MAY_TOUCH_THE_WORLD) == []


@pytest.mark.parametrize(
    ("rule", "exempt"), [(touches_the_world, MAY_TOUCH_THE_WORLD), (starts_loose_tasks, MAY_START_TASKS)]
)
def test_every_exception_is_needed(rule: Rule, exempt: dict[str, str]) -> None:
    unneeded = [name for name in exempt if not broken(rule, [ROOT / name])]
    assert unneeded == [], "take these off the list"


def test_nobody_swallows_cancellation() -> None:
    assert broken(swallows_cancellation, ALL_FILES) == []


def test_functions_are_short() -> None:
    assert broken(is_too_long, ALL_FILES) == []


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in ALL_FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_names_say_something() -> None:
    parts = {part for file in PACKAGE_FILES for part in file.relative_to(PACKAGE).with_suffix("").parts}
    assert parts & BANNED_NAMES == set()


def test_public_names_are_documented() -> None:
    assert broken(lacks_a_docstring, PACKAGE_FILES) == []


def test_only_the_command_line_prints() -> None:
    assert broken(prints, [file for file in PACKAGE_FILES if file.parent.name != "cli"]) == []


PLANTED: list[tuple[Rule, str]] = [
    (runs_foreign_code, "import pickle"),
    (runs_foreign_code, "from os import system"),
    (runs_foreign_code, "def f():\n    import dill.source"),
    (runs_foreign_code, "eval('1')"),
    (runs_foreign_code, "exec(text)"),
    (runs_foreign_code, "torch.load(path)"),
    (runs_foreign_code, "yaml.load(text)"),
    (runs_foreign_code, "os.system('ls')"),
    (runs_foreign_code, "run('ls', shell=True)"),
    (runs_foreign_code, "np.load(path, allow_pickle=True)"),
    (starts_loose_tasks, "asyncio.create_task(f())"),
    (starts_loose_tasks, "asyncio.create_task(f(), name='f')"),
    (starts_loose_tasks, "asyncio.gather(f())"),
    (starts_loose_tasks, "asyncio.ensure_future(f())"),
    (starts_loose_tasks, "from asyncio import gather"),
    (starts_loose_tasks, "loop.create_task(f(), name='f')"),
    (starts_loose_tasks, "asyncio.get_running_loop().create_task(f(), name='f')"),
    (starts_loose_tasks, "group.create_task(f())"),
    (touches_the_world, "import time"),
    (touches_the_world, "from time import monotonic"),
    (touches_the_world, "import random"),
    (touches_the_world, "np.random.default_rng(3)"),
    (touches_the_world, "from numpy.random import default_rng"),
    (touches_the_world, "import socket"),
    (touches_the_world, "from subprocess import Popen"),
    (touches_the_world, "datetime.now(UTC)"),
    (touches_the_world, "datetime.datetime.now(UTC)"),
    (touches_the_world, "open(path, 'w')"),
    (touches_the_world, "path.open('ab')"),
    (touches_the_world, "path.open(mode='r+')"),
    (touches_the_world, "path.write_text('x')"),
    (touches_the_world, "path.unlink()"),
    (swallows_cancellation, "try: f()\nexcept asyncio.CancelledError: pass"),
    (swallows_cancellation, "try: f()\nexcept (ValueError, CancelledError): pass"),
    (swallows_cancellation, "try: f()\nexcept BaseException as e: g(e)"),
    (swallows_cancellation, "try: f()\nexcept: pass"),
    (swallows_cancellation, "try: f()\nexcept BaseException as e: kept = e\nif kept: raise ValueError"),
    (swallows_cancellation, "with contextlib.suppress(asyncio.CancelledError): f()"),
    (is_too_long, "def f():\n" + "    g()\n" * MAX_FUNCTION_LINES),
    (lacks_a_docstring, "x = 1"),
    (lacks_a_docstring, "'''Module.'''\ndef f(): pass"),
    (lacks_a_docstring, "'''Module.'''\nclass C:\n    '''Class.'''\n    def f(self): pass"),
    (prints, "def f():\n    print(1)"),
]

ALLOWED: list[tuple[Rule, str]] = [
    (runs_foreign_code, "spec.loader.exec_module(module)\nre.compile('x')\nmodel.eval()\nyaml.safe_load(text)"),
    (starts_loose_tasks, "async with asyncio.TaskGroup() as group:\n    group.create_task(f(), name='f')"),
    (touches_the_world, "open(path)\npath.open('rb')\npath.read_text()\nworld.rng('x').random()\nworld.now_s()"),
    (touches_the_world, "world.disk.write(path, data)"),
    (swallows_cancellation, "try: f()\nexcept asyncio.CancelledError:\n    g()\n    raise"),
    (swallows_cancellation, "try: f()\nexcept BaseException as e: kept = e\nif kept: raise kept"),
    (swallows_cancellation, "try: f()\nexcept Exception: pass"),
    (is_too_long, "def f():\n" + "    g()\n" * (MAX_FUNCTION_LINES - 1)),
    (lacks_a_docstring, "'''Module.'''\ndef _f(): pass\nclass _C: pass"),
]


@pytest.mark.parametrize(("rule", "source"), PLANTED)
def test_a_planted_violation_is_found(rule: Rule, source: str) -> None:
    assert len(list(rule(ast.parse(source)))) >= 1


@pytest.mark.parametrize(("rule", "source"), ALLOWED)
def test_what_is_right_passes(rule: Rule, source: str) -> None:
    assert list(rule(ast.parse(source))) == []
