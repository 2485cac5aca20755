# make demo    build everything and show compatibility mode
# make test    all tests: checks, unit, C with sanitizers, host, and the lab where it can run
# make lab     the tests on real kvm_amd and kvm_intel, in emulated hosts of two generations each; lab-full: of all
# make soak    110,000 live migrations on KVM of one guest, each checked; goes on after the last 10,000 done
# make bench   the benchmarks, each against a named peer in the same run; ROWS="save restore": these only
# make wheel   the wheel on every later Python that is installed
# make clean   remove what was built
#
# Everything goes into .venv; a second run does only what has changed.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin

GENERATED_FROM := pyhv/cpu/features.toml $(wildcard pyhv/cpu/profiles/*.toml) \
    $(addprefix pyhv/cpu/,generate.py feature_table.py feature_types.py compile_profile.py)
ENGINE  := $(wildcard csrc/*.[ch] csrc/*/*.[ch]) pyhv/_native/build.py
C_FILES := $(wildcard csrc/*.[ch] csrc/*/*.[ch] tests/c/*.[ch] guest_images/*.[ch] guest_images/*/*.[ch] \
    bench/*.[ch] tests/lab/guest/*.[ch] tests/lab/guest/compare/*.c)
GUESTS  := $(shell find guest_images -type f)

.PHONY: demo test check unit c-test sanitize host hops lab lab-full soak bench wheel clean install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python scripts/demo.py

# In CI the lab must run; elsewhere it is a command of its own, for it takes ten minutes and fetches packages.
test: check unit c-test sanitize host hops $(if $(filter true,$(CI)),lab)
	@echo "All tests passed.$(if $(filter true,$(CI)),, REAL KVM (kvm_amd, kvm_intel) WAS NOT TESTED: make lab)"

# ------------------------------------------------------------------------------------------------------ building

install: $(VENV)/installed

$(VENV)/pip: scripts/prepare.sh
	@scripts/prepare.sh
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@touch $@

# PYHV_CFLAGS: a warning in our own code fails our own build, not a user's with a newer compiler.
$(VENV)/installed: $(VENV)/pip pyproject.toml setup.py $(ENGINE) $(GENERATED_FROM) $(GUESTS)
	@echo "Building pyhv ..."
	@PYHV_CFLAGS=-Werror $(BIN)/python -m pip install -q --disable-pip-version-check \
	    --config-settings editable_mode=compat -e '.[emulator]'
	@touch $@

$(VENV)/dev: $(VENV)/installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check \
	    --config-settings editable_mode=compat -e '.[dev,emulator]'
	@touch $@

# -------------------------------------------------------------------------------------------------------- testing

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter-out csrc/gen/%,$(C_FILES))

unit: $(VENV)/dev
	$(BIN)/python -m pytest -q tests/unit

c-test: $(VENV)/installed
	$(MAKE) -s -C tests/c check PYTHON=../../$(BIN)/python

sanitize: $(VENV)/installed
	$(MAKE) -s -C tests/c sanitize fuzz PYTHON=../../$(BIN)/python

host: $(VENV)/dev
	$(BIN)/python -m pytest -q tests/host

# 15 s on two processors that others use too. Without a KVM the emulator runs the guest.
hops: $(VENV)/installed
	$(BIN)/pyhv soak --count 1000

lab: $(VENV)/dev
	$(BIN)/python -m tests.lab test

lab-full: $(VENV)/dev
	$(BIN)/python -m tests.lab test --kinds full

soak: $(VENV)/installed
	@mkdir -p build
	$(BIN)/pyhv soak --count 110000 --accel kvm --state build/soak.json

bench: $(VENV)/installed
	$(BIN)/python -m bench $(ROWS)

wheel: $(VENV)/dev
	CI=true $(BIN)/python -m pytest -q tests/unit/test_wheel.py

clean:
	rm -rf $(VENV) build *.egg-info tests/c/build csrc/gen pyhv/cpu/_features.py pyhv/guests/*.elf
	find pyhv tests bench -name __pycache__ -prune -exec rm -rf {} +
	rm -f pyhv/_native/_pyhv.*
