"""Base of objects that belong to a process group: copies of a model share them, and they cannot be pickled."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

from deepep_moe.errors import UnsupportedError

T = TypeVar("T", bound="Shared")


class Shared:
    """Base of dispatchers, buffers and backends.

    ``copy.deepcopy`` of a module that holds one copies the parameters and shares this object. Pickling raises
    :class:`~deepep_moe.errors.UnsupportedError`.
    """

    def __copy__(self: T) -> T:
        return self

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        name = type(self).__name__
        raise UnsupportedError(
            f"a {name} cannot be pickled: it belongs to a process group of this process. Save the state_dict of the "
            f"module that holds it, and make a new {name} where it is loaded"
        )
