#!/usr/bin/env bash
# Builds the fake driver of the emulator, or the emulator's own tests.
#
# usage: build.sh driver OUT_DIR [plain|address|thread]     OUT_DIR/libcuda.so.1 with every kernel of ../*.cu
#        build.sh test [OUT_DIR]                            builds and runs tests.cpp and driver_tests.cpp, plain and
#                                                           under both sanitizers
#        build.sh test-driver OUT_DIR                       OUT_DIR/libcuda.so.1 with the kernels of test_kernels.cu
#                                                           alone, for tests/gpu/wrappers.py; `test` leaves the same
#                                                           in OUT_DIR/plain
#
# Needs only g++. Objects are kept in OUT_DIR and compiled again when a source is newer. With a sanitizer, kernels are
# instrumented and the emulator is not (sanitizers.h); the process that loads the driver preloads libasan or libtsan.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernels=$(dirname "$here")
compiler=${CXX:-g++}
jobs=${JOBS:-$(nproc)}

emulator_sources=(fibers meetings blocks reports asynchronous warp_operations tensor_core)
driver_sources=(fake_device fake_memory fake_streams fake_launch)

common=(-std=c++17 -O2 -g1 -march=native -fPIC -fvisibility=hidden -Wall -Wextra -DEMULATOR
  "-I$kernels" "-I$here")
# Kernels round each product and sum as written; in the emulator products of bf16 are exact, so fusing changes nothing.
kernel_flags=(-ffp-contract=off -fno-strict-aliasing
  -Wno-unknown-pragmas -Wno-unused-function -Wno-unused-parameter -Wno-attributes)
emulator_flags=(-O3 -ffp-contract=fast -mprefer-vector-width=512)

# Sets defines, sanitize, plain and link for a variant; plain is for the sources that are not instrumented.
select_variant() {
  defines=() sanitize=() plain=() link=()
  case $1 in
    plain) ;;
    address)
      defines=(-DEMULATOR_ASAN)
      sanitize=(-fsanitize=address -fsanitize-sections=emulator_shared)
      plain=(-include "$here/plain_memory.h")
      link=(-fsanitize=address)
      ;;
    thread)
      defines=(-DEMULATOR_TSAN)
      sanitize=(-fsanitize=thread -Wno-tsan)
      plain=(-include "$here/plain_memory.h")
      link=(-fsanitize=thread)
      ;;
    *)
      echo "build.sh: no variant $1" >&2
      exit 2
      ;;
  esac
}

# Whether OBJECT lacks or is older than a source. Headers are few: any of them counts for every object.
is_stale() {
  local object=$1 source=$2
  [[ ! -e $object || $source -nt $object || $here/build.sh -nt $object ]] && return 0
  local header
  for header in "$kernels"/*.cuh "$here"/*.h; do
    [[ $header -nt $object ]] && return 0
  done
  return 1
}

# Waits until fewer than $jobs compilers run; a failed one ends the script.
throttle() {
  while (($(jobs -pr | wc -l) >= jobs)); do wait -n; done
}
finish() {
  while [[ -n $(jobs -p) ]]; do wait -n || exit 1; done
}

compile() {
  local object=$1 source=$2
  shift 2
  objects+=("$object")
  is_stale "$object" "$source" || return 0
  throttle
  "$compiler" "${common[@]}" "${defines[@]}" "$@" -c "$source" -o "$object" &
}

# A kernel's names are its own: each file becomes a namespace, and nothing in it is visible outside.
compile_kernel() {
  local object=$1 source=$2 namespace
  namespace=$(basename "$source" .cu)
  local unit=${object%.o}.cpp
  local text
  text="#include \"device.cuh\"
namespace ${namespace}_file {
namespace {
#include \"$source\"
}
}"
  [[ -e $unit && $(<"$unit") == "$text" ]] || printf '%s\n' "$text" >"$unit"
  is_stale "$object" "$source" && rm -f "$object"
  compile "$object" "$unit" "${kernel_flags[@]}" "${sanitize[@]}"
}

compile_emulator() {
  local out=$1 name
  for name in "${emulator_sources[@]}"; do
    compile "$out/$name.o" "$here/$name.cpp" "${emulator_flags[@]}" "${plain[@]}"
  done
  compile "$out/plain_memory.o" "$here/plain_memory.cpp" -fno-tree-loop-distribute-patterns
}

build_driver() {
  local out=$1 variant=$2 name source
  select_variant "$variant"
  mkdir -p "$out"
  objects=()
  for source in "$kernels"/*.cu; do
    compile_kernel "$out/kernel_$(basename "$source" .cu).o" "$source"
  done
  compile_emulator "$out"
  for name in "${driver_sources[@]}"; do
    compile "$out/$name.o" "$here/$name.cpp"
  done
  finish
  link_driver "$out" "${objects[@]}"
}

link_driver() {
  local out=$1
  shift
  "$compiler" -shared -Wl,-z,defs -Wl,-soname,libcuda.so.1 "${link[@]}" -o "$out/libcuda.so.1.new" "$@" -pthread
  mv "$out/libcuda.so.1.new" "$out/libcuda.so.1"
}

build_tests() {
  local out=$1 variant=$2 name
  select_variant "$variant"
  mkdir -p "$out"
  objects=()
  compile_kernel "$out/test_kernels.o" "$here/test_kernels.cu"
  compile_emulator "$out"
  local emulator_objects=("${objects[@]}")
  compile "$out/tests.o" "$here/tests.cpp"
  compile "$out/driver_tests.o" "$here/driver_tests.cpp"
  local driver_objects=()
  for name in "${driver_sources[@]}"; do
    compile "$out/$name.o" "$here/$name.cpp"
    driver_objects+=("$out/$name.o")
  done
  finish
  "$compiler" "${link[@]}" -o "$out/tests" "${emulator_objects[@]}" "$out/tests.o" -pthread
  "$compiler" "${link[@]}" -o "$out/driver_tests" "${emulator_objects[@]}" "$out/driver_tests.o" \
    "${driver_objects[@]}" -pthread
  link_driver "$out" "${emulator_objects[@]}" "${driver_objects[@]}"
}

run_tests() {
  local out=$1 variant failed=0
  for variant in plain address thread; do
    build_tests "$out/$variant" "$variant"
    echo "== $variant"
    "$out/$variant/tests" || failed=1
    "$out/$variant/driver_tests" || failed=1
  done
  return "$failed"
}

case ${1:-} in
  driver) build_driver "${2:?usage: build.sh driver OUT_DIR [VARIANT]}" "${3:-plain}" ;;
  test-driver) build_tests "${2:?usage: build.sh test-driver OUT_DIR}" plain ;;
  test) run_tests "${2:-/tmp/emulator-tests}" ;;
  *)
    sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
