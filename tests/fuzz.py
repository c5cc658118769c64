"""Fuzz readers, archives, folders, caches, checkpoints, records, options and command lines: a seeded loop of mutations.

    python tests/fuzz.py --minutes 30 --seed 0 --output runs/fuzz

Each call must do what its function promises: return a result, or raise a one-line error of the kinds that the command
lines print. Anything else is a finding, and so is a hang of over a minute or a process that exceeds its memory. Each
finding is printed once per place in our code, and its input is kept in the output folder.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_targets import Targets

# Names of the targets; some appear several times
WEIGHTED = (
    *("read", "read", "read", "restore", "page", "archive", "folder", "table", "features", "matlab"),
    *("weights", "single", "published", "options", "line", "drawn", "record", "cache", "checkpoint"),
)
SECONDS = 60  # CPU seconds for one input, because other processes may use the machine
MEMORY = 6 << 30  # bytes of address space above the use at the start


class HangError(Exception):
    """An input took longer than `SECONDS`."""


def expected() -> tuple[type[BaseException], ...]:
    """Errors that the command lines print in one line."""
    from iptv2_diffusion.pipelines.command_line import CommandError
    from iptv2_diffusion.training.errors import UserError

    return (UserError, CommandError, ValueError, OSError)


def place_of(error: BaseException) -> str:
    """Kind of an error and the innermost line of our code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "iptv2_diffusion" in f.filename or "/pipelines/" in f.filename] or frames[-1:]
    last = ours[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} in {last.name}"


def run_one(target: Callable[[random.Random, Path], None], rng: random.Random, scratch: Path) -> str | None:
    """Return a finding, or None."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target(rng, scratch)
    except expected() as error:
        text = str(error)
        if "\n" in text.strip():
            return f"an error of several lines, {place_of(error)}: {text[:200]!r}"
        if not text.strip():
            return f"an error without words, {place_of(error)}"
        if isinstance(error, UnicodeError) and not isinstance(error, UnicodeDecodeError):
            return f"{place_of(error)}: {text[:200]}"
    except HangError as error:
        return f"a hang of {SECONDS} s, {place_of(error)}"
    except MemoryError as error:
        return f"memory, {place_of(error)}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{place_of(error)}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def fuzz(
    targets: Targets, names: list[str], options: argparse.Namespace, number: int, end: float, results: Connection
) -> None:
    """Run inputs from `number` on until the time `end`, and send (number, target, finding) of each."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
    kept = set()
    while time.monotonic() < end:
        rng = random.Random(f"{options.seed} {number}")
        name = rng.choice(names)
        results.send((number, name, None))
        inner = targets.scratch / "one" / "inner"
        shutil.rmtree(inner.parent, ignore_errors=True)
        inner.mkdir(parents=True)
        told = run_one(getattr(targets, name), rng, inner)
        if told:
            results.send((number, name, told))
            if told.split(": ")[0] not in kept:
                kept.add(told.split(": ")[0])
                path = options.output / f"{name}-{number}.bin"
                path.write_bytes(targets.input)
                print(f"[{number}] {name}: {told} ({path})", flush=True)
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--targets", nargs="*", default=[])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    options.output.mkdir(parents=True, exist_ok=True)

    def alarm(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGPROF, alarm)
    found: dict[str, int] = collections.Counter()
    counts: dict[str, int] = collections.Counter()
    end, number = time.monotonic() + 60 * options.minutes, 0
    with tempfile.TemporaryDirectory() as scratch:
        names = options.targets or list(WEIGHTED)
        targets = Targets(Path(scratch))
        targets.prepare(names)
        while time.monotonic() < end:
            ours, theirs = multiprocessing.Pipe(duplex=False)
            arguments = (targets, names, options, number, end, theirs)
            child = multiprocessing.get_context("fork").Process(target=fuzz, args=arguments)
            child.start()
            theirs.close()
            name = None
            with contextlib.suppress(EOFError):
                while True:
                    number, name, told = ours.recv()
                    if told is None:  # it begins
                        counts[name] += 1
                        continue
                    found[f"{name}: {told.split(': ')[0]}"] += 1
            child.join()
            if child.exitcode and name:  # such as a segmentation fault in a library
                found[f"{name}: ended the process"] += 1
                print(f"[{number}] {name}: ended the process with {child.exitcode}", flush=True)
            number += 1
    print(f"{number} inputs ({', '.join(f'{n} {c}' for n, c in sorted(counts.items()))}), {len(found)} findings")
    for key, count in found.items():
        print(f"  {count} x {key}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
