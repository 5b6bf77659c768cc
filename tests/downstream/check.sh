#!/usr/bin/env bash
# Builds examples/embed against the installed library as users do, in a folder of its own: found by
# CMake, by pkg-config, and inside the Python package. Each must stream the tokens that Python gets.
# Then programs of other versions meet the library: one with older headers must work, one of another
# binary interface must be refused before it runs (include/dsfp4/api.h).
# usage: check.sh BUILD_FOLDER PYTHON; needs cmake, ninja, pkg-config and c++
set -euo pipefail
build=$(realpath "$1")
python=$(realpath -s "$2")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/examples/embed" "$work/source"
cd "$work"

readonly PROMPT=(0 100 200 300 400)
readonly COUNT=16

cmake --install "$build" --component cpp --prefix "$work/first" >/dev/null
mv first installed  # it must find its parts wherever it lies

by_cmake() {  # by_cmake NAME DEFINITION
  cmake -G Ninja -S source -B "$1" -DCMAKE_BUILD_TYPE=Release "$2" >/dev/null
  cmake --build "$1" >/dev/null
  mv "$1/stream_tokens" "stream-$1"
}

by_pkg_config() {  # by_pkg_config SOURCE OUT FLAG...
  local -x PKG_CONFIG_PATH=$work/installed/lib/pkgconfig
  # shellcheck disable=SC2046  # flags are words
  c++ -std=c++20 "${@:3}" "$1" $(pkg-config --cflags --libs dsfp4) \
    "-Wl,-rpath,$(pkg-config --variable=libdir dsfp4)" -o "$2"
}

expect_refused() {  # expect_refused WORDS PROGRAM
  if LD_BIND_NOW=1 "$2" "$model" "$COUNT" "${PROMPT[@]}" >/dev/null 2>said; then
    echo "$2 ran" >&2
    exit 1
  fi
  grep -- "$1" said | sed "s|$work/||g"
}

by_cmake cmake "-DCMAKE_PREFIX_PATH=$work/installed"
by_pkg_config source/stream_tokens.cpp stream-pkg-config
by_cmake python "-Ddsfp4_DIR=$("$python" -m dsfp4 --cmake-dir)"

"$python" - "$COUNT" "${PROMPT[@]}" >model-and-ids <<'PY'
import sys
from dsfp4 import Model
from dsfp4.demo import resolve_model

count, *prompt = map(int, sys.argv[1:])
folder = resolve_model("demo")
print(folder, *Model(folder).generate(prompt, max_tokens=count).tokens)
PY
read -r model expected <model-and-ids

for program in cmake pkg-config python; do
  echo "\$ stream_tokens MODEL $COUNT ${PROMPT[*]}  # found by $program"
  "./stream-$program" "$model" "$COUNT" "${PROMPT[@]}" >ids
  tr '\n' ' ' <ids
  echo
  [ "$(tr '\n' ' ' <ids | sed 's/ $//')" = "$expected" ] ||
    { echo "but Python gets $expected" >&2; exit 1; }
  # An error crosses the library's border as its own type, with its facts.
  mkdir -p empty
  if "./stream-$program" "$work/empty" 1 0 2>said; then
    echo "an empty folder was loaded" >&2
    exit 1
  fi
  grep "^bad checkpoint, see $work/empty" said | sed "s|$work/||g"
done

readonly OLD=$root/tests/downstream
"$python" "$OLD/old_headers.py" installed/include older
by_pkg_config "$OLD/old_program.cpp" ./old-program -O1 -Iolder
echo "\$ old_program MODEL $COUNT ${PROMPT[*]}  # compiled with older headers"
./old-program "$model" "$COUNT" "${PROMPT[@]}" >ids
[ "$(tr '\n' ' ' <ids | sed 's/ $//')" = "$expected" ] ||
  { echo "an old program gets other tokens" >&2; exit 1; }

library=$(readelf --dynamic stream-cmake | sed -n 's/.*NEEDED.*\[\(libdsfp4.*\)\]/\1/p')
[[ $library =~ ^libdsfp4\.so\.[0-9]+$ ]] || { echo "$library has no version" >&2; exit 1; }

# Of another interface, whose library's place this one has taken by force; then as upgrades are.
"$python" "$OLD/old_headers.py" installed/include other 0
c++ -std=c++20 -Iother -c "$OLD/old_program.cpp" -o other.o
nm --undefined-only --format=posix other.o |
  sed -n 's/^\([^ ]*dsfp44abi0[^ ]*\) .*/void \1(void) {}/p' >other.c
mkdir theirs
c++ -x c -shared -fPIC "-Wl,-soname,$library" other.c -o "theirs/$library"
c++ other.o "theirs/$library" "-Wl,-rpath,$work/installed/lib" -o other-program
expect_refused "undefined symbol: .*dsfp44abi0" ./other-program
mv installed/lib/libdsfp4.so* "$work"
ln -s "$work/$library" installed/lib/libdsfp4.so
ln -s "$work/$library" installed/lib/libdsfp4.so.999
expect_refused "$library: cannot open shared object file" ./stream-cmake
