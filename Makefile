# make run     builds the program and asks the shipped model a question
# make test    builds and runs all tests
#
# Missing Debian packages are installed on the way; `make packages` says which would be.

CXX      ?= g++
CXXFLAGS ?= -O2
STRICT    = -std=c++20 -ffp-contract=off -fopenmp -Wall -Wextra -Wpedantic -Werror
LIBS      = -lsimdjson -lpcre2-8 -lutf8proc
SOURCES   = deepseek.cpp tokenizer.h

RUN_PACKAGES  = g++ libsimdjson-dev libpcre2-dev libutf8proc-dev libcli11-dev

.PHONY: run packages clean

run: deepseek
	./deepseek run -p "Which is larger, 9.11 or 9.9?"

deepseek: $(SOURCES) | packages
	$(CXX) $(STRICT) $(CXXFLAGS) deepseek.cpp -o $@ $(LIBS)

packages:
	@missing=$$(for p in $(RUN_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing" $$missing; apt-get update -qq && apt-get install -y -qq $$missing; fi

clean:
	rm -rf build deepseek
