"""Where the committed weights lie, how they are written, and the manifest that vouches for them."""

import copy
import hashlib
import json
from pathlib import Path

from torch import nn

from testbed.errors import TestbedError

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "MANIFEST.json"
QUALITY = "quality.json"
MODEL_FILE = "model.safetensors"


def save(module: nn.Module, folder: Path) -> None:
    """Write float16 weights in the model's own folder form; `module` itself keeps its type."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    halved = copy.deepcopy(module).half()
    if hasattr(halved, "save_pretrained"):
        halved.save_pretrained(folder)
    else:
        tensors = {name: value.contiguous() for name, value in halved.state_dict().items()}
        save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(root: Path = WEIGHTS) -> None:
    """Record size (bytes) and SHA-256 of every file under `root` but the cards, which are prose."""
    skipped = {MANIFEST, "README.md"}
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p.name not in skipped)
    entries = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in paths
    }
    write_json(root / MANIFEST, entries)


def write_json(path: Path, value: object) -> None:
    """Write JSON beside its final name, then rename, so that a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    partial.replace(path)


def read_manifest(root: Path = WEIGHTS) -> dict[str, dict]:
    """The manifest: relative path to `bytes` and `sha256`."""
    path = root / MANIFEST
    if not path.exists():
        raise TestbedError(f"{path} is missing; restore it with `git checkout -- {path}`")
    return json.loads(path.read_text())


def verify(folder: str, root: Path = WEIGHTS) -> Path:
    """The path of `root/folder`, once every file that the manifest lists for it is found whole."""
    entries = {k: v for k, v in read_manifest(root).items() if k.startswith(folder + "/")}
    if not entries:
        raise TestbedError(f"{root / MANIFEST} lists no file of {folder!r}; {_remedy(folder)}")
    for name, entry in entries.items():
        _verify_file(root / name, entry, folder)
    return root / folder


def _verify_file(path: Path, entry: dict, folder: str) -> None:
    if not path.exists():
        raise TestbedError(f"{path} is missing; {_remedy(folder)}")
    found = digest(path)
    if found != entry["sha256"]:
        raise TestbedError(
            f"{path} does not match its digest: "
            f"expected {entry['sha256'][:12]} ({entry['bytes']} bytes), "
            f"found {found[:12]} ({path.stat().st_size} bytes); {_remedy(folder)}"
        )


def _remedy(folder: str) -> str:
    return (
        f"restore it with `git checkout -- testbed/weights/{folder}`, "
        f"or train it again with `python -m testbed.train {folder}`"
    )
