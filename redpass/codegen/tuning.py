"""Which configuration of a kernel is fastest, and whether the kernel wins, by shape and device.

Figures are measured once on a card and kept in one file a device. A figure counts only for the
device, the driver and the kernel source it was measured with; anything else is ignored, the
reason is said once, and the default configuration runs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from redpass import atomic
from redpass.codegen.ops.op import Arguments, Config, Op, tensors
from redpass.config import cache_home
from redpass.manifest import digest

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


def this_device() -> Device | None:
    """Returns the GPU that kernels would run on, None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(str(properties.name), _driver())


def _driver() -> str:
    """The driver's version as the kernel module says it, else the CUDA version it is for."""
    import torch

    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return f"cuda {torch.version.cuda}"
    numbers = [word for word in words if re.fullmatch(r"\d+\.\d+(\.\d+)?", word)]
    return numbers[0] if numbers else f"cuda {torch.version.cuda}"


@dataclass(frozen=True)
class Shape:
    """What a kernel was run on.

    Attributes:
        op: name of the op.
        digest: SHA-256 of the kernel's source, hex.
        kind: what the op says its kernel is specialised by: dtype, widths, ranks, heads.
        sizes: sizes of the tensors among the arguments, one after the other.
    """

    op: str
    digest: str
    kind: str
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, op: Op, arguments: Arguments) -> Shape:
        """Returns the shape of one call; sizes that are symbolic are left out."""
        found = [size for tensor in tensors(arguments) for size in tensor.shape]
        fixed = found if all(isinstance(size, int) for size in found) else []
        return cls(op.name, source_digest(op), repr(op.kind(*arguments)), tuple(map(int, fixed)))

    @property
    def bucket(self) -> Shape:
        """The shape whose figures stand for this one: sizes rounded up to powers of 2."""
        return replace(self, sizes=tuple(map(round_up, self.sizes)))

    @property
    def place(self) -> tuple[str, str, str]:
        """What all shapes of one place in a model share."""
        return (self.op, self.digest, self.kind)


@dataclass(frozen=True)
class Timing:
    """How fast a kernel was on one bucket.

    Attributes:
        shape: the bucket.
        config: the fastest configuration, as `Config.options` gives it.
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
    timings: Mapping[Shape, Timing] = field(default_factory=dict)
    trouble: str = ""

    def config(self, shape: Shape) -> Config | None:
        """Returns the configuration for `shape`: of its bucket, else of the nearest one.

        Nearest is by ratio of sizes among buckets of the same kind; None when there is none.
        """
        if (exact := self.timings.get(shape.bucket)) is not None:
            return as_config(exact.config)
        same = [t for t in self.timings.values() if t.shape.place == shape.place]
        near = min(same, key=lambda t: _distance(t.shape.sizes, shape.sizes), default=None)
        return None if near is None else as_config(near.config)

    def verdict(self, shape: Shape) -> tuple[bool, str]:
        """Whether the kernel wins for places of this kind, and the figures in words.

        It wins when it is faster by `MARGIN` on the geometric mean of all buckets measured, and
        slower by more than `MARGIN` on none: sizes that vary are not known ahead of a call.
        """
        if self.device is None:
            return False, self.trouble or "no GPU: kernels were not measured on this device"
        found = [t for t in self.timings.values() if t.shape.place == shape.place]
        if not found:
            return False, self.trouble or f"not measured on {self.device.name}"
        mean = math.exp(sum(math.log(t.ratio) for t in found) / len(found))
        worst = max(found, key=lambda t: t.ratio)
        text = f"{mean:.2f} of the time of {worst.rival} on {self.device.name}"
        text += f" over {len(found)} shapes, at worst {worst.ratio:.2f}"
        return mean <= 1 - MARGIN and worst.ratio <= 1 + MARGIN, text


def source_digest(op: Op) -> str:
    """Returns the SHA-256 of the kernel's source, hex: figures of another source do not count."""
    return digest(Path(inspect.getfile(op.launch)).with_name("kernel.py"))


def as_config(options: Mapping[str, int]) -> Config:
    """Returns the config that `Config.options` turned into `options`."""
    blocks = {key: size for key, size in options.items() if not key.startswith("num_")}
    return Config.of(warps=options["num_warps"], stages=options["num_stages"], **blocks)


def round_up(size: int) -> int:
    """Returns the smallest power of 2 that is at least `size`, 1 for 0."""
    return 1 << max(0, size - 1).bit_length() if size > 1 else 1


def cache_folder(given: Path | None = None) -> Path:
    """Returns `given`, else `redpass/tuning` in the user's cache folder (`XDG_CACHE_HOME`)."""
    return given if given is not None else cache_home() / "redpass" / "tuning"


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
    return Records(device, {timing.shape: timing for timing in timings})


def write(folder: Path, device: Device, timings: Iterable[Timing]) -> Path:
    """Adds timings to the file of `device`, replacing those of the same buckets. Returns it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(read(folder, device).timings)
    known |= {timing.shape: timing for timing in timings}
    items = [asdict(known[shape]) for shape in sorted(known, key=str)]
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
    about, config = item["shape"], dict(item["config"])
    sizes = tuple(about["sizes"])
    if not all(type(value) is int for value in (*sizes, *config.values())):
        raise ValueError("a size is no whole number")
    as_config(config)
    shape = Shape(str(about["op"]), str(about["digest"]), str(about["kind"]), sizes)
    micros, rival_micros = float(item["micros"]), float(item["rival_micros"])
    if not (0 < micros < math.inf and 0 < rival_micros < math.inf):
        raise ValueError("a time is no positive number")
    return Timing(shape, config, micros, str(item["rival"]), rival_micros)


def _distance(left: Sequence[int], right: Sequence[int]) -> float:
    if len(left) != len(right):
        return math.inf
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(left, right, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
