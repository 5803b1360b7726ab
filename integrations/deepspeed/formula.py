"""What an expert computes: its ``forward``, run on symbols instead of tensors.

:func:`trace` executes the code of ``forward`` itself, in a namespace where the input, modules and functions are symbols
and builtins are missing. A symbol answers what :class:`Formula` can express: calls of ``nn.Linear``, of activations and
of functions in :data:`FUNCTIONS`, products and sums. Anything else raises :class:`Unproven`: parameters and buffers,
shapes, random numbers, anything stored. Plain numbers and flags are read as they are. So a formula is all that the
module does, not a guess from a few inputs.

What a trace relied on is kept in :class:`Facts`, which are cheap to check again in every forward pass.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Sigmoid)
"""Modules that treat every number alike, have no parameters, and do not ask whether they train."""

FUNCTIONS = frozenset(
    {
        *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.leaky_relu, F.softplus, F.tanh, F.sigmoid),
        *(torch.relu, torch.tanh, torch.sigmoid),
    }
)
"""Functions that treat every number alike."""

_CONSTANTS = (type(None), bool, int, float, str)
_UNTOUCHED: tuple[tuple[Any, str, Any], ...] = (
    *((kind, "forward", kind.forward) for kind in (nn.Linear, nn.Sequential, *ACTIVATIONS)),
    *((nn.Module, name, getattr(nn.Module, name)) for name in ("__call__", "_call_impl", "__getattr__")),
    (F, "linear", F.linear),
)
"""PyTorch's own code that a formula stands for, as it was on import; profilers put their own in its place."""
_OVERRIDABLE = frozenset(vars(nn.Module)) - {"__dict__", "__doc__"}
_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "SETUP_FINALLY", "SETUP_WITH")


class Unproven(Exception):
    """The module may compute something that no formula expresses; the message says what was met."""


class Result(NamedTuple):
    """What an earlier step of a formula gave; number 0 is the input."""

    number: int


@dataclass(frozen=True)
class Linear:
    """The ``nn.Linear`` at this path of the expert."""

    path: str


@dataclass(frozen=True)
class Activation:
    """A module of :data:`ACTIVATIONS`, equal to another of the same kind and settings."""

    kind: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    module: nn.Module = field(compare=False)


class Step(NamedTuple):
    operation: Linear | Activation | Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Formula:
    """Steps in the order in which the expert takes them; step i gives result i + 1."""

    steps: tuple[Step, ...]
    result: int

    def compute(self, linear: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """The expert's result for ``x``, with ``linear(path, x)`` in the place of its linear layers."""
        results: list[Any] = [x]
        for step, done_with in zip(self.steps, self._last_uses):
            given = [results[a.number] if isinstance(a, Result) else a for a in step.arguments]
            for number in done_with:  # frees memory, as the variables of a forward do
                results[number] = None
            if isinstance(step.operation, Linear):
                results.append(linear(step.operation.path, *given))
            else:
                call = step.operation.module if isinstance(step.operation, Activation) else step.operation
                results.append(call(*given, **dict(step.keywords)))
        return results[self.result]  # type: ignore[no-any-return]

    @cached_property
    def linear_paths(self) -> tuple[str, ...]:
        """Of the linear layers it calls, each once."""
        return tuple(dict.fromkeys(s.operation.path for s in self.steps if isinstance(s.operation, Linear)))

    @cached_property
    def last(self) -> str | None:
        """The linear layer whose result is the expert's; None if something else is, or it is called elsewhere too."""
        final = self.steps[-1].operation if self.steps and self.result == len(self.steps) else None
        once = sum(step.operation == final for step in self.steps) == 1
        return final.path if isinstance(final, Linear) and once else None

    @cached_property
    def _last_uses(self) -> list[list[int]]:
        """For each step the results that nothing after it needs."""
        last = {a.number: i for i, step in enumerate(self.steps) for a in step.arguments if isinstance(a, Result)}
        last.pop(self.result, None)
        return [[number for number, at in last.items() if at == i] for i in range(len(self.steps))]


class Facts:
    """What traces relied on. :meth:`hold` is called in every forward pass: it compares, and traces nothing."""

    hooked: nn.Module | None

    def __init__(self) -> None:
        self._modules: dict[int, tuple[nn.Module, type, int, list[tuple[str, Any]]]] = {}
        self._values: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        self._attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}

    def module(self, module: nn.Module) -> None:
        """Its class and children, and that nobody puts anything more on the object."""
        own = vars(module)
        self._modules[id(module)] = (module, type(module), len(own), list(own["_modules"].items()))

    def value(self, holder: Mapping[str, Any], name: str, value: Any) -> None:
        self._values[id(holder), name] = (holder, name, value)

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        self._attributes[id(owner), name] = (owner, name, value)

    def hold(self) -> bool:
        """Whether all is as it was; also notes in :attr:`hooked` a module with hooks that a call of it would run."""
        self.hooked = None
        for module, kind, size, children in self._modules.values():
            own = module.__dict__
            if module.__class__ is not kind or len(own) != size:
                return False
            if [*own["_modules"].items()] != children if children else own["_modules"]:
                return False
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                self.hooked = module
        return all(holder.get(name) is value for holder, name, value in self._values.values()) and all(
            getattr(owner, name, None) is value for owner, name, value in self._attributes.values()
        )


