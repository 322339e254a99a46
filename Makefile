# `make serve` and `make test` are the two commands; both set up `.venv` first.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
# The page's attack demonstration, which is offered on a loopback address only.
DEMO ?= $(if $(filter 127.% localhost ::1,$(HOST)),--enable-attack-demo)
BIN := .venv/bin
# Not xdist's `auto`, which counts the machine's physical cores, whatever this process may use.
CORES = $(shell $(BIN)/python -c 'import os; print(min(4, len(os.sched_getaffinity(0)) \
    if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
FIGURES ?= tests/figures

.PHONY: serve test setup check format parity embedded embedded-bundle harden bundle picture robustness static search image image-local smoke release lock audit sbom clean benchmark benchmark-gpu low-precision lone capacity peers heavy load faults soak fuzz mutants

serve: .venv/serve
	$(BIN)/tapt-serve serve --host $(HOST) --port $(PORT) $(DEMO)

# All tests, or some: make test ARGS=tests/models. Those that measure time run alone, the others on up
# to four cores. With COVERAGE=1 also their coverage, which may not fall; it slows them down.
# What is not covered: .venv/bin/coverage report --show-missing --skip-covered
test: setup
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest -m 'not heavy and not alone' --numprocesses $(CORES) --dist loadfile \
	    $(if $(COVERAGE),--cov --cov-report= --cov-fail-under 0)
	$(BIN)/python -m pytest -m 'alone and not heavy' \
	    $(if $(COVERAGE),--cov --cov-append --cov-report=)
endif

setup: .venv/dev

# Each environment is a stamp file: made once, made again when its inputs change.
.venv/serve: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/serve

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: setup
	$(BIN)/python -m benchmarks.parity --figures $(FIGURES)

# The models of the package, in the order in which they are made.

# Train the embedded model: make embedded DATA=DIR [WORDNET=DIR]
WORDNET ?= /usr/share/wordnet
embedded: setup
	GOMP_SPINCOUNT=1000 $(BIN)/python -m research.embedded.train --data $(DATA) \
	    --wordnet $(WORDNET)

# Learn its defense bundle, through the views that serving reads: make embedded-bundle DATA=DIR
LEARN = GOMP_SPINCOUNT=1000 $(BIN)/tapt-serve calibrate \
    --data $(DATA)/tiny_imagenet_train_0of4.parquet --design vli --depth 6 --epsilon 2/255
LEARN_EMBEDDED = $(LEARN) --model embedded --tokens 16
embedded-bundle: setup
	$(LEARN_EMBEDDED) --shots 100 --steps 250 --rate 1e-2 --views 8 --batch 32 \
	    --out models/embedded/bundle --force

# Harden it on all four training shards, for hours; the same command continues a run that was
# stopped: make harden DATA=DIR [STEPS=5000 HARDENED=DIR]
STEPS ?= 5000
HARDENED ?= runs/hardened
harden: setup
	GOMP_SPINCOUNT=1000 $(BIN)/tapt-serve harden --model embedded --out $(HARDENED) \
	    --data $(wildcard $(DATA)/tiny_imagenet_train_*of4.parquet) \
	    --validate $(DATA)/tiny_imagenet_val.parquet --steps $(STEPS) --rate 5e-4 --warm-up 100 \
	    --attack-steps 1 --step-size 1.25

# Learn the bundle of the hardened model, which is served by default, against attacks on the mean
# over views: make bundle DATA=DIR [MODEL=DIR BUNDLE=DIR]
MODEL ?= embedded-hardened
BUNDLE ?= models/embedded_hardened/bundle
bundle: setup
	$(LEARN) --model $(MODEL) --learns vision --tokens 2 --shots 100 --steps 150 --rate 1e-3 \
	    --views 4 --batch 16 --attack-views 2 --attack-steps 2 --images 400 --out $(BUNDLE) --force

# The README's picture, taken of the page by its own test (Debian's chromium).
picture: setup
	$(BIN)/python -m pytest tests/service/playground/test_playground.py -k its_defense_are_seen
	cp build/screenshots/playground.png docs/figures/playground.png

# The default model's defenses under attack: make robustness DATA=DIR [LIMIT=100
# THREATS=clean,adaptive ...]. A run that was cut short goes on when it is started again; see
# docs/robustness.md.
LIMIT ?= 500
DEFENSES ?= plain,ensemble,apt,apt-ensemble,tapt
THREATS ?= clean,transfer,static,adaptive
ATTACKS ?= pgd,apgd,square
EPS ?= 1/255,2/255
EVALUATE ?= --eot 2 --queries 200 --preflight 2
TABLE ?= runs/robustness/table.json
robustness: setup
	$(BIN)/tapt-serve evaluate --data $(DATA)/tiny_imagenet_val.parquet --limit $(LIMIT) \
	    --defenses $(DEFENSES) --threats $(THREATS) --attacks $(ATTACKS) --eps $(EPS) \
	    $(EVALUATE) --json $(TABLE)

# Whether prompts that the embedded model learned as published, on single views, defend without views
# or adaptation, and that random ones do not, into docs/robustness.md: make static DATA=DIR
# A step of this rate is lost in rounding, so the second bundle keeps its first, random prompts.
STATIC = $(BIN)/tapt-serve evaluate --model embedded --data $(DATA)/tiny_imagenet_val.parquet \
    --defenses plain,apt --threats clean,transfer,static --limit 1000 --views 1 --batch 20
PGD = --attacks pgd --eps 1/255,2/255
APGD = --attacks pgd,apgd --eps 2/255
WRITE = $(BIN)/python -m benchmarks.readme
static: setup
	$(LEARN_EMBEDDED) --shots 100 --steps 300 --rate 2e-2 --clean-share 0.25 \
	    --out runs/static/published --force
	$(LEARN_EMBEDDED) --shots 1 --steps 1 --rate 1e-12 --images 200 \
	    --out runs/static/random --force
	$(STATIC) $(PGD) --bundle runs/static/published --json runs/static/learned.json
	$(STATIC) $(PGD) --bundle runs/static/random --json runs/static/random.json
	cp runs/static/learned.jsonl runs/static/learned-apgd.jsonl  # what PGD did is not done again
	$(STATIC) $(APGD) --bundle runs/static/published --json runs/static/learned-apgd.json
	cp runs/static/random.jsonl runs/static/random-apgd.jsonl
	$(STATIC) $(APGD) --bundle runs/static/random --json runs/static/random-apgd.json
	$(WRITE) --table runs/static/learned.json --into static
	$(WRITE) --table runs/static/random.json --into static-random
	$(WRITE) --table runs/static/learned-apgd.json --into static-apgd
	$(WRITE) --table runs/static/random-apgd.json --into static-random-apgd

# The search for the default settings, on the embedded model, into docs/robustness.md, after `make
# static`: make search DATA=DIR
search: setup
	$(LEARN_EMBEDDED) --shots 100 --steps 300 --rate 1e-2 --views 8 --batch 32 --clean-share 0.2 \
	    --out runs/bundles/attacked --force
	$(BIN)/python -m research.search --data $(DATA)/tiny_imagenet_train_3of4.parquet \
	    --bundle single=runs/static/published --bundle attacked=runs/bundles/attacked

# The service's image by a Docker engine, or by buildah as root where there is none; smoke builds it
# by whichever is there, starts it read-only and offline, and classifies: make smoke [TARGET=cuda]
TARGET ?= cpu
image:
	docker build --file docker/Dockerfile --target $(TARGET) --tag tapt-serve:$(TARGET) .

image-local:
	docker/local.sh build $(TARGET)

smoke:
	docker/smoke.sh $(TARGET)

# The wheel and the images of a tagged version, see docs/release.md: make release REGISTRY=...
REGISTRY ?= ghcr.io/tapt-serve
release: setup
	docker/release.sh $(REGISTRY)

# What the images install, with hashes, after any change of the constraints: what both have, and
# for CUDA torch with its libraries as PyPI has them; --no-config, because pyproject.toml leaves
# those out. docker/requirements-cpu.txt is kept by hand, and says how.
COMPILE = $(BIN)/uv pip compile --python-version 3.11 --python-platform linux --generate-hashes \
    --constraints constraints.txt --no-annotate --custom-compile-command 'make lock' --quiet
lock: setup
	$(COMPILE) pyproject.toml --extra otel --no-emit-package torch \
	    --output-file docker/requirements.txt
	grep '^torch==' constraints.txt | $(COMPILE) - --no-config \
	    --constraints docker/requirements.txt \
	    $$(sed -n 's/^\([^ =]*\)==.*/--no-emit-package \1/p' docker/requirements.txt) \
	    --output-file docker/requirements-cuda.txt

# Known vulnerabilities of every pinned package, first those of the images (torch's by CUDA's list,
# whose version has no `+cpu`), then all that is tested; asks PyPI. A package it cannot judge fails
# it too.
AUDIT = $(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --disable-pip --strict \
    --progress-spinner off
audit: setup
	$(AUDIT) --require-hashes --requirement docker/requirements.txt \
	    --requirement docker/requirements-cuda.txt
	$(AUDIT) --no-deps --requirement constraints.txt

# The bill of materials of an image, CycloneDX: the Python packages it installs, with their hashes:
# make sbom [TARGET=cuda]
SBOM ?= runs/sbom-$(TARGET).json
sbom: setup
	mkdir -p $(dir $(SBOM))
	cat docker/requirements.txt docker/requirements-$(TARGET).txt | $(BIN)/uv tool run \
	    --from cyclonedx-bom==7.5.0 cyclonedx-py requirements - --pyproject pyproject.toml \
	    --mc-type application --output-reproducible --output-file $(SBOM)

# What the hardware allows, into docs/performance.md and docs/capacity.md. The machine should have
# nothing else to do; on two cores it takes about forty minutes.
MEASURE := $(BIN)/python -m benchmarks.
FIGURES_IN ?= runs/benchmarks
benchmark: setup
	$(MEASURE)adaptation --size vit-b-32 --labels 10 100 300 1000 --repeats 3 \
	    --section 'vit-b-32 fp32' --json $(FIGURES_IN)/vit-b-32-fp32.json
	$(MEASURE)adaptation --size vit-b-32 --labels 10 100 300 --dtype bf16 --repeats 2 \
	    --agreement 100 \
	    --section 'vit-b-32 bf16' --json $(FIGURES_IN)/vit-b-32-bf16.json
	$(MEASURE)adaptation --size embedded --labels 10 100 1000 --batch 1 8 --repeats 3 \
	    --section embedded --json $(FIGURES_IN)/embedded.json
	$(if $(DATA),$(MEASURE)adaptation --size embedded --labels 100 --dtype bf16 --repeats 2 \
	    --agreement 500 --data $(DATA)/tiny_imagenet_val.parquet \
	    --section 'embedded bf16' --json $(FIGURES_IN)/embedded-bf16.json)
	$(if $(DATA),$(MEASURE)agreement --data $(DATA)/caltech101.parquet --limit 500 --write)
	$(MEASURE)service --seconds 60 --write --json $(FIGURES_IN)/service.json
	$(MEASURE)service --seconds 60 --write --section 'service on two workers' \
	    --json $(FIGURES_IN)/service-two.json -- --workers 2 --max-batch-size 1
	$(MEASURE)capacity --times $(FIGURES_IN)/service.json --check 60 --write \
	    --json $(FIGURES_IN)/capacity.json
	$(WRITE) --speed $(FIGURES_IN)

benchmark-gpu: setup
	$(MEASURE)adaptation --size vit-b-16 --device cuda --dtype bf16 --labels 10 1000 \
	    --batch 1 8 64 --repeats 3 --section gpu --json $(FIGURES_IN)/gpu.json

# What lower precision and compilation gain on a CPU, into docs/performance.md; takes a C++ compiler:
# make low-precision DATA=DIR
low-precision: setup
	$(MEASURE)low_precision --data $(DATA)/tiny_imagenet_val.parquet \
	    --section 'low precision embedded'
	$(MEASURE)low_precision --size vit-b-32 --section 'low precision vit-b-32'

# Where each millisecond of a lone request goes, into docs/performance.md.
lone: setup
	$(MEASURE)lone --write

# What one API process carries, and a simulated day of a fleet, into docs/capacity.md; after
# `make benchmark`, which measures the times.
capacity: setup
	$(MEASURE)front --write
	$(MEASURE)day --times $(FIGURES_IN)/service.json --write --json $(FIGURES_IN)/day.json

# The service beside other servers, into docs/performance.md and README.md; pip installs them below
# runs/peers. The machine should have nothing else to do.
peers: setup
	$(MEASURE)peers --write --json $(FIGURES_IN)/peers.json

# The tests that take minutes each.
heavy: setup
	$(BIN)/python -m pytest -m heavy --timeout 1800

# Whether the tests notice errors put into the method and the engine on purpose; takes hours, and
# goes on where it was interrupted: make mutants [MUTANTS='models.tapt*']
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[mutants]'
	$(BIN)/mutmut run $(MUTANTS)
	$(BIN)/mutmut results

# What is promised under load and of damaged files, see docs/reliability.md. SECONDS: for each load
# or format; KNOBS: of the server, e.g. KNOBS="--workers 2".
SECONDS ?= 60
MINUTES ?= 30
KNOBS ?=
load: setup
	$(BIN)/python -m benchmarks.load --seconds $(SECONDS) $(if $(KNOBS),-- $(KNOBS))

soak: setup
	$(BIN)/python -m benchmarks.load --soak $(MINUTES) $(if $(KNOBS),-- $(KNOBS))

faults: setup
	$(BIN)/python -m benchmarks.faults

fuzz: setup
	$(BIN)/python -m benchmarks.fuzz --seconds $(SECONDS)

clean:
	rm -rf .venv build dist mutants *.egg-info .coverage*
