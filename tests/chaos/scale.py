"""How much of the chaos is played: a little in `make test`, all of it in `make chaos`."""

import os

import pytest

# `make chaos` sets these.
ROUNDS = int(os.environ.get("CHAOS_ROUNDS") or 0)
SEED = int(os.environ.get("CHAOS_SEED") or 1)

WHOLE = ROUNDS > 0
HOSTILE_S = 60.0 if WHOLE else 2.0

whole_only = pytest.mark.skipif(not WHOLE, reason="long: make chaos")
