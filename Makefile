# One entry for each thing a developer does. `make run` and `make test` set everything up first.
# Only relative paths below, so that the tree may lie anywhere, also in a path with spaces.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup run lint test bench chaos fuzz soak kube-assets helm prometheus image image-check sbom cluster-test vm-test hardware-check \
    hardware-test lock clean

VENV := .venv
PY := $(VENV)/bin/python
LOCK := deploy/lock
UV_VERSION := 0.13.9
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --quiet

# Arguments for pytest, the bench or uv: make test ARGS='-k ledger -x'
ARGS ?=
# This interpreter and no other: make setup PYTHON=/opt/python/bin/python3
PYTHON ?=

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

# A virtual environment knows its own place and its interpreter: after a move or a change of
# Python it is made anew. Messages go to stderr, so that `make kube-assets` prints one line.
setup: ## make .venv with everything in it (needs Python 3.11 to 3.13)
	@if [ -e $(VENV) ] && ! { [ "$$(cat $(VENV)/.place 2>/dev/null)" = "$$(pwd -P)" ] \
	    && $(PY) -c '' 2>/dev/null; }; then rm -rf $(VENV); fi
	@$(MAKE) --no-print-directory -s $(VENV)/.ready >&2

#
# The watcher runs as another user where root starts it. So a Python that other users can reach
# comes before one that lies in root's home (the first of them serves where there is no other).
REACHABLE := import os, sys; os.getuid() or os.setgid(65532) or os.setuid(65532); \
    os.listdir(os.path.dirname(os.__file__)); os.stat(os.path.realpath(sys.executable))
$(VENV)/.place:
	@echo 'setup: making $(VENV)'
	@chosen=; reason='no Python 3.11, 3.12 or 3.13 found'; \
	for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 \
	        /usr/local/bin/python3 /usr/bin/python3); do \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	        2>/dev/null || continue; \
	    "$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
	        reason="$$python has no venv or ensurepip module"; continue; }; \
	    [ -n "$$chosen" ] || chosen=$$python; \
	    if "$$python" -c '$(REACHABLE)' 2>/dev/null; then chosen=$$python; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	    echo "setup: $$reason; on Debian or Ubuntu: apt-get install python3 python3-venv," \
	         "elsewhere: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	rm -rf $(VENV) && "$$chosen" -m venv $(VENV) && pwd -P >$@

# The simulated NVML is C: a compiler that cannot make a shared library is none.
$(VENV)/.ready: pyproject.toml $(LOCK)/dev.txt $(LOCK)/ziglang.txt | $(VENV)/.place
	@echo 'setup: installing what $(LOCK)/dev.txt names'
	@$(PIP) --require-hashes -r $(LOCK)/dev.txt
	@for cc in cc gcc clang; do \
	    printf '#include <stdio.h>\nint probe(void) { return puts(""); }\n' | \
	    "$$cc" -shared -fPIC -x c -o $(VENV)/.probe.so - 2>/dev/null && break; \
	done; \
	if [ ! -e $(VENV)/.probe.so ]; then \
	    echo 'setup: no C compiler that works here, installing ziglang'; \
	    $(PIP) --require-hashes -r $(LOCK)/ziglang.txt || exit 1; \
	fi; rm -f $(VENV)/.probe.so
	@$(PIP) --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	@touch $@

run: setup ## the whole agent on a simulated node, with a tour that checks itself
	@$(PY) -m tests.simnode demo $(ARGS)

lint: setup ## style, types and the boundaries between the programs
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check .
	@$(PY) -m mypy --no-error-summary
	@$(VENV)/bin/lint-imports --no-logo >$(VENV)/.imports 2>&1 \
	    || { cat $(VENV)/.imports; exit 1; }

# A fault of style does not keep the tests from running, it only fails at the end.
# Exit status 3 of tests.kube.assets: nothing cached, and the tests of the real API are skipped.
test: setup ## lint and all tests; ARGS goes to pytest
	@lint=0; $(MAKE) --no-print-directory -s lint || lint=1; \
	if [ -z "$${KUBEBUILDER_ASSETS:-}" ]; then \
	    KUBEBUILDER_ASSETS=$$($(PY) -m tests.kube.assets --if-cached) || [ $$? -eq 3 ] || exit 1; \
	fi; \
	if [ -n "$$KUBEBUILDER_ASSETS" ]; then export KUBEBUILDER_ASSETS; \
	else unset KUBEBUILDER_ASSETS; fi; \
	[ $$lint -eq 0 ] || echo 'make test: lint FAILED (above); the tests run all the same' >&2; \
	$(PY) -m pytest -n 4 --dist loadfile $(ARGS) && exit $$lint

bench: setup ## the figures of the README, measured here
	@$(PY) -m tests.bench $(ARGS)

