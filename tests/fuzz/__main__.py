"""Fuzzes each target for a while: by coverage where atheris is installed, by chance where not.

`python -m tests.fuzz --seconds 60 [--target request] [--seed 1]`. What goes wrong is written to
`build/fuzz/<target>/`, to be made a file of the corpus.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import CORPUS, TARGETS, seeds

FOUND = Path("build/fuzz")
_GUIDED = """
import sys, atheris
with atheris.instrument_imports(include=['enforcer', 'shared', 'watcher']):
    from tests.fuzz.targets import TARGETS
atheris.Setup(sys.argv[1:], TARGETS[sys.argv[1]], enable_python_coverage=True)
atheris.Fuzz()
"""


def guided(target: str, for_s: int, seed: int) -> bool:
    """Let atheris (libFuzzer) look for new paths; whether all was well."""
    kept, wrong = FOUND / target / "kept", FOUND / target / "wrong-"
    kept.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={for_s}", f"-seed={seed}", f"-artifact_prefix={wrong}"]
    options += ["-max_len=8192", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"]
    command = [sys.executable, "-c", _GUIDED, target, *options, str(kept), str(CORPUS / target)]
    return subprocess.run(command, check=False).returncode == 0


def by_chance(target: str, for_s: int, seed: int) -> bool:
    """Change the corpus by chance; whether all was well."""
    chance, corpus, runs = random.Random(seed), seeds(target), 0
    end_s = time.monotonic() + for_s
    while time.monotonic() < end_s:
        data = mutated(chance, corpus)
        try:
            TARGETS[target](data)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            wrong = FOUND / target / f"wrong-{runs}"
            wrong.parent.mkdir(parents=True, exist_ok=True)
            wrong.write_bytes(data)
            print(f"{target}: {error!r:.300}, see {wrong}")
            return False
        runs += 1
    print(f"{target}: {runs} inputs")
    return True


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=TARGETS, action="append")
    chosen = parser.parse_args()
    fuzz = guided if importlib.util.find_spec("atheris") else by_chance
    print(f"fuzzing {fuzz.__name__.replace('_', ' ')}", flush=True)
    wrong = [
        target
        for target in chosen.target or TARGETS
        if not fuzz(target, chosen.seconds, chosen.seed)
    ]
    print(f"something is wrong with: {', '.join(wrong)}" if wrong else "nothing is wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
