"""What a recipe is, and how one is found by its name, its Python file or a TOML file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

from asyncflow.core.config import RunConfig
from asyncflow.core.errors import AsyncFlowError, ConfigError
from asyncflow.core.nearest import did_you_mean, nearest
from asyncflow.core.settings import read_toml, resolve
from asyncflow.core.types import Demonstration, Prompt
from asyncflow.rollout.chat import Agent

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be learnt. Held-out prompts are never trained on.

    `agent` lets the policy answer a prompt and returns what that was worth, 1 where it is right:
    `single_turn(reward)`, or any asynchronous function over a prompt and a `Chat`. `model` is
    given an empty folder, into which it may write a `from_pretrained` folder, and returns a
    folder or a hub name.
    """

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    agent: Agent
    model: Callable[[Path], str]
    demonstrations: Sequence[Demonstration] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A complete run: its settings and its task. `name` finds it again from any folder.

    `defaults_for` gives the settings that suit a model. A recipe whose settings are the same
    for all models has no such function, and `defaults` serves for all.
    """

    name: str
    summary: str
    defaults: Callable[[], RunConfig]
    defaults_for: Callable[[str], RunConfig]
    task: Callable[[RunConfig], Task]

    def configure(self, *, file: Path | None = None, words: Sequence[str] = ()) -> RunConfig:
        """The settings for the model that defaults, file and words name, overridden by file and words.

        Raises `ConfigError` with every problem of all of them.
        """
        model = resolve(self.defaults(), file=file, words=words).model
        config = resolve(self.defaults_for(model), file=file, words=words)
        return config.model_copy(update={"recipe": self.name})


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeName:
    """A recipe that comes with asyncflow."""

    name: str
    summary: str


def list_recipes() -> list[RecipeName]:
    """The recipes that come with asyncflow, by name.

    They are recognised without importing them, which may be slow: a module of this package
    with a function `defaults` and a function `task`.
    """
    return sorted(_own_recipes(), key=lambda recipe: recipe.name)


def load_recipe(word: str) -> Recipe:
    """The recipe with this name, or in this `.py` file, or named by this `.toml` file.

    Raises `ConfigError` when there is none, or when the user's file does not work.
    """
    if word.endswith(".toml"):
        return load_recipe(_recipe_of(Path(word)))
    if word.endswith(".py"):
        return _load_file(Path(word))
    names = [recipe.name for recipe in list_recipes()]
    if word not in names:
        hint = did_you_mean(nearest(word, names))
        raise ConfigError(
            f"there is no recipe {word!r}.{hint} Recipes: {', '.join(names)}; or give a .py or a .toml file"
        )
    return _recipe(importlib.import_module(f"asyncflow.recipes.{word}"), name=word)


def is_size(model: str, sizes: Sequence[str]) -> bool:
    """Whether `model` is one of the sizes that a recipe builds, rather than a folder or a hub name.

    Raises `ConfigError` for what looks like a misspelt size.
    """
    if model in sizes:
        return True
    meant = nearest(model, sizes)
    if meant is not None and not Path(model).exists():
        raise ConfigError(f"model={model} is neither a folder nor a size that this recipe builds.{did_you_mean(meant)}")
    return False


def check_task(task: Task, config: RunConfig) -> None:
    """Raise `ConfigError` with every reason why this task cannot be trained."""
    problems = list(_problems(task, config))
    if problems:
        raise ConfigError(*problems)


def _own_recipes() -> Iterator[RecipeName]:
    for file in Path(__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_bytes())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if {"defaults", "task"} <= functions:
            yield RecipeName(name=file.stem, summary=_first_line(ast.get_docstring(tree)))


def _recipe_of(file: Path) -> str:
    """The word in a TOML file that names its recipe; a file's path is relative to the TOML file."""
    word = read_toml(file).get("recipe")
    if not isinstance(word, str) or not word:
        raise ConfigError(f'{file}: names no recipe. Begin it with a line such as recipe = "quickstart"')
    if word.endswith(".toml"):
        raise ConfigError(f"{file}: recipe = {word!r} is a TOML file too; name a recipe or a .py file")
    return str(file.parent / word) if word.endswith(".py") else word


def _load_file(file: Path) -> Recipe:
    """Run the user's own file as a module."""
    file = file.resolve()
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"asyncflow_recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: Python cannot load it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and others look up what a class's annotations mean
    try:
        _placed(spec.loader.exec_module, file)(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    recipe = _recipe(module, name=str(file))
    return Recipe(
        name=recipe.name,
        summary=recipe.summary,
        defaults=_placed(recipe.defaults, file),
        defaults_for=_placed(recipe.defaults_for, file),
        task=_placed(recipe.task, file),
    )


def _recipe(module: ModuleType, *, name: str) -> Recipe:
    missing = [wanted for wanted in ("defaults", "task") if not callable(getattr(module, wanted, None))]
    if missing:
        raise ConfigError(
            f"{name}: has no function {' and none '.join(missing)}. "
            "A recipe has defaults() -> RunConfig and task(config) -> Task"
        )
    return Recipe(
        name=name,
        summary=_first_line(module.__doc__),
        defaults=module.defaults,
        defaults_for=getattr(module, "defaults_for", lambda model: module.defaults()),
        task=module.task,
    )


def _placed(call: Callable[ParamsT, ResultT], file: Path) -> Callable[ParamsT, ResultT]:
    """The same call, whose errors say on which line of the user's file they arose."""

    def placed(*arguments: ParamsT.args, **options: ParamsT.kwargs) -> ResultT:
        try:
            return call(*arguments, **options)
        except AsyncFlowError:
            raise
        except Exception as error:
            raise ConfigError(f"{file}:{_line(error, file)}: {type(error).__name__}: {error}") from error

    return placed


def _line(error: Exception, file: Path) -> int:
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno or 1
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return (frames or [1])[-1] or 1


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _problems(task: Task, config: RunConfig) -> Iterator[str]:
    if not task.train:
        yield "the task has no training prompts"
    if not task.held_out:
        yield "the task has no held-out prompts: keep some of the data back, so that learning can be measured"
    if config.warmup.steps > 0 and not task.demonstrations:
        yield f"warmup.steps is {config.warmup.steps}, but the task has no demonstrations"
    ids = Counter(prompt.id for prompt in [*task.train, *task.held_out])
    if twice := [name for name, count in ids.items() if count > 1]:
        yield f"prompt ids must be unique, also between training and held-out prompts; {_some(twice)} came twice"
    held_out = {prompt.text for prompt in task.held_out}
    shown = {
        "training prompts": [prompt.text for prompt in task.train if prompt.text in held_out],
        "demonstrations": [one.prompt.text for one in task.demonstrations if one.prompt.text in held_out],
    }
    for where, texts in shown.items():
        if texts:
            yield f"{len(texts)} held-out prompts are also {where}, such as {_some(texts)}: accuracy would mislead"


def _some(texts: Sequence[str]) -> str:
    first = repr(texts[0] if len(texts[0]) <= 40 else texts[0][:37] + "...")
    return first if len(texts) == 1 else f"{first} and {len(texts) - 1} more"
