# make             builds ./deepseek
# make run         builds it and asks the shipped model a question
# make test        builds and runs every test
# make help        the other targets
#
# Where nvcc is found (NVCC names another one, NVCC= none), ./deepseek can use a GPU, too; where mpicc is
# found (MPICC), several machines.
#
# Missing Debian packages are installed on the way, with a line that says which and why. Everything else
# happens in this folder: ./deepseek, build/ and weights/. V=1 shows the commands.

CXX      ?= g++
CLANGXX  ?= clang++
CXXFLAGS ?= -O2
STRICT   := -std=c++20 -ffp-contract=off -fopenmp -pthread -Wall -Wextra -Wpedantic -Werror
# The small loops over registers of the integer kernels must be unrolled: clang does it at -O2, g++ with this.
TUNE      = $(if $(findstring clang,$(1)),,-fpeel-loops)
LIBS     := -lsimdjson -lpcre2-8 -lutf8proc -ledit
GTEST    := -lgtest -lgtest_main -pthread

JOBS      := $(shell nproc 2>/dev/null || echo 2)
ifeq ($(filter -j% --jobserver%,$(MAKEFLAGS)),)
MAKEFLAGS += -j$(JOBS)
endif
MAKEFLAGS += --no-print-directory
SHELL     := /bin/bash
comma     := ,
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: all run test check asan fuzz cross style golden bench clean help always

all: deepseek

help:
	@echo "make                 build ./deepseek"
	@echo "make run             ask the shipped model a question"
	@echo "make test            every test (a few minutes on two cores)"
	@echo "make weights/NAME    fetch a published model, for example make weights/DeepSeek-R1-Distill-Qwen-1.5B"
	@echo "make check           the GPU's operations against the CPU's; without a GPU on an emulated one"
	@echo "make asan            the tests once more, with the address and undefined-behaviour sanitizers"
	@echo "make cross           the unit and golden tests for aarch64, under QEMU"
	@echo "make fuzz            five minutes of libFuzzer for each parser (SECONDS_EACH=300)"
	@echo "make style           the budgets of the source text: function lengths, nesting, columns, contents"
	@echo "make bench           speed on this machine and what it allows at most (MODELS=\"FOLDER FILE.gguf\")"
	@echo "make golden          make the golden files anew (needs Python with numpy)"
	@echo "make clean           remove what was built"

run: deepseek
	@echo '$$ ./deepseek run -p "Which is larger, 9.11 or 9.9?"'
	@./deepseek run -p "Which is larger, 9.11 or 9.9?"
	@echo
	@echo 'Ask it more: ./deepseek chat      (a toy with a narrow mind: weights/README.md says what it knows)'

# -- packages --------------------------------------------------------------------------------------------
#
# $(call packages,PURPOSE,DEBIAN PACKAGES,PROBE,NAMES): if the shell command PROBE fails, installs what is
# missing of DEBIAN PACKAGES, one target at a time, or, where there is no apt-get, says what to install. The
# target is a stamp.

ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
APT  := $(ROOT) env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0

