# Bulkhead. `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO ?= cargo
RELEASE := target/x86_64-unknown-linux-gnu/release
PREFIX ?= /usr/local
VMLINUX := target/guest/vmlinux
IMAGE := target/guest/guest.erofs

.PHONY: help demo test attack chaos bench bench-compare build guest unit e2e e2e-intel lint audit fuzz release install clean packages kernel kernel-update $(VMLINUX)

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build guest ## Run real containers in microVMs through a private containerd and check what is promised
	@tests/run.sh demo

test: unit e2e ## Every test: units and devices natively, then the end-to-end suite in real microVMs

unit: packages ## Unit tests, and the VMM's tests on this machine's /dev/kvm
	@tests/unit.sh

e2e: build guest ## The end-to-end suite through containerd (ARGS="NAME..." runs the cases whose names match)
	@tests/run.sh e2e $(ARGS)

e2e-intel: export NESTED_CPU := intel
e2e-intel: build guest ## A few of these cases on Intel's VMX, emulated by Bochs: boot, template, restore, exec, disk, network
	@tests/run.sh e2e $(or $(ARGS),lifecycle-states exec-output disk-is-read network-bridge template-pods-are)

attack: build guest ## What gets out of containers of runc and of Bulkhead, as a table (ARGS="NAME..." for a part)
	@$(if $(ARGS),,BULKHEAD_PROGRAMS=200 $(CARGO) test --locked --quiet -p bulkhead-vmm --test programs)
	@tests/run.sh attack $(ARGS)

SEED := 1
ROUNDS := 100
chaos: build guest ## Kill parts of pods at random moments: nothing is left, nobody else notices (SEED=n ROUNDS=n)
	@tests/run.sh chaos --seed $(SEED) --rounds $(ROUNDS)

fuzz: ## Feed each fuzz target for SECONDS=n (20), all or ARGS="NAME..."; CI gives each ten seconds
	@fuzz/run.sh $(or $(SECONDS),20) $(ARGS)

bench: build guest ## Measure runc, crun, gVisor and Bulkhead side by side (ARGS="--rounds 3 start memory" for a part)
	@tests/run.sh bench $(ARGS)

# The two words after bench-compare are reports, not things to make.
ifeq (bench-compare,$(firstword $(MAKECMDGOALS)))
REPORTS := $(wordlist 2,3,$(MAKECMDGOALS))
.PHONY: $(sort $(REPORTS))
$(sort $(REPORTS)): ; @:
endif
bench-compare: ## What became better or worse beyond noise: make bench-compare A.json B.json (default: the baseline, the last run)
	@$(CARGO) run --quiet --release --locked -p bulkhead-bench --bin bulkhead-bench -- compare \
	    $(or $(REPORTS),bench/baseline.json target/bench/report.json)

build: packages ## Release binaries
	@echo "build: release binaries (the first time takes some minutes)"
	@$(CARGO) build --release --locked --workspace --exclude bulkhead-fuzz

guest: $(VMLINUX) $(IMAGE) ## The guest kernel and the guest image

# Ours if it has been built, else a ready-made one; the script compares.
$(VMLINUX): | packages
	@guest-kernel/use.sh

ARCH ?= x86_64
kernel: ## Build Bulkhead's own guest kernel from Debian's source, once (a quarter of an hour; ARCH=arm64 cross-builds)
	@guest-kernel/build.sh $(ARCH)

kernel-update: ## Pin the newest source of the guest kernel, and show what is new in it
	@guest-kernel/update.sh

# Depends on the build as an order only: the script itself compares the agent with the image's.
$(IMAGE): $(RELEASE)/bulkhead-agent guest-image/build.sh
	@guest-image/build.sh $< $@

$(RELEASE)/bulkhead-agent: build ;

release: packages ## What is released, under target/dist: an archive, its parts as an SBOM, checksums; the same bytes from the same commit
	@deploy/release.sh

install: ## Install into PREFIX (/usr/local) what `make build guest` built
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/containerd-shim-bulkhead-v1 $(RELEASE)/bulkhead
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/libexec/bulkhead $(RELEASE)/bulkhead-vmm $(RELEASE)/bulkhead-fs
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/bulkhead $(VMLINUX) $(IMAGE)

packages: ## The Debian packages that building and testing need
	@tests/install-packages.sh

lint: ## Formatting and clippy
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@$(CARGO) clippy --locked -p bulkhead-fuzz --features engine --bins -- -D warnings

audit: ## Licences, sources and known vulnerabilities of the dependencies
	@tests/audit.sh

clean: ## Remove everything that was built or fetched
	@rm -rf target
