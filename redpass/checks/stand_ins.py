"""Values nothing is known of, for code that is run without the libraries it uses.

Code that asks more of them (their truth, their length, a number) stops with `Undecided`, so that
what comes out is what the real libraries would give, or nothing.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any, NoReturn


class Undecided(BaseException):  # not an Exception, which the code that runs would catch
    """Only the real libraries can tell."""


def _stop(what: str) -> Callable[..., NoReturn]:
    def method(self: Unknown, *_: object) -> NoReturn:
        raise Undecided(f"{what} of {self._path}")

    return method


class Unknown:
    """A value nothing is known of: it may be passed on and kept, and not looked at."""

    _path: str
    _is_called = True
    __bool__ = __iter__ = __len__ = __index__ = __int__ = __float__ = _stop("the value")
    __contains__ = __instancecheck__ = __subclasscheck__ = __setitem__ = _stop("the inside")

    def __init__(self, path: str = "", *, is_called: bool = True) -> None:
        self.__dict__.update(_path=path, _is_called=is_called)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = self.__dict__[name] = type(self)(f"{self._path}.{name}")
        return found

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Returns something unknown; modules are not handed out, they might come back changed."""
        if not self._is_called or any(_has_weights(v) for v in (*values, *named.values())):
            raise Undecided(f"{self._path} is called with a module")
        return self._result(values)

    def _result(self, values: tuple[Any, ...]) -> Any:
        """What a function becomes when it is decorated may not be called."""
        return Unknown(f"{self._path}()", is_called=not any(map(is_code, values)))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (Foreign,) if next(b for b in bases if isinstance(b, Unknown)) is self else ()

    def _derived(self, *_: object) -> Any:
        return type(self)(f"{self._path}...")

    def __getitem__(self, key: Any) -> Any:
        return self._derived(key)

    def __eq__(self, other: object) -> Any:
        return True if self is other else self._derived()

    def __ne__(self, other: object) -> Any:
        return False if self is other else self._derived()

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, _: object) -> Unknown:
        return self

    def __enter__(self) -> Unknown:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _operator(self: Unknown, *others: object) -> Any:
    return self._derived(*others)


_TWO = [name for name in vars(operator) if f"__r{name.strip('_')}__" in dir(int)]
_REST = ["lt", "le", "gt", "ge", "neg", "pos", "abs", "invert"]
for _name in (*_TWO, *(f"r{name}" for name in _TWO), *_REST):
    setattr(Unknown, f"__{_name.strip('_')}__", _operator)


def _has_weights(value: object) -> bool:
    return "_parameters" in getattr(value, "__dict__", ())


def is_code(value: object) -> bool:
    """Whether a value is a function or a class, which a decorator takes."""
    return isinstance(value, types.FunctionType | type)


class Foreign:
    """The base of a class whose real base is unknown; none of it can be made."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Returns something unknown. Raises `Undecided` for a kind of module."""
        if any(kind.__name__ == "Module" for kind in cls.__mro__):
            raise Undecided(f"{cls.__name__} has an unknown base")
        return Unknown(cls.__name__)

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()