define packages
@mkdir -p $(@D)
@if ! { $(3) ; } >$@.log 2>&1; then \
	if ! command -v apt-get >/dev/null; then \
		echo "$(1) needs $(strip $(4))."; \
		echo "There is no apt-get here to install it with: install it in this system's way, then run make again."; \
		exit 1; \
	fi; \
	exec 9>build/apt.lock; flock 9; \
	missing=$$(for p in $(2); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	echo "Installing Debian packages, as $(1) needs them:" $$missing; \
	if ! { $(APT) update && $(APT) install -y --no-install-recommends $$missing; } >$@.log 2>&1; then \
		cat $@.log; echo "They could not be installed."; exit 1; \
	fi; \
	if ! { $(3) ; } >$@.log 2>&1; then cat $@.log; echo "$(1) needs $(strip $(4))."; exit 1; fi; \
fi
@touch $@
endef

includes = printf '\#include <%s>\n' $(1) | $(CXX) -std=c++20 -E -x c++ - -o /dev/null

build/have-run:
	$(call packages,the program,g++ libsimdjson-dev libpcre2-dev libutf8proc-dev libcli11-dev libedit-dev,\
		$(call includes,simdjson.h utf8proc.h CLI/CLI.hpp histedit.h) && \
		printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <pcre2.h>\n' | $(CXX) -E -x c++ - -o /dev/null,\
		a C++20 compiler with OpenMP$(comma) simdjson$(comma) PCRE2$(comma) utf8proc$(comma) CLI11 and libedit)

build/have-test: | build/have-run
	$(call packages,make test,\
		libgtest-dev clang libclang-rt-dev libomp-dev python3 curl libopenmpi-dev openmpi-bin,\
		$(call includes,gtest/gtest.h) && python3 --version && curl --version && \
		$(MPICC) --version && command -v mpirun && \
		echo 'int main() {}' | $(CLANGXX) -fopenmp -fsanitize=address -x c++ - -o /dev/null,\
		GoogleTest$(comma) clang++ with its sanitizers and OpenMP$(comma) Python 3$(comma) curl and an MPI)

build/have-style: | build/have-run
	$(call packages,make style,clang-tidy python3 git,\
		clang-tidy --version && python3 --version && git --version,clang-tidy$(comma) Python 3 and git)

build/have-cross: | build/have-run
	$(call packages,make cross,g++-aarch64-linux-gnu qemu-user,\
		aarch64-linux-gnu-g++ --version && qemu-aarch64 --version,a cross compiler for aarch64 and QEMU)

build/have-fetch:
	$(call packages,make weights/NAME,python3 curl ca-certificates,python3 --version && curl --version,\
		Python 3 and curl)

# -- programs --------------------------------------------------------------------------------------------
#
# Each is one translation unit. build/*.d, written by the compiler, says what each depends on; build/flags
# changes when the compiler or the flags do.

ifeq ($(V),)
compile = @echo "compiling $@"; mkdir -p $(@D) build/deps;
else
compile = mkdir -p $(@D) build/deps;
endif
compile += $(1) $(STRICT) $(TUNE) $(2) -MMD -MP -MT $@ -MF build/deps/$(subst /,-,$@).d $(3) -o $@
compile += $(LIBS) $(4)

NVCC  := $(or $(NVCC),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
OLD   := $(if $(NVCC),$(shell release=$$($(NVCC) --version | sed -n 's/.*release \([0-9]*\).*/\1/p'); \
	[ "$$release" -ge 13 ] 2>/dev/null || echo "$(NVCC) is not of CUDA 13 or later"))
# Asked for when a program is built: `make test` installs an MPI on the way.
MPICC     ?= mpicc
MPI_SAYS   = $(filter -I% -L% -l%,$(shell $(MPICC) -show 2>/dev/null))
WITH_MPI   = $(if $(MPI_SAYS),-DDEEPSEEK_MPI $(patsubst -I%,-isystem %,$(filter -I%,$(MPI_SAYS))))
MPI_LIBS   = $(filter-out -I%,$(MPI_SAYS))
NO_MPI     = $(if $(MPI_SAYS),,@echo "no mpicc: building for one machine, without MPI")
FOR_TESTS := $(if $(filter test asan,$(MAKECMDGOALS)),build/have-test)

FLAGS = $(CXX) $(CLANGXX) $(CXXFLAGS) $(STRICT) $(NVCC) $(MPI_SAYS)
build/flags: always | $(FOR_TESTS)
	@mkdir -p build; echo '$(FLAGS)' | cmp -s - $@ || echo '$(FLAGS)' > $@

# nvcc fails in simdjson's own SIMD, what it writes for the host compiler is not pedantic, and warning 1675 is
# of pragmas that it hands on to that unread. Fused multiply-adds on a GPU would give other bits than the CPU.
GPUS  := -gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a -t 0
HOST   = $(CXXFLAGS) $(call TUNE,$(CXX)) $(filter-out -std=% -Wpedantic,$(STRICT))
TO_CXX = $(subst $(eval ) ,$(comma),$(strip $(HOST)))

WITH_GPU := $(and $(NVCC),$(if $(OLD),,yes))
ifneq ($(WITH_GPU),yes)
deepseek: deepseek.cpp build/flags | build/have-run
	@echo "$(or $(OLD),no nvcc): building for the CPU only"
	$(NO_MPI)
	$(call compile,$(CXX),$(CXXFLAGS) $(WITH_MPI),$<,$(MPI_LIBS))
else
deepseek: deepseek.cu build/flags | build/have-run
	$(NO_MPI)
	@$(if $(V),,echo "compiling $@, for GPUs too";) mkdir -p build/deps
	$(if $(V),,@)$(NVCC) -x cu -std=c++20 -O2 --fmad=false --expt-relaxed-constexpr $(GPUS) \
		$(addprefix -DSIMDJSON_IMPLEMENTATION_,HASWELL=0 ICELAKE=0 WESTMERE=0) -Werror all-warnings \
		-diag-suppress 1675 -ccbin $(CXX) -Xcompiler=$(TO_CXX) $(WITH_MPI) \
		-MMD -MP -MT $@ -MF build/deps/$@.d $< -o $@ $(LIBS) $(MPI_LIBS)
endif

TEST_FLAGS     := $(CXXFLAGS) -I.
SANITIZE       := -O1 -g1 -I. -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_TARGETS   := safetensors index config generation_config tokenizer_json tokenizer_config chat_template \
	messages gguf cache
SECONDS_EACH   ?= 300
FUZZING         = -max_total_time=$(SECONDS_EACH) -timeout=10 -rss_limit_mb=2048 -dict=tests/fuzz/words.dict \
	-max_len=$$(case $$target in gguf) echo 65536;; tokenizer_json) echo 16384;; *) echo 4096;; esac) \
	-print_final_stats=1

