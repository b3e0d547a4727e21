"""Kills, and fills the disk, at every call that changes a file, for every form that is written.

    python benchmarks/faults.py [--forms pt2,onnx,...] [--every 1]

A good result lies at the target before each try. After it, the target must be the old one or the
new one, whole; a full disk must end in an error that names the file; and the next run must leave
nothing but its own result. Needs Linux and a C compiler: the calls of native writers are counted
by a library that is loaded before libc (benchmarks/native/faults.c).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).parent / "native" / "faults.c"
LARGE = b"y" * 5000
Write = Callable[[Path], None]


def reload(folder: Path) -> None:
    """Builds the library and starts this program again with it loaded first."""
    library = folder / "faults.so"
    compiler = sysconfig.get_config_var("CC").split()[0]
    found = shutil.which(compiler) or shutil.which("cc") or "cc"
    flags = ["-shared", "-fPIC", "-O1", "-w"]
    subprocess.run([found, *flags, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=env).returncode)


def writers(folder: Path) -> dict[str, Write]:
    """What writes each form; comparing what was written is left out, as it writes nothing."""
    import torch
    from transformers import BertConfig, BertModel

    import redpass
    from redpass import export, pipeline
    from redpass.artifact import staged, staged_file
    from redpass.codegen.emit import emit
    from redpass.codegen.folder import write_kernels
    from redpass.export import huggingface, onnx, pt2
    from redpass.frontend import kept
    from redpass.journal import Journal
    from redpass.report import write_report

    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")
    program = redpass.load(folder / "bert")
    record = pipeline.optimize(program, "drop_noops,drop_dead_nodes").record
    kernels = emit(program)
    for module in (huggingface, onnx, pt2):
        module.check_outputs = lambda *_, **__: None  # type: ignore[attr-defined]
    torch.export.load = lambda _: types.SimpleNamespace(module=lambda: None)  # type: ignore

    def whole(*forms: Callable[[Path], object]) -> Write:
        def write(target: Path) -> None:
            with staged(target, force=True) as place:
                for form in forms:
                    form(place)

        return write

    def alone(form: Callable[[Path], object]) -> Write:
        def write(target: Path) -> None:
            with staged_file(target.with_suffix(".file"), force=True) as path:
                form(path)

        return write

    def journal(target: Path) -> None:
        opened = Journal.open(target.with_name("journal"), "key")
        for name in ("a", "b")[: 1 + bool(opened.found)]:  # "b" on top of what lies there
            opened.recall(name, lambda: "x" * 5000)
            opened.blocks.keep(name, None, memoryview(LARGE))

    return {
        "pt2": whole(lambda p: export.to_pt2(program, p / "model.pt2")),
        "onnx, external data": whole(
            lambda p: export.to_onnx(program, p / "model.onnx", external_above=0)
        ),
        "hf": whole(lambda p: export.to_huggingface(program, p / "hf")),
        "report, plan": whole(lambda p: write_report(record, p)),
        "pt2 alone": alone(lambda p: export.to_pt2(program, p)),
        "onnx alone": alone(lambda p: export.to_onnx(program, p)),
        "kernels": whole(lambda p: write_kernels(p, *kernels)),
        "journal": journal,
        "traced": lambda target: kept.write(program, target.with_name("traced"), "key"),
    }


def digest(target: Path) -> str:
    """What lies at the target, checked when it says what it should be; of a journal how much."""
    from redpass.frontend import kept
    from redpass.journal import Journal
    from redpass.manifest import verify_artifact

    if target.name == "journal":
        opened = Journal.open(target, "key")
        assert all(b is None or b[1] == LARGE for b in map(opened.blocks.find, "ab"))
        return str(opened.found)
    if target.name == "traced":
        return kept.read(target, "key").digest
    if target.is_dir():
        verify_artifact(target)
        return (target / "manifest.json").read_text()
    return target.read_bytes().hex() if target.exists() else ""


def sweep(name: str, write: Write, folder: Path, every: int) -> Counter[str]:
    """Tries every fault for one form."""
    counts: Counter[str] = Counter()
    target = folder / ("result.file" if "alone" in name else "result")
    target = folder / name if name in ("journal", "traced") else target
    old = folder.parent / "old"
    for error in (0, errno.ENOSPC):
        at = 1
        while True:
            prepare(folder, old, target, write)
            before = digest(target)
            code, message = child(write, target, at, error)
            now = digest(target)
            write(target)
            whole = now in (before, digest(target))
            judge(counts, f"{name}, call {at}, {error}", code, message, whole=whole, error=error)
            left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
            counts["left behind"] += len(left)
            if code == 0:
                break
            at += every
    return counts


def prepare(folder: Path, old: Path, target: Path, write: Write) -> None:
    """Puts a good older result in place, made once."""
    if not old.exists():
        folder.mkdir()
        write(target)
        shutil.copytree(folder, old)
    shutil.rmtree(folder)
    shutil.copytree(old, folder)


def child(write: Write, target: Path, at: int, error: int) -> tuple[int, str]:
    """Writes in a fork with a fault at call `at`; returns how it ended and what it said."""
    from redpass.errors import OutputError

    reader, writer = os.pipe()
    number = os.fork()
    if not number:
        os.close(reader)
        silent = os.open(os.devnull, os.O_RDWR)
        os.dup2(silent, 2)
        ctypes.CDLL(None).redpass_arm(at, error, str(target.parent).encode())
        code, said = 0, ""
        try:
            write(target)
        except OutputError as caught:
            code, said = 8, str(caught)
        except BaseException as caught:
            code, said = 1, f"{type(caught).__name__}: {caught}"
        ctypes.CDLL(None).redpass_arm(-1, 0, b"")
        os.write(writer, said.encode()[:2000])
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(number, 0)
    return os.waitstatus_to_exitcode(status), said


def judge(
    counts: Counter[str], name: str, code: int, said: str, *, whole: bool, error: int
) -> None:
    """Counts a try, and shows one that ended as it should not."""
    counts["tries"] += 1
    fine = code in ((0, 8) if error else (0, -signal.SIGKILL))
    if code == 8:
        fine = any(word in said for word in ("result", "journal", "traced"))
    if not fine or not whole:
        counts["wrong"] += 1
        print(f"  {name}: ended with {code}, whole: {whole}, {said[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--forms", default="")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
            reload(Path(place))
        failed = 0
        chosen = [form for form in options.forms.split(";") if form]
        for number, (name, write) in enumerate(writers(Path(place)).items()):
            if chosen and name not in chosen:
                continue
            (Path(place) / str(number)).mkdir()
            counts = sweep(name, write, Path(place) / str(number) / "work", options.every)
            failed += counts["wrong"] + counts["left behind"]
            print(
                f"{name}: {counts['tries']} faults, {counts['wrong']} wrong, "
                f"{counts['left behind']} files left behind after the next run",
                flush=True,
            )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