# The rest of what `make test` plays a little of: every crash point, longer attacks, more rounds.
ROUNDS ?= 200
SEED ?= 1
chaos: setup ## kills, hostile clients and pods, faults at length: ROUNDS=200 SEED=1
	@KUBEBUILDER_ASSETS="$${KUBEBUILDER_ASSETS:-$$($(PY) -m tests.kube.assets --if-cached)}" \
	    CHAOS_ROUNDS=$(ROUNDS) CHAOS_SEED=$(SEED) \
	    LIVES=$(ROUNDS)0 CASES=$(ROUNDS)00 \
	    $(PY) -m pytest -s --timeout 1200 \
	    tests/chaos tests/life/test_any_life.py tests/unit/test_policy_properties.py \
	    tests/kube/test_restored.py $(ARGS)

# atheris has no wheels for every platform and Python, so it is in no lock: without it, chance.
SECONDS ?= 60
fuzz: setup ## fuzz each parser for so long: SECONDS=60; ARGS='--target ledger'
	@$(PIP) --target build/atheris --upgrade --only-binary :all: 'atheris>=3' || :
	@PYTHONPATH=build/atheris $(PY) -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) $(ARGS)

MINUTES ?= 20
soak: setup ## random life, faults and kills, watched from outside: MINUTES=20 SEED=1
	@$(PY) -m tests.chaos.soak --minutes $(MINUTES) --seed $(SEED) $(ARGS)

kube-assets: setup ## build etcd and kube-apiserver (Go needed, minutes once), print their folder
	@$(PY) -m tests.kube.assets $(ARGS)

helm: setup ## build helm, with which the chart is tested (Go needed, minutes once), print its path
	@$(PY) -m tests.kube.helm_assets $(ARGS)

prometheus: setup ## unpack Debian's Prometheus, with which the alerts are tested, print its folder
	@$(PY) -m tests.prometheus.tools

# Without a container engine, as root: buildah on a base made from Debian's packages (both are
# installed where they are missing). Everywhere else: docker build -t dynamo/power-agent:v1.0.0 .
IMAGE_TAR = build/images/power-agent-$(shell sed -n 's/^__version__ = "\(.*\)"/v\1/p' shared/__init__.py).tar

image: setup ## the container image, as a file that docker, podman and containerd load
	@$(PY) -m tests.cluster.images $(ARGS)

image-check: setup ## each of the image's three ways at work, on a simulated node
	@$(PY) -m tests.cluster.image_check

sbom: setup ## what is in that file, as CycloneDX
	@[ -e $(IMAGE_TAR) ] || $(MAKE) --no-print-directory -s image
	@$(PY) -m tests.cluster.sbom $(IMAGE_TAR)

# Exit status 3: something is missing here, and pytest will say what it skips for it.
cluster-test: setup ## what an administrator does, on the cluster of KUBECONFIG or one made here
	@[ -n "$${KUBECONFIG:-}" ] || $(PY) -m tests.cluster.prepare || [ $$? -eq 3 ]
	@$(PY) -m pytest -m cluster tests/cluster $(ARGS)

hardware-check: setup ## what this machine's real GPUs and driver do; reads only
	@$(PY) deploy/qualify/check.py $(ARGS)

hardware-test: setup ## the enforcer on this machine's real GPUs (root, POWER_AGENT_MAY_SET_LIMITS=1)
	@$(PY) -m tests.hardware $(ARGS)

# As root on Debian: qemu emulates, so it takes a quarter to half an hour. ARGS goes to tests.vm.
FLAVOUR ?= apparmor
vm-test: setup ## a subset of them on Debian's own kernel, emulated: FLAVOUR=apparmor or selinux
	@$(PY) -m tests.vm --flavour $(FLAVOUR) $(ARGS)

# One resolution for all: the components' locks take the versions of dev.txt. No host name is
# written into them, so that any package index serves.
lock: setup ## renew deploy/lock from pyproject.toml; ARGS=--upgrade for newer versions
	@$(PIP) --target build/uv --upgrade uv==$(UV_VERSION)
	@compile() { \
	    out=$$1; shift; \
	    build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 \
	        --generate-hashes --no-emit-index-url --no-emit-find-links --no-header \
	        --no-annotate --output-file "$(LOCK)/$$out.txt" "$$@"; \
	}; \
	compile dev $(ARGS) --extra dev pyproject.toml \
	&& printf 'ziglang\n' | compile ziglang $(ARGS) - \
	&& for part in enforcer watcher supervised; do \
	    compile "$$part" --extra "$$part" --constraints $(LOCK)/dev.txt pyproject.toml || exit 1; \
	done

clean: ## remove everything that the targets above made in this tree
	rm -rf $(VENV) build dist *.egg-info .hypothesis .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
