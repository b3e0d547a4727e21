"""Optimises a small model under limits on memory from too small to enough.

    python benchmarks/memory.py [--limits 30] [--model vit]

Each run must succeed, or end in a typed error that states the need; none may die by a signal.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


def attempt(model: Path, out: Path, limit: int) -> tuple[int, str]:
    """Runs `optimize` under an address space of `limit` bytes; returns exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "redpass", "optimize", str(model), "--out", str(out), "--quiet"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.returncode, done.stderr


def judge(code: int, said: str) -> str:
    if code == 0:
        return "success"
    if code < 0:
        return f"died by signal {-code}"
    stated = said.startswith("error[memory]") and "MiB" in said
    return "typed error with the need" if stated else f"exit code {code}: {said[:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limits", type=int, default=30)
    parser.add_argument("--model", default="vit")
    parser.add_argument("--least", type=int, default=100, help="MiB")
    parser.add_argument("--most", type=int, default=4000, help="MiB")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    ratio = (options.most / options.least) ** (1 / (options.limits - 1))
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.limits):
            limit = int(options.least * ratio**number)
            model = ROOT / "testbed/weights" / options.model
            how = judge(*attempt(model, Path(place) / str(number), limit * MIB))
            counts[how.partition(":")[0]] += 1
            left = sorted(path.name for path in Path(place).glob(".*"))
            print(f"{limit} MiB: {how}{' LEFT ' + ' '.join(left) if left else ''}", flush=True)
    print(dict(counts))
    sys.exit(bool(set(counts) - {"success", "typed error with the need"}))


if __name__ == "__main__":
    main()
