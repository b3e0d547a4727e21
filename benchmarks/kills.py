"""Kills `redpass optimize` at random moments and resumes it: same bytes, hardly anything twice.

    python benchmarks/kills.py [--kills 20] [--each 1] [--rows 256] [--model vit] [--budget "kl<=1"]
        [--look 0] [-- MORE]

MORE are further words for `optimize`, such as `--search allocated`.

Cost is processor time of the killed and the resumed run together, from the start of Python on and
with what they start themselves, against one undisturbed run. What the journal does not hold
(imports, planning, the values that candidates share) is done twice: its share shrinks as the search
grows.

With --each N one run is killed N times before it may end, and what a kill costs is their mean.

With --look N only one run goes to its end. The journal is laid out as each kill would leave it, and
the resumed run is stopped after N new records: all that it repeats lies before them, and what
follows costs what it cost the undisturbed run. So runs of minutes can be measured; the bytes of the
results are compared without it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VARYING = {"report.json", "report.html", "manifest.json"}
"""Files that hold times, or digests of those that do."""


@dataclass(frozen=True)
class Done:
    """One run: how it ended, its processor and wall seconds, and what its journal counted."""

    code: int
    cpu: float
    wall: float
    counts: dict[str, Any]


def start(words: list[str], counts: Path, after: float | None = None, look: int = 0) -> Done:
    """Runs `redpass` with `words`, and kills it `after` so many seconds.

    Args:
        look: end it after so many new records.
    """
    counts.unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, __file__, "--child", str(counts), str(look), *words]
    child = subprocess.Popen(command)
    if after is not None:
        time.sleep(after)
        # It may have ended by now: `Popen.kill` would take its exit status.
        os.kill(child.pid, signal.SIGKILL)
    _, status, usage = os.wait4(child.pid, 0)
    code = child.returncode = os.waitstatus_to_exitcode(status)
    if code > 0:
        sys.exit(f"the run failed with code {code}")
    found = json.loads(counts.read_text()) if counts.exists() else {}
    wall = time.monotonic() - began
    return Done(code, usage.ru_utime + usage.ru_stime, wall, found)


def _command(words: list[str], counts: Path, look: int) -> int:
    from redpass import journal
    from redpass.blocks import Blocks
    from redpass.cli import main

    real = journal.Journal.open.__func__  # type: ignore[attr-defined]
    append, keep = journal._append, Blocks.keep
    opened, seen, lengths = list[Any](), list[Any](), list[Any]()
    link = counts.with_name(f"blocks-{os.getpid()}")

    def write(path: Path, text: str) -> None:
        append(path, text)
        seen.append((time.process_time(), str(path), text))
        if look and sum('"format"' not in line for _, _, line in seen) == look:
            finish()
            os._exit(0)

    def keep_too(self: Blocks, *value: Any) -> None:
        keep(self, *value)
        if self.path is not None and self.path.exists():
            lengths.append((time.process_time(), str(self.path), self.path.stat().st_size))
            if not link.exists():
                os.link(self.path, link)  # the run removes its own name of it

    def finish() -> None:
        found = {name: sum(getattr(j, name) for j in opened) for name in ("computed", "recalled")}
        kept = {"seen": seen, "lengths": lengths, "blocks": str(link)}
        counts.write_text(json.dumps({**found, **kept}))

    def open_too(*given: Any, **more: Any) -> Any:
        opened.append(real(*given, **more))
        return opened[-1]

    journal._append = write
    Blocks.keep = keep_too  # type: ignore[method-assign,assignment]
    journal.Journal.open = classmethod(open_too)  # type: ignore[method-assign,assignment]
    code = main(words)
    finish()
    return code


def model_files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in VARYING
    }


def write_data(model: str, path: Path, rows: int) -> None:
    """Writes rows nobody trained on, each once; text in pieces of 128 tokens."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import testbed

    splits = testbed.load(model).splits
    name = next(iter(splits["choosing"].inputs))
    parts = [splits[split].inputs[name].numpy() for split in ("calibration", "choosing")]
    found = np.concatenate(parts)
    found = np.unique(found.reshape(-1, 128) if found.ndim == 2 else found, axis=0)
    if len(found) < rows:
        sys.exit(f"there are only {len(found)} rows")
    rows_by_name: dict[str, Any] = {name: found[:rows]}
    np.savez(path, **rows_by_name)