def replaced() -> str | None:
    """What somebody has put in the place of PyTorch's own code, for which formulas stand."""
    for owner, name, value in _UNTOUCHED:
        if getattr(owner, name) is not value:
            return f"{owner.__name__}.{name}"
    return None


def trace(expert: nn.Module, facts: Facts) -> Formula:
    """The formula of ``expert``; adds to ``facts`` what must stay as it is.

    Raises:
        Unproven: it has none that can be told from its code.
    """
    tape = _Tape(facts)
    try:
        result = _Module(tape, expert, "")(_Value(tape, 0))
    except Unproven:
        raise
    except Exception as error:  # what a symbol, or a namespace without builtins, does not know
        raise Unproven(f"{type(expert).__name__}.forward: {error}") from None
    if type(result) is tuple and result:  # a bias beside the output is left out, as in DeepSpeed
        result = result[0]
    if type(result) is not _Value:
        raise Unproven(f"{type(expert).__name__}.forward returns no tensor that a formula gives")
    return Formula(tuple(tape.steps), _inside(result)[1])


# -- symbols -----------------------------------------------------------------------------------------------------------


class _Tape:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.steps: list[Step] = []

    def record(self, operation: Any, arguments: Sequence[Any], keywords: Mapping[str, Any] | None = None) -> _Value:
        given = tuple(_argument(self, value) for value in arguments)
        named = tuple((name, _constant(value)) for name, value in (keywords or {}).items())
        if not any(isinstance(value, Result) for value in given):
            raise Unproven("calls a function without a tensor")
        self.steps.append(Step(operation, given, named))
        return _Value(self, len(self.steps))


def _argument(tape: _Tape, value: Any) -> Any:
    return Result(_inside(value)[1]) if type(value) is _Value and _inside(value)[0] is tape else _constant(value)


def _constant(value: Any) -> Any:
    if type(value) not in _CONSTANTS:
        raise Unproven("passes on something that is neither a tensor nor a plain number")
    return value


class _Symbol:
    """Holds what it stands for, and raises :class:`Unproven` for all that a subclass does not define."""

    __slots__ = ("held",)

    def __init__(self, *held: Any) -> None:
        object.__setattr__(self, "held", held)

    def __getattribute__(self, name: str) -> Any:
        raise Unproven(f"reads .{name} of a tensor or function")

    def _unknown(self, *_: Any) -> Any:
        raise Unproven("asks for the value of a tensor, module or function")

    __setattr__ = __delattr__ = _unknown
    __bool__ = __eq__ = __ne__ = __hash__ = __str__ = __repr__ = __format__ = _unknown  # type: ignore[assignment]


def _inside(symbol: _Symbol) -> tuple[Any, ...]:
    return object.__getattribute__(symbol, "held")  # type: ignore[no-any-return]


class _Value(_Symbol):
    """A tensor: (tape, number of the result)."""

    __slots__ = ()

    def __mul__(self, other: Any) -> _Value:
        return _inside(self)[0].record(operator.mul, (self, other))  # type: ignore[no-any-return]

    def __add__(self, other: Any) -> _Value:
        return _inside(self)[0].record(operator.add, (self, other))  # type: ignore[no-any-return]

    def _in_place(self, other: Any) -> Any:  # else Python would fall back on the operators above
        raise Unproven("changes a tensor in place")

    __imul__ = __iadd__ = _in_place


class _Function(_Symbol):
    """(tape, function of :data:`FUNCTIONS`)."""

    __slots__ = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> _Value:
        tape, function = _inside(self)
        return tape.record(function, arguments, keywords)  # type: ignore[no-any-return]


