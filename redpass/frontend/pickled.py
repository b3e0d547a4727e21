"""`.pt` and `.pth`: PyTorch's weights-only unpickler, with an allow-list and no way around it.

A pickle is a program. The weights-only unpickler runs a small part of it: it makes tensors and
plain containers, and objects of classes it was told of. It is told of the classes of
`torch.nn.modules`, and of what the user names.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redpass.checks import pickled as checks
from redpass.errors import LoadError, UsageError

FORM = "module='package.module:function', a function without arguments that builds the module"


def load_pickled(path: Path, *, allow: Sequence[str] = (), trust: bool = False) -> Any:
    """Reads a `.pt` or `.pth`.

    Args:
        allow: further classes, as `package.module.Class`; their packages are imported.
        trust: run the pickle, whatever it does.

    Raises:
        LoadError: damaged, TorchScript, or naming a class that is not allowed.
        UsageError: an entry of `allow` that is no class.
    """
    if trust:
        return _run(path)
    allowed = _permitted(checks.check(path, allow), set(allow), path)
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = f"the weights-only unpickler refuses it: {first}"
        raise LoadError(found, file=path, hint=checks.AGAIN) from error


def _run(path: Path) -> Any:
    """Runs a pickle that the user vouches for."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        found = f"running it failed: {type(error).__name__}: {first}"
        raise LoadError(found, file=path, hint=checks.AGAIN) from error


def _permitted(
    names: list[str], allow: set[str], path: Path
) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Returns the objects to permit beyond PyTorch's own list; refuses the first other name."""
    from torch import _weights_only_unpickler as unpickler

    builtin = unpickler._get_allowed_globals()
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for name in names:
        if name in builtin:
            continue
        if name in checks.FUNCTIONS or _is_module_class(name):
            found.append((_resolve(name), name))
        elif name in allow:
            found.append((_user_class(name), name))
        else:
            raise checks.not_allowed(name, path)
    return found


def _is_module_class(name: str) -> bool:
    if not name.startswith("torch.nn.modules."):
        return False
    found = _resolve(name)
    return inspect.isclass(found) and issubclass(found, nn.Module) and _home(found) == name


def _home(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def _user_class(name: str) -> Any:
    found = _resolve(name)
    if not inspect.isclass(found):
        raise UsageError(
            f"'{name}' is no class that can be imported",
            place="--allow",
            hint="name a class as package.module.Class",
        )
    return found


def build(path: Path, loaded: Any, factory: str | None) -> nn.Module:
    """Returns the module of a loaded file: itself, or built by `factory` and given the weights.

    Raises:
        LoadError: neither a module nor weights, no factory, or weights that do not fit.
    """
    if isinstance(loaded, nn.Module):
        return loaded
    state = _state_dict(loaded)
    if state is None:
        found = f"holds a {type(loaded).__name__}, no module and no weights"
        raise LoadError(found, file=path, hint="save an nn.Module, or its state_dict()")
    if factory is None:
        raise LoadError(f"holds {len(state)} weights and no module", file=path, hint=f"pass {FORM}")
    module = call_factory(factory)
    try:
        missing, unexpected = module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise LoadError(
            f"weights do not fit the module: {' '.join(str(error).split())}",
            file=path,
            hint=f"check that {factory} builds the module the weights were saved from",
        ) from error
    if missing or unexpected:
        raise LoadError(
            f"weights do not fit the module: missing {missing[:5] or 'none'}, "
            f"unexpected {unexpected[:5] or 'none'}",
            file=path,
            hint=f"check that {factory} builds the module the weights were saved from",
        )
    return module


def call_factory(factory: str) -> nn.Module:
    """Builds a module by `package.module:function`. Raises `UsageError`."""
    module, _, name = factory.partition(":")
    function = _resolve(f"{module}.{name}") if name else None
    if not callable(function):
        raise UsageError(f"'{factory}' cannot be imported", place="--module", hint=f"pass {FORM}")
    built = function()
    if not isinstance(built, nn.Module):
        raise UsageError(f"'{factory}' returns a {type(built).__name__}", place="--module")
    return built


def _state_dict(loaded: Any) -> Mapping[str, Tensor] | None:
    for key in (None, "state_dict", "model_state_dict", "model"):
        value = loaded if key is None else loaded.get(key) if isinstance(loaded, Mapping) else None
        if isinstance(value, Mapping) and value and all(map(torch.is_tensor, value.values())):
            return value
    return None
