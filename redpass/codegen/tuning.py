"""Which configuration of a kernel is fastest, and whether the kernel wins, by shape and device.

Figures are measured once on a card and kept in one file a device. A figure counts only for the
device, the driver and the kernel source it was measured with; anything else is ignored, the
reason is said once, and the default configuration runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redpass import atomic

FORMAT = "redpass-tuning-1"

MARGIN = 0.03
"""A kernel must be this much faster than its rival to count as faster: timings scatter."""

LARGEST = 16 << 20
"""Bytes above which a file is no cache of ours."""

_log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Device:
    """A card and its driver, as timings are kept by."""

    name: str
    driver: str

    @property
    def file(self) -> str:
        """The name of its file: readable, and different for every device and driver."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-").lower()[:48]
        mark = hashlib.sha256(f"{self.name}\n{self.driver}".encode()).hexdigest()[:12]
        return f"{plain}-{mark}.json"


@dataclass(frozen=True)
class Shape:
    """What a kernel was run on.

    Attributes:
        op: name of the op.
        digest: SHA-256 of the kernel's source, hex.
        dtype: element type, such as `bfloat16`.
        fixed: sizes that the model fixes: widths, ranks, heads.
        varying: sizes that change from call to call: rows, past length.
    """

    op: str
    digest: str
    dtype: str
    fixed: Mapping[str, int]
    varying: Mapping[str, int]

    @property
    def bucket(self) -> Shape:
        """The shape whose figures stand for this one: varying sizes rounded up to a power of 2."""
        return replace(self, varying={k: round_up(n) for k, n in self.varying.items()})

    @property
    def key(self) -> tuple[Any, ...]:
        """Something to compare and look up by."""
        return (*self.kind, tuple(sorted(self.varying.items())))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all shapes of one place in a model share."""
        return (self.op, self.digest, self.dtype, tuple(sorted(self.fixed.items())))


@dataclass(frozen=True)
class Timing:
    """How fast a kernel was on one bucket.

    Attributes:
        shape: the bucket.
        config: the fastest configuration.
        micros: median time of the kernel with it.
        rival: what it was compared with, the fastest of those tried.
        rival_micros: median time of the rival.
    """

    shape: Shape
    config: Mapping[str, int]
    micros: float
    rival: str
    rival_micros: float

    @property
    def ratio(self) -> float:
        """Time of the kernel over that of its rival; below 1 it is faster."""
        return self.micros / self.rival_micros


@dataclass(frozen=True)
class Records:
    """The timings known for one device.

    Attributes:
        trouble: why a file that was there gave nothing, or "".
    """

    device: Device | None = None
    timings: Mapping[tuple[Any, ...], Timing] = field(default_factory=dict)
    trouble: str = ""

    def config(self, shape: Shape, default: Mapping[str, int]) -> Mapping[str, int]:
        """Returns the configuration for `shape`: of its bucket, else the nearest, else `default`.

        Nearest is by ratio of sizes among buckets of the same kind.
        """
        same = [t for t in self.timings.values() if t.shape.kind == shape.kind]
        exact = self.timings.get(shape.bucket.key)
        if exact is not None:
            return exact.config
        near = min(same, key=lambda t: _distance(t.shape, shape), default=None)
        return default if near is None else near.config

    def verdict(self, kind: tuple[Any, ...]) -> tuple[bool, str]:
        """Whether the kernel wins for a place of this kind, and the figures in words.

        It wins when it is faster by `MARGIN` on the geometric mean of all buckets measured, and
        slower by more than `MARGIN` on none: sizes that vary are not known ahead of a call.
        """
        if self.device is None:
            return False, self.trouble or "no GPU: kernels were not measured on this device"
        found = [t for t in self.timings.values() if t.shape.kind == kind]
        if not found:
            return False, self.trouble or f"not measured on {self.device.name}"
        mean = math.exp(sum(math.log(t.ratio) for t in found) / len(found))
        worst = max(found, key=lambda t: t.ratio)
        text = f"{mean:.2f} of the time of {worst.rival} on {self.device.name}"
        text += f" over {len(found)} shapes, at worst {worst.ratio:.2f}"
        return mean <= 1 - MARGIN and worst.ratio <= 1 + MARGIN, text


def round_up(size: int) -> int:
    """Returns the smallest power of 2 that is at least `size`, 1 for 0."""
    return 1 << max(0, size - 1).bit_length() if size > 1 else 1


def cache_folder(given: Path | None = None) -> Path:
    """Returns `given`, else `redpass/tuning` in the user's cache folder (`XDG_CACHE_HOME`)."""
    if given is not None:
        return given
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "redpass" / "tuning"


def read(folder: Path, device: Device | None) -> Records:
    """Reads the timings of `device`; what cannot be used is ignored and said once.

    Never raises: no figures only mean that defaults run.
    """
    if device is None:
        return Records()
    path = folder / device.file
    try:
        if not path.exists():
            return Records(device)
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        timings = _parse(json.loads(path.read_bytes()), device)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        trouble = f"the tuning file {path} is ignored: {_first_line(error)}"
        say_once(trouble)
        return Records(device, trouble=trouble)
    return Records(device, {timing.shape.key: timing for timing in timings})


def write(folder: Path, device: Device, timings: Iterable[Timing]) -> Path:
    """Adds timings to the file of `device`, replacing those of the same buckets. Returns it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(read(folder, device).timings)
    known |= {timing.shape.key: timing for timing in timings}
    items = [_as_json(known[key]) for key in sorted(known, key=str)]
    data = {"format": FORMAT, "device": device.name, "driver": device.driver, "timings": items}
    path = folder / device.file
    fresh = folder / f".{device.file}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        atomic.write(fresh, json.dumps(data, indent=1) + "\n")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    atomic.sync(folder)
    return path


def say_once(text: str) -> None:
    """Logs a warning the first time this process meets it."""
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)


def _parse(data: Any, device: Device) -> list[Timing]:
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
    found = Device(str(data["device"]), str(data["driver"]))
    if found != device:
        raise ValueError(f"it was measured on {found.name}, driver {found.driver}")
    return [_timing(item) for item in data["timings"]]


def _timing(item: Mapping[str, Any]) -> Timing:
    shape = Shape(
        str(item["op"]),
        str(item["digest"]),
        str(item["dtype"]),
        _sizes(item["fixed"]),
        _sizes(item["varying"]),
    )
    micros, rival_micros = float(item["micros"]), float(item["rival_micros"])
    if not (0 < micros < math.inf and 0 < rival_micros < math.inf):
        raise ValueError("a time is no positive number")
    return Timing(shape, _sizes(item["config"]), micros, str(item["rival"]), rival_micros)


def _sizes(item: Mapping[str, Any]) -> dict[str, int]:
    if not all(type(value) is int for value in item.values()):
        raise ValueError("a size is no whole number")
    return dict(item)


def _as_json(timing: Timing) -> dict[str, Any]:
    shape = timing.shape
    return {
        "op": shape.op,
        "digest": shape.digest,
        "dtype": shape.dtype,
        "fixed": dict(shape.fixed),
        "varying": dict(shape.varying),
        "config": dict(timing.config),
        "micros": timing.micros,
        "rival": timing.rival,
        "rival_micros": timing.rival_micros,
    }


def _distance(left: Shape, right: Shape) -> float:
    names = left.varying.keys() | right.varying.keys()
    pairs = [(left.varying.get(name, 1) or 1, right.varying.get(name, 1) or 1) for name in names]
    return sum(abs(math.log(a / b)) for a, b in pairs)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
