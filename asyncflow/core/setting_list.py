"""Every setting as data: its dotted name, default, what is accepted, and what it does.

Read from the models in `asyncflow.core.config`, where each setting is written once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from asyncflow.core.config import RunConfig, Section
from asyncflow.core.nearest import likeness

Value = bool | int | float | str | tuple[float, ...]

ALIASES = {
    "lr": "train.learning_rate",
    "wd": "train.weight_decay",
    "grad_clip": "train.max_grad_norm",
    "beta": "algorithm.kl_coef",
    "kl": "algorithm.kl_coef",
    "loss": "algorithm.correction",
    "eps": "algorithm.clip_high",
    "clip_eps": "algorithm.clip_high",
    "batch_size": "groups_per_step",
    "train_batch_size": "groups_per_step",
    "num_generations": "group_size",
    "num_samples": "group_size",
    "num_steps": "steps",
    "max_steps": "steps",
    "total_steps": "steps",
    "staleness": "max_staleness",
    "off_policy": "max_staleness",
    "temp": "sampling.temperature",
    "max_new_tokens": "sampling.max_tokens",
    "max_length": "sampling.max_tokens",
    "eval_every": "evaluate.every",
    "save_every": "checkpoint.every",
    "sft_steps": "warmup.steps",
    "model_name": "model",
    "dataset": "data",
}
"""What other programs call our settings: for suggestions only, never accepted."""

SAME_SECTION = 0.15
"""Added to the likeness of a name in the section that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting. `name` is dotted; `expected` says type, unit and range in words."""

    name: str
    default: Value
    expected: str
    description: str

    @property
    def section(self) -> str:
        """The table it stands in; empty for those at the top."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """Its name within the section."""
        return self.name.rpartition(".")[2]


@cache
def fields() -> dict[str, FieldInfo]:
    """The model field behind every dotted name, the settings at the top first."""
    return dict(_walk(RunConfig, ""))


def list_settings(config: RunConfig) -> list[Setting]:
    """All settings, with the values of `config` as their defaults."""
    return [
        Setting(
            name=name,
            default=value_of(config, name),
            expected=expected(field),
            description=field.description or "",
        )
        for name, field in fields().items()
    ]


def value_of(config: RunConfig, name: str) -> Value:
    """The value of the setting with this dotted name."""
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, bool | int | float | str | tuple):
        raise TypeError(f"{name} is a table of settings, not one setting")
    return value


def read_value(field: FieldInfo, raw: object, *, strict: bool) -> Value:
    """The typed value of `raw`. Raises pydantic's `ValidationError`.

    Words of the command line are read leniently, a file's values strictly: `steps = "40"`
    in a file is a mistake.
    """
    annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    adapter: TypeAdapter[Value] = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))  # type: ignore[arg-type]
    return adapter.validate_python(_parts(raw) if is_tuple(field) else raw, strict=strict)


def expected(field: FieldInfo) -> str:
    """What is accepted, in words: `a whole number >= 1`."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if is_tuple(field):
        return f"{len(get_args(annotation))} numbers, as in {','.join(str(part) for part in field.default)}"
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return "text"
    kind = "a whole number" if annotation is int else "a number"
    return " and ".join([f"{kind} {bounds[0]}", *bounds[1:]]) if (bounds := list(_bounds(field))) else kind


def is_tuple(field: FieldInfo) -> bool:
    """Whether the setting holds several numbers."""
    return get_origin(field.annotation) is tuple


def nearest_setting(name: str, names: Iterable[str]) -> str | None:
    """The setting that was probably meant, searched across all sections.

    >>> nearest_setting("train.lrr", fields()), nearest_setting("lr", fields())
    ('train.learning_rate', 'train.learning_rate')
    """
    best = max(names, key=lambda candidate: _closeness(name, candidate))
    return best if _closeness(name, best) >= 0.65 else None


def _closeness(name: str, candidate: str) -> float:
    section, _, key = name.rpartition(".")
    candidate_section, _, candidate_key = candidate.rpartition(".")
    score = max(likeness(name, candidate), likeness(key, candidate_key))
    is_same_section = bool(section) and likeness(section, candidate_section) > 0.7
    for alias, target in ALIASES.items():
        if target == candidate or (is_same_section and target.rpartition(".")[2] == candidate_key):
            # An alias beats a setting of the same name elsewhere: batch_size is not the warm-up's.
            score = max(score, 1.05 * likeness(key, alias))
    return score + (SAME_SECTION if is_same_section else 0.0)


def _walk(model: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    sections: list[tuple[str, type[Section]]] = []
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections.append((key, field.annotation))
        else:
            yield prefix + key, field
    for key, section in sections:
        yield from _walk(section, f"{prefix}{key}.")


def _bounds(field: FieldInfo) -> Iterator[str]:
    for bound in field.metadata:
        match bound:
            case Ge(ge=limit):
                yield f">= {limit}"
            case Gt(gt=limit):
                yield f"> {limit}"
            case Le(le=limit):
                yield f"<= {limit}"
            case Lt(lt=limit):
                yield f"< {limit}"
            case _:
                continue


def _parts(raw: object) -> object:
    """Several numbers as pydantic's strict mode wants them: a tuple."""
    if isinstance(raw, str):
        return tuple(raw.strip("()[] ").split(","))
    return tuple(raw) if isinstance(raw, list) else raw