build/compilers/deepseek-clang: deepseek.cpp build/flags | build/have-test
	$(call compile,$(CLANGXX),$(CXXFLAGS) $(WITH_MPI),$<,$(MPI_LIBS))
build/compilers/deepseek-gcc: deepseek
	@mkdir -p $(@D); cp $< $@
build/tests: tests/tests.cpp build/flags | build/have-test
	$(call compile,$(CXX),$(TEST_FLAGS),$<,$(GTEST))
build/golden-double: tests/golden/golden.cpp build/flags | build/have-test
	$(call compile,$(CXX),$(TEST_FLAGS) -DDEEPSEEK_REAL=double,$<,$(GTEST))
# Parts of build/tests, for who works on one of them.
build/unit: tests/unit/unit.cpp build/flags | build/have-test
	$(call compile,$(CXX),$(TEST_FLAGS),$<,$(GTEST))
build/golden: tests/golden/golden.cpp build/flags | build/have-test
	$(call compile,$(CXX),$(TEST_FLAGS),$<,$(GTEST))

build/asan/deepseek: deepseek.cpp build/flags | build/have-test
	$(call compile,$(CXX),$(SANITIZE),$<)
build/asan/tests: tests/tests.cpp build/flags | build/have-test
	$(call compile,$(CXX),$(SANITIZE),$<,$(GTEST))

$(FUZZ_TARGETS:%=build/fuzz/%): build/fuzz/%: tests/fuzz/%.cpp build/flags | build/have-test
	$(call compile,$(CLANGXX),$(SANITIZE) -fsanitize=fuzzer -Wno-pass-failed,$<)

# CUDA's sources without a GPU and without nvcc: its headers, and tests/gpu in place of its run time.
CUDA     ?= $(patsubst %/include/cuda_runtime_api.h,%,$(firstword \
	$(wildcard $(addsuffix /include/cuda_runtime_api.h,/usr/local/cuda /opt/cuda))))
EMULATED := -fno-strict-aliasing -rdynamic -isystem $(CUDA)/include -Itests/gpu

build/gpu/cuda_emulator.o: tests/gpu/cuda_emulator.cpp build/flags | build/have-run
	$(call compile,$(CXX),-O3 -g1 $(EMULATED) -c,$<)
build/gpu/deepseek: deepseek.cu build/gpu/cuda_emulator.o build/flags | build/have-run
	$(call compile,$(CXX),-O1 -g1 $(EMULATED) -x c++,$<,-x none $(word 2,$^))
build/gpu/emulator_tests.o: tests/gpu/emulator_tests.cpp build/flags | build/have-test
	$(call compile,$(CXX),-O1 -g1 $(EMULATED) -c,$<)
build/gpu/emulator_tests: build/gpu/emulator_tests.o build/gpu/cuda_emulator.o | build/have-test
	$(call compile,$(CXX),$(EMULATED),$(filter %.o,$^),$(GTEST))
