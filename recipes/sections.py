"""The training recipes' command lines and settings: sections of a YAML file, checked; errors of one line."""

from __future__ import annotations

import dataclasses
import difflib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch.distributed as dist
import typer
import yaml

from deepep_moe.errors import DeepEPMoEError

T = TypeVar("T")


class RecipeError(Exception):
    """Something a user can mend: a setting, a path, a checkpoint of another run. Shown without a stack trace."""


# ------------------------------------------------------------------------------------------ command line

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change one setting; repeatable")
]
Resume = Annotated[bool, typer.Option("--resume", metavar="", help="continue from the latest checkpoint in the folder")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Around a script's work: one line on stderr for an error, exit status 1, and no process group left behind.

    What a user can mend has no stack trace. Under torchrun every error is also written to the file that torchrun reads
    (as ``torch.distributed.elastic.multiprocessing.errors.record`` does), so the report that it ends with shows the
    first error of any rank, with the stack trace of one that nobody expected.
    """
    try:
        yield
    except (RecipeError, DeepEPMoEError) as error:
        _report_error(str(error), None, once=isinstance(error, RecipeError))
        raise typer.Exit(1) from None
    except typer.Exit:
        raise
    except Exception as error:
        if ERROR_FILE not in os.environ:
            raise  # Python prints the stack trace
        _report_error(f"{type(error).__name__}: {error}", error, once=False)
        raise typer.Exit(1) from None
    finally:
        if dist.is_initialized():
            gc.collect()  # models use the group, and PyTorch may abort if it is gone before them
            dist.destroy_process_group()


ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def _report_error(text: str, error: Exception | None, once: bool) -> None:
    """``once``: the ranks of a node are likely to have the same error, so one of them prints it."""
    text = f"error on rank {os.environ.get('RANK', '0')}: {text}"
    if not once or ERROR_FILE not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
    if ERROR_FILE in os.environ:
        extra = {"timestamp": str(int(time.time()))}
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            told = [frame for frame in frames if not frame.filename.endswith("torch/nn/modules/module.py")]
            lines = [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}' for frame in told]
            extra["py_callstack"] = "\n".join([text, *lines[-12:]])
        content = json.dumps({"message": {"message": text, "extraInfo": extra}})
        Path(os.environ[ERROR_FILE]).write_text(content, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- settings

BYTES = 256  # different values of a byte of text

_MOST = 2**31 - 1  # of a number in a section; seeds of PyTorch and NumPy may be as large

Positive = Annotated[int, 1]
"""An integer field of a section that must be at least 1. Other numbers of sections must not be negative."""


def read_settings(path: Path, overrides: Iterable[str], sections: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The YAML file at ``path`` with ``section.key=value`` overrides, whose values are YAML too.

    Returns all of ``sections``, those that the file does not have empty. In a section of nested mappings the key may
    have several parts: ``ds_config.optimizer.params.lr=1e-4``.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} must hold a mapping of sections: {', '.join(sections)}")
    for section, values in settings.items():
        if section not in sections:
            raise RecipeError(f"unknown section {section} in {path}; allowed: {', '.join(sections)}")
        if values is not None and not isinstance(values, dict):
            raise RecipeError(f"section {section} in {path} must be a mapping, not {values!r}")
    settings = {section: settings.get(section) or {} for section in sections}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, *inner, key = name.split(".") if "." in name else ("", name)
        if not (equals and section in sections and key):
            raise RecipeError(f"--set {override}: write section.key=value with a section of {', '.join(sections)}")
        place = settings[section]
        for part in inner:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"--set {override}: {part} is {place!r}, not a mapping")
        try:
            place[key] = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    return settings


def fill(kind: type[T], section: str, values: Mapping[str, Any]) -> T:
    """The dataclass ``kind`` from one section of the settings; unknown, missing and impossible values are errors."""
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind, include_extras=True)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise RecipeError(f"unknown key {section}.{key}{hint}; allowed: {', '.join(known)}")
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise RecipeError(f"{section}.{key} is missing")
    filled = {}
    for key, value in values.items():
        name, positive = f"{section}.{key}", types[key] == Positive
        filled[key] = checked(name, value, int if positive else types[key])
        if isinstance(filled[key], (int, float)) and not positive <= filled[key] <= _MOST:
            raise RecipeError(f"{name} = {value}: allowed is {int(positive)} to {_MOST}")
    return kind(**filled)


def checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` for a field of type ``kind``, where that is bool, int, float, str, or a union of these and None.

    ``1e-4``, which YAML reads as text, is a number for a float. Values for fields of other types are passed on.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if not all(option in _TYPE_NAMES for option in options) or type(value) in options:
        return value
    if float in options and type(value) in (int, str):
        with suppress(ValueError):
            return float(value)
    raise RecipeError(f"{name} = {value!r}: allowed is {' or '.join(_TYPE_NAMES[option] for option in options)}")


_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "null",
}


def check_vocabulary(name: str, size: int) -> None:
    """Raise :class:`RecipeError` unless a vocabulary of ``size`` tokens holds every byte of a text."""
    if size < BYTES:
        raise RecipeError(f"{name} = {size}: allowed is at least {BYTES}, because text is read as bytes")
