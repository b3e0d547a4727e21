"""Runs single source files of installed packages, with stand-ins for all they import.

The package itself is not imported, nor is what it needs: `transformers` with PyTorch takes seconds
and hundreds of megabytes, the few files that define one model milliseconds. Only files of installed
packages are run, never one of a model's folder.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redpass.checks.stand_ins import Undecided, Unknown

PREFIX = "skeleton"
"""Begins the names of modules here, so that nobody takes them for the real ones."""

_NUMBERS = itertools.count()

PLAIN = frozenset({"typing_extensions", "packaging"})
"""Packages that are small enough to be imported."""

Get = Callable[[str], Any]


class StandIn(types.ModuleType):
    """A module that has every name somebody asks for."""

    def __init__(self, name: str, get: Get) -> None:
        super().__init__(name)
        self.__dict__.update(__path__=[], _get=get)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            found = self.__dict__[name] = self.__dict__["_get"](name)
        except (
            AttributeError,
            ImportError,
        ) as error:  # else it would read as a name that is not there
            raise Undecided(f"{self.__name__}.{name}: {error}") from error
        return found


class Installed:
    """Modules made of the source files of installed packages, and their stand-ins.

    Args:
        packages: those that are not imported.
        executed: full names of the modules in them whose files are run; all others are stand-ins.

    Attributes:
        modules: those made so far, by full name.
        values: package -> what the names of its stand-ins are, if not `Unknown`.
        after: module -> what to do with it once its file was run.
    """

    def __init__(self, packages: tuple[str, ...], executed: re.Pattern[str]) -> None:
        self.roots = {name: _home(name) for name in packages}
        self.executed = executed
        self.prefix = f"{PREFIX} {next(_NUMBERS)} of "
        self.modules: dict[str, Any] = {}
        self.values: dict[str, type[Unknown]] = {}
        self.after: dict[str, Callable[[Any], None]] = {}
        self._builtins = {**vars(builtins), "__import__": self._import}
        self.modules["importlib.util"] = _copy(importlib.util, find_spec=_find_spec)
        self.modules["importlib"] = _copy(
            importlib, import_module=self.import_module, util=self.modules["importlib.util"]
        )

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        for name in [name for name in sys.modules if name.startswith(self.prefix)]:
            del sys.modules[name]

    def stand_in(self, name: str, get: Get | None = None, /, **given: Any) -> Any:
        """Makes a stand-in, or gives the one that is there more names."""
        if name not in self.modules:
            self.modules[name] = StandIn(name, self._getter(name, get))
            parent, _, child = name.rpartition(".")
            if parent in self.modules:
                self.modules[parent].__dict__.setdefault(child, self.modules[name])
        self.modules[name].__dict__.update(given)
        return self.modules[name]

    def _getter(self, home: str, get: Get | None) -> Get:
        kind = self.values.get(home.partition(".")[0], Unknown)

        def found(name: str) -> Any:
            full = f"{home}.{name}"
            if full in self.modules or self._is_executed(full):
                return self.load(full)
            return get(name) if get else kind(full)

        return found

    def load(self, name: str) -> Any:
        """Returns a module by its full name: run from its file, or a stand-in."""
        if name in self.modules:
            return self.modules[name]
        return self._run(name) if self._is_executed(name) else self.stand_in(name)

    def import_module(self, name: str, package: str | None = None) -> Any:
        """Stands in for the function of `importlib`."""
        return self.load(f"{package}{name}" if name.startswith(".") else name)

    def file(self, name: str) -> Path:
        """Returns where the source of a module would be."""
        root, *parts = name.split(".")
        path = self.roots[root].joinpath(*parts)
        return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")

    def _is_executed(self, name: str) -> bool:
        return bool(self.executed.fullmatch(name)) and self.file(name).exists()

    def _run(self, name: str) -> Any:
        file, key = self.file(name), self.prefix + name
        module = self.modules[name] = sys.modules[key] = types.ModuleType(key)
        is_package = file.name == "__init__.py"
        module.__dict__.update(
            __builtins__=self._builtins,
            __file__=str(file),
            __package__=name if is_package else name.rpartition(".")[0],
        )
        code = importlib.machinery.SourceFileLoader(name, str(file)).get_code(name)
        assert code is not None
        try:
            exec(code, module.__dict__)  # the file is part of an installed package
        except BaseException:
            del self.modules[name]
            raise
        self.after.get(name, lambda _: None)(module)
        return module

    def _import(
        self,
        name: str,
        scope: Mapping[str, Any] | None = None,
        _: object = None,
        wanted: tuple[str, ...] | None = (),
        level: int = 0,
    ) -> Any:
        """Stands in for the import statement. `scope` are the globals it stands in."""
        name = _absolute(name, scope or {}, level)
        root = name.partition(".")[0]
        if name not in self.modules and (root in sys.stdlib_module_names or root in PLAIN):
            return builtins.__import__(name, None, None, wanted or (), 0)
        module = self.load(name)
        for item in wanted or ():
            full = f"{name}.{item}"
            if item not in module.__dict__ and (full in self.modules or self._is_executed(full)):
                module.__dict__[item] = self.load(full)
        return module if wanted else self._top(name)

    def _top(self, name: str) -> Any:
        """The package that `import a.b.c` names, with what is below attached."""
        parent, _, child = name.rpartition(".")
        if not parent:
            return self.load(name)
        self.load(parent).__dict__.setdefault(child, self.load(name))
        return self._top(parent)


def _home(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Undecided(f"{package} is not installed")
    return Path(spec.origin).parent


def _find_spec(name: str, _: str | None = None) -> Any:
    if "." in name:  # the real function would import the package
        raise Undecided(f"whether {name} is there")
    return importlib.util.find_spec(name)


def _copy(module: types.ModuleType, **changed: Any) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update({**vars(module), **changed})
    return copy


def _absolute(name: str, scope: Mapping[str, Any], level: int) -> str:
    if not level:
        return name
    base = scope["__package__"].rsplit(".", level - 1)[0]
    return f"{base}.{name}" if name else str(base)