def records(folder: Path) -> int:
    """Whole records in the journal a killed run left, without its head."""
    files = [
        file
        for file in folder.glob(".out.journal-*")
        if not file.name.endswith(("-traced", "-blocks"))
    ]
    lines = [line for file in files for line in file.read_bytes().split(b"\n")]
    return max(0, len(lines) - 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--model", default="vit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--budget", default="kl<=1")
    parser.add_argument("--look", type=int, default=0)
    parser.add_argument("more", nargs="*")
    if sys.argv[1:2] == ["--child"]:
        sys.exit(_command(sys.argv[4:], Path(sys.argv[2]), int(sys.argv[3])))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sweep(Path(name), options)


def sweep(folder: Path, options: argparse.Namespace) -> None:
    data, out, counts = folder / "rows.npz", folder / "out", folder / "counts.json"
    write_data(options.model, data, options.rows)
    words = [
        "optimize", str(ROOT / "testbed/weights" / options.model), "--data", str(data),
        "--budget", options.budget, "--out", str(out), "--force", "--no-bench", "--quiet",
        *options.more,
    ]  # fmt: skip
    whole = start(words, counts)
    expected = model_files(out)
    told = {name: whole.counts[name] for name in ("computed", "recalled")}
    print(
        f"undisturbed: {whole.cpu:.0f} s of processor time, {whole.wall:.0f} s, {told}", flush=True
    )
    if options.look:
        laid_out(whole, words, counts, options)
        return
    chance, costs, wrong, repeated, kills = random.Random(options.seed), [], 0, [], 0
    for number in range(0, options.kills, options.each):
        count = min(options.each, options.kills - number)
        done, kept = disturbed(words, counts, chance, whole.wall, count)
        same = model_files(out) == expected and not list(folder.glob(".out*"))
        wrong += not same
        repeated.append(sum(kept) + done[-1].counts["computed"] - whole.counts["computed"])
        kills += (died := len(done) - 1)
        costs.append((sum(run.cpu for run in done) / whole.cpu - 1) / max(died, 1))
        print(
            f"{number:3d}: killed with {', '.join(map(str, kept))} new records, "
            f"{done[-1].counts['computed']} computed in the rest, same bytes: {same}, "
            f"cost of a kill {100 * costs[-1]:+.1f}%",
            flush=True,
        )
    print(
        f"{len(costs) - wrong} of {len(costs)} runs, {kills} kills: same bytes, nothing left "
        f"behind; records computed twice: {max(repeated)} at most, and what was under way when it "
        f"died; cost of a kill: median {100 * statistics.median(costs):+.1f}%, "
        f"worst {100 * max(costs):+.1f}%"
    )
    sys.exit(bool(wrong or max(repeated) > 0))


def disturbed(
    words: list[str], counts: Path, chance: random.Random, wall: float, kills: int
) -> tuple[list[Done], list[int]]:
    """Returns what each part of a run cost, and the records each killed part added."""
    done, kept, folder = [], [0], counts.parent
    for number in range(kills):
        after = chance.uniform(0.04, 1.96) * wall / (kills + 1)
        done.append(start([*words, *["--resume"] * bool(number)], counts, after))
        kept.append(records(folder))
        if done[-1].code == 0:  # it was done before it was killed
            break
    else:
        done.append(start([*words, "--resume"], counts))
    return done, [now - before for before, now in itertools.pairwise(kept)]


def laid_out(whole: Done, words: list[str], counts: Path, options: argparse.Namespace) -> None:
    """Resumes from journals as kills would have left them, up to what is new."""
    chance, ratios, seen = random.Random(options.seed), [], whole.counts["seen"]
    start(words, counts, look=1)  # leaves the traced program
    traced = next(counts.parent.glob(".out.journal-traced"))
    program = traced.read_bytes()
    for number in range(options.kills):
        at = chance.uniform(0.02, 0.98) * whole.cpu
        kept = [(path, text) for moment, path, text in seen if moment <= at]
        for path in {path for _, path, _ in seen}:
            lines = [text for name, text in kept if name == path]
            sums = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in lines)
            Path(path).write_text("".join(map("{} {}\n".format, sums, lines)))
        lay_blocks(whole.counts, at)
        traced.unlink(missing_ok=True)
        if kept:
            traced.write_bytes(program)
        again = start([*words, "--resume"], counts, look=options.look)
        end = max(len(kept), 1) + options.look
        rest = whole.cpu - seen[end - 1][0] if end <= len(seen) else 0.0
        ratios.append((at + again.cpu + rest) / whole.cpu)
        print(
            f"{number:3d}: killed after {at:.0f} s with {len(kept)} records, {again.cpu:.1f} s to "
            f"{again.counts['computed']} new ones, cost {100 * (ratios[-1] - 1):+.1f}%",
            flush=True,
        )
    print(
        f"cost of {options.kills} kills: median {100 * (statistics.median(ratios) - 1):+.1f}%, "
        f"worst {100 * (max(ratios) - 1):+.1f}%"
    )


def lay_blocks(counts: dict[str, Any], at: float) -> None:
    """Puts the file of large values where it was, as long as it was after `at` seconds."""
    for path in {path for _, path, _ in counts["lengths"]}:
        ends = [end for moment, name, end in counts["lengths"] if moment <= at and name == path]
        data = Path(counts["blocks"]).read_bytes()
        Path(path).write_bytes(data[: max(ends, default=0)])


if __name__ == "__main__":
    main()