class _Namespace(_Symbol):
    """(tape, Python module): ``torch``, ``torch.nn.functional``."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        tape, module = _inside(self)
        return _read(tape, vars(module), name, module.__name__)


class _Module(_Symbol):
    """(tape, module, path): attributes and calls as :class:`torch.nn.Module` would serve them."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        tape, module, path = _inside(self)
        if hasattr(type(module), name):
            raise Unproven(f"uses {type(module).__name__}.{name}")
        own = vars(module)
        if name in own:
            return _read(tape, own, name, type(module).__name__)
        if name not in own["_modules"]:
            raise Unproven(f"reads {name!r}, which is a parameter or buffer of {type(module).__name__}")
        child = own["_modules"][name]
        return None if child is None else _Module(tape, child, f"{path}.{name}" if path else name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        tape, module, path = _inside(self)
        kind, own = type(module), vars(module)
        tape.facts.module(module)
        for name in _OVERRIDABLE & own.keys():
            raise Unproven(f"{name} of a {kind.__name__} is replaced")
        for name in ("__call__", "_call_impl", "__getattr__", "__getattribute__"):
            if getattr(kind, name) is not getattr(nn.Module, name):
                raise Unproven(f"{kind.__name__} has a {name} of its own")
        if kind is nn.Linear:
            if own.keys() & {"weight", "bias"} or own["_parameters"].keys() != {"weight", "bias"}:
                raise Unproven("weight or bias of a Linear is no parameter")
            return tape.record(Linear(path), arguments, keywords)
        if kind in ACTIVATIONS:
            settings = tuple((name, _setting(tape, own, name)) for name in getattr(kind, "__constants__", ()))
            return tape.record(Activation(kind, settings, module), arguments, keywords)
        if kind is nn.Sequential:
            if keywords or len(arguments) != 1:
                raise Unproven("calls a Sequential with more than one argument")
            x = arguments[0]
            for name, child in own["_modules"].items():
                x = _Module(tape, child, f"{path}.{name}" if path else name)(x)
            return x
        return _function_of_symbols(tape, kind)(self, *arguments, **keywords)


def _setting(tape: _Tape, own: Mapping[str, Any], name: str) -> Any:
    tape.facts.value(own, name, own[name])
    return _constant(own[name])


def _read(tape: _Tape, holder: Mapping[str, Any], name: str, whose: str) -> Any:
    """``holder[name]`` for the code of a forward: a constant, or a symbol."""
    value = holder.get(name)
    tape.facts.value(holder, name, value)
    if type(value) in _CONSTANTS and name in holder:
        return value
    if isinstance(value, ModuleType):
        return _Namespace(tape, value)
    if isinstance(value, Callable) and value in FUNCTIONS:  # type: ignore[arg-type]
        return _Function(tape, value)
    raise Unproven(f"uses {name!r} of {whose}")


def _function_of_symbols(tape: _Tape, kind: type[nn.Module]) -> Callable[..., Any]:
    """``kind.forward``: its own code, which finds symbols where it looks for globals, and no builtins."""
    forward = kind.forward
    if type(forward) is not FunctionType or forward.__closure__ or forward.__kwdefaults__:
        raise Unproven(f"{kind.__name__}.forward is not a plain function (decorated, or with variables of another)")
    tape.facts.attribute(kind, "forward", forward)
    for name in ("__code__", "__defaults__"):
        tape.facts.attribute(forward, name, getattr(forward, name))
    code = forward.__code__
    _check_code(kind, code)
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    symbols = {name: _read(tape, forward.__globals__, name, forward.__module__) for name in sorted(names)}
    defaults = tuple(_constant(value) for value in forward.__defaults__ or ())
    return FunctionType(code, {**symbols, "__builtins__": {}}, forward.__name__, defaults)


def _check_code(kind: type[nn.Module], code: CodeType) -> None:
    """Refuse what could hide that a symbol was asked too much (``try``, ``is``), or leave something behind."""
    instructions = list(dis.get_instructions(code))
    stores = any(step.opname in _STORES for step in instructions)
    identity = any(step.opname == "IS_OP" and before.argval is not None for before, step in pairwise(instructions))
    guarded = bool(getattr(code, "co_exceptiontable", b""))
    defines = any(isinstance(constant, CodeType) for constant in code.co_consts)
    generates = code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    if stores or identity or guarded or defines or generates:
        raise Unproven(f"{kind.__name__}.forward is more than a few plain statements")
