"""Time, memory and error of activation-whitened truncation against a full SVD of `W S`.

    python benchmarks/decompositions.py --threads 2 --out benchmarks/results/decompositions.md

Each case runs in a process of its own, so that its peak memory is its own; the two matrices it is
given (weight in float32, Gram matrix in float64) are counted apart. The full SVD, with an
eigenvalue square root of the Gram matrix, runs on the smaller cases only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from redpass.analysis.ranks.whitening import decompose

CASES = ("512x1408", "1408x512", "1024x2752", "4096x4096", "4096x11008", "11008x4096")
LARGEST_SVD = 1024 * 2752
"""Numbers in the largest matrix that a full SVD is run on: it takes minutes on larger ones."""


def problem(outs: int, ins: int, tokens: int = 2048) -> tuple[Tensor, Tensor]:
    """Returns a weight, float32, and a Gram matrix of rank `min(tokens, ins)`, float64.

    Channels of the inputs differ a hundredfold in size and depend on each other.
    """
    torch.manual_seed(0)
    matrix = torch.randn(outs, ins) / ins**0.5
    basis = torch.randn(ins, min(256, ins)) / 16
    gram = torch.zeros(ins, ins, dtype=torch.float64)
    for _ in range(8):
        x = torch.randn(tokens // 8, ins) + torch.randn(tokens // 8, basis.shape[1]) @ basis.T
        x = (x * torch.logspace(0, -2, ins)).double()
        gram += x.T @ x
    return matrix, gram.div_(tokens)


def full(matrix: Tensor, gram: Tensor) -> Tensor:
    """Returns the squared singular values of `W S`, the textbook way."""
    energies, vectors = torch.linalg.eigh(gram)
    whitened = matrix.double() @ (vectors * energies.clamp_min(0.0).sqrt())
    _, values, _ = torch.linalg.svd(whitened, full_matrices=False)
    squares: Tensor = values.square()
    return squares


def one(case: str) -> str:
    """Runs a case and returns its row of the table."""
    outs, ins = map(int, case.split("x"))
    matrix, gram = problem(outs, ins)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    base = status("VmRSS")
    started, used = time.perf_counter(), time.process_time()
    found = decompose(matrix, gram)
    decomposed = time.perf_counter() - started
    rank = outs * ins // (2 * (outs + ins))
    started = time.perf_counter()
    up, down = found.factors(rank)
    factored, used = time.perf_counter() - started, time.process_time() - used
    peak = (status("VmHWM") - base) / (8 * outs * ins)
    gap = (matrix.double() - up @ down).double()
    error = float(((gap @ gram) * gap).sum())
    told = abs(error / float(found.errors[rank]) - 1)
    seconds = [f"{time_:.1f}" for time_ in (decomposed, factored, used)]
    cells = [case, *seconds, f"{peak:.2f}", str(rank), f"{told:.1e}"]
    return "| " + " | ".join([*cells, *against_svd(matrix, gram, error, rank)]) + " |"


def against_svd(matrix: Tensor, gram: Tensor, error: float, rank: int) -> list[str]:
    """Returns seconds of the full SVD, and how far the error is above its optimum."""
    if matrix.numel() > LARGEST_SVD:
        return ["not run", ""]
    started = time.perf_counter()
    energies = full(matrix, gram)
    seconds = time.perf_counter() - started
    return [f"{seconds:.1f}", f"{error / float(energies[rank:].sum()) - 1:.1e}"]


def status(name: str) -> int:
    """Returns a figure of this process' memory in bytes: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


HEAD = """# Activation-whitened truncation: time, memory, error

`python benchmarks/decompositions.py`: {threads} threads, {processor}, on a machine that may have
had other work (CPU seconds, of all threads, tell). Rank: half of the
break-even rank. Memory: peak beyond the weight and its Gram matrix, in sizes of the layer in
float64. "told": how far the predicted error is from the one measured on the factors. Full SVD:
`eigh` of the Gram matrix, then `svd` of `W S`.

| layer | decompose s | factors s | CPU s | memory | rank | told | full SVD s | above optimum |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Runs every case in a process of its own and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--one", default="")
    default = Path(__file__).parent / "results" / "decompositions.md"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(one(options.one), flush=True)
        return
    rows = []
    for case in options.cases.split(","):
        command = [sys.executable, __file__, "--one", case, "--threads", str(options.threads)]
        rows.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(rows[-1], end="", flush=True)
        head = HEAD.format(threads=options.threads, processor=processor())
        options.out.write_text(head + "".join(rows))


def processor() -> str:
    """Returns the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


if __name__ == "__main__":
    main()