# Fibers as other processors than x86-64 have them.
build/gpu/ucontext_tests: tests/gpu/cuda_emulator.cpp build/gpu/emulator_tests.o | build/have-test
	$(call compile,$(CXX),-O1 -g1 -DEMULATOR_UCONTEXT $(EMULATED),$(filter %.cpp %.o,$^),$(GTEST))
build/asan/%.o: tests/gpu/%.cpp build/flags | build/have-test
	$(call compile,$(CXX),$(SANITIZE) $(EMULATED) -c,$<)
build/asan/emulator_tests: build/asan/emulator_tests.o build/asan/cuda_emulator.o | build/have-test
	$(call compile,$(CXX),$(SANITIZE) $(EMULATED),$(filter %.o,$^),$(GTEST))
build/asan/gpu-deepseek: deepseek.cu build/asan/cuda_emulator.o build/flags | build/have-test
	$(call compile,$(CXX),$(SANITIZE) $(EMULATED) -x c++,$<,-x none $(word 2,$^))

# deepseek.cu with mistakes in it, one of which an environment variable chooses.
build/gpu/mistakes/planted.cpp: deepseek.cu tests/gpu/mistakes.py tests/planting.py | build/have-test
	@mkdir -p $(@D)
	@tests/gpu/mistakes.py --plant $@
build/gpu/twin-mistakes: build/gpu/mistakes/planted.cpp build/gpu/cuda_emulator.o build/flags | build/have-run
	$(call compile,$(CXX),-O1 $(EMULATED) -I. -DDEEPSEEK_NO_MAIN -w,$<,$(word 2,$^))

-include $(wildcard build/deps/*.d)

# -- tests -----------------------------------------------------------------------------------------------
#
# The programs are built side by side, the longest first; then tests/run runs the suites of its list one after
# the other.

TEST_PROGRAMS := build/tests deepseek $(addprefix build/compilers/deepseek-,clang gcc) build/golden-double \
	$(if $(CUDA),$(addprefix build/gpu/,twin-mistakes deepseek emulator_tests ucontext_tests))

test: $(TEST_PROGRAMS) | build/have-style
	@tests/run

# A real GPU where there is one and nvcc has built for it.
GPU_PROGRAM := $(if $(and $(WITH_GPU),$(shell nvidia-smi -L 2>/dev/null)),./deepseek,build/gpu/deepseek)
check: $(GPU_PROGRAM:./%=%)
	@$(GPU_PROGRAM) check $(SECTION)

asan: build/asan/tests build/asan/deepseek build/golden-double \
		$(if $(CUDA),build/asan/emulator_tests build/asan/gpu-deepseek)
	@tests/run --asan

fuzz: $(FUZZ_TARGETS:%=build/fuzz/%)
	@for target in $(FUZZ_TARGETS); do \
		echo "fuzzing $$target for $(SECONDS_EACH) seconds"; \
		mkdir -p build/fuzz/corpus/$$target; \
		build/fuzz/$$target $(FUZZING) -artifact_prefix=build/fuzz/find-$$target- \
			build/fuzz/corpus/$$target tests/fuzz/corpus/$$target >build/fuzz/$$target.log 2>&1 || \
			{ tail -40 build/fuzz/$$target.log; exit 1; }; \
		grep "number_of_executed_units" build/fuzz/$$target.log; \
	done

style: | build/have-style
	@tests/style.py

cross: build/golden-double | build/have-cross
	@tests/cross.sh

golden:
	@python3 -c "import numpy" || { echo "make golden needs Python with numpy; make test does not."; exit 1; }
	python3 tests/golden/make_golden.py
	python3 tests/golden/make_fp8.py

# Multiply-adds may be fused here: these are peaks, not results.
build/floors: tests/bench/floors.cpp build/flags | build/have-run
	$(call compile,$(CXX),-O2 -ffp-contract=fast,$<)

MODELS ?= weights/tiny
bench: deepseek build/floors
	@tests/bench/bench.py $(MODELS)

# -- weights ---------------------------------------------------------------------------------------------

weights/%: | build/have-fetch
	@weights/fetch.py $*

clean:
	rm -rf build deepseek
