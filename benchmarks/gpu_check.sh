#!/usr/bin/env bash
# Build, GPU tests and benchmarks on a GPU, or compute-sanitizer: two calls, each of which takes under 10 minutes.
#   benchmarks/gpu_check.sh [OUT]             needs a GPU, nvcc and a CUDA build of torch; no network if torch is installed
#   benchmarks/gpu_check.sh --sanitize [OUT]  the small GPU tests under compute-sanitizer, with the same needs
#   benchmarks/gpu_check.sh --rehearse [OUT]  without a GPU: the emulator's tests, and benchmarks at tiny sizes
# OUT (benchmarks/results/gpu) receives the log of every step and the benchmarks' results. PYTHON is the interpreter (python3).
# WHEEL=FILE installs this wheel and compiles nothing. STEPS="tests attention" runs only these steps after the build. A copy of
# the tree without its .git needs MOVQ_EXT_COMMIT: benchmarks record the commit.
# A failed step does not stop the next one. The exit status is 1 if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=check
case ${1:-} in
  --sanitize | --rehearse) mode=${1#--}; shift ;;
  -*) echo "expected --sanitize, --rehearse or a folder, got $1" >&2; exit 2 ;;
esac
out=$(realpath -m "${1:-benchmarks/results/gpu}")
mkdir -p "$out"
summary=$out/summary.md
if [ $mode = sanitize ]; then summary=$out/sanitizers.md; fi  # both calls can write to one folder
: > "$summary"
echo "| step | result | seconds |" >> "$summary"
echo "|---|---|---:|" >> "$summary"
failed=0

# chosen NAME: whether STEPS asks for a step.
chosen() { [ -z "${STEPS:-}" ] || [[ $1 == build* || " $STEPS " == *" $1 "* ]]; }

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 begin=$SECONDS result=passed
  shift 2
  chosen "$name" || return 0
  # On SIGINT pytest reports the tests that failed so far; on SIGTERM it does not.
  timeout --signal=INT --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  case $? in 0) ;; 124 | 137) result="timed out" ;; *) result=failed ;; esac
  if [ "$result" != passed ]; then failed=1; echo "--- $name $result:"; tail -n 30 "$out/$name.log"; fi
  echo "| $name | $result | $((SECONDS - begin)) |" >> "$summary"
}
missing() { ! chosen "$1" || echo "| $1 | missing: $2 | 0 |" >> "$summary"; }

# A virtual environment that sees the installed torch.
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv --without-pip --system-site-packages "$environment"
# --system-site-packages skips an outer virtual environment, so add that one too, with its .pth files.
"${PYTHON:-python3}" -c 'import site; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' > "$("$environment/bin/python" -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
python="$environment/bin/python"
architecture=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)

install() {
  "$python" -c 'import torch, ninja, pybind11, setuptools; assert int(setuptools.__version__.split(".")[0]) >= 77, setuptools.__version__' || return 1
  # Missing pure Python packages only skip the tests that need them.
  "$python" -m pip install --quiet numpy pillow safetensors scikit-image tqdm pytest pytest-xdist hypothesis || echo "some packages are missing"
  "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "${WHEEL:-.}"
}
export -f install
export python PIP_DEFAULT_TIMEOUT=5 PIP_RETRIES=0

if [ $mode = rehearse ]; then
  MOVQ_EXT_CUDA=0 step build 200 bash -c install
  step tests 300 "$python" -m pytest -q -k "emulator and small" tests/test_spatial_norm_kernels.py tests/test_attention_kernels.py \
    tests/test_epilogue_kernels.py tests/test_upsampling_kernels.py
  missing sanitizers "no GPU"
  step spatial_norm 120 "$python" benchmarks/spatial_norm.py --quick --device cpu --out "$out"
  step attention 120 "$python" benchmarks/attention.py --quick --device cpu --out "$out"
  step epilogue 60 "$python" benchmarks/epilogue.py --quick --device cpu --out "$out"
  step upsample 60 "$python" benchmarks/upsample.py --quick --device cpu --out "$out"
  step host 60 "$python" benchmarks/host.py --quick --device cpu --out "$out"
  step decode 240 "$python" benchmarks/decode.py --quick --device cuda cpu --out "$out"
  step overview 60 "$python" benchmarks/gpu_overview.py --quick --device cpu --out "$out"
  step memory 120 "$python" benchmarks/memory.py --device cpu --sizes 64 --max-memory 150 --out "$out"
  step accuracy 240 "$python" benchmarks/accuracy.py --quick --report --seeds 2 --device cpu --out "$out"
  PYTHON="$python" step profile 120 benchmarks/profile_decode.sh "$out" --quick --device cpu
elif [ $mode = sanitize ]; then
  MOVQ_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="$architecture" step build_sanitize 100 bash -c install
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  for tool in memcheck racecheck synccheck initcheck; do
    if [ -x "$sanitizer" ]; then
      # Check only our kernels, by their mangled names; initcheck must also see the writes of others. The allocator's cache is
      # off, because it would hide an access past the end of a tensor.
      only=(--kernel-name kernel_substring=4movq)
      if [ "$tool" = initcheck ]; then only=(); fi
      if [ "$tool" = memcheck ]; then only+=(--report-api-errors no); fi  # torch probes for optional driver features; our own API errors throw
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 90 "$sanitizer" --tool "$tool" "${only[@]}" --error-exitcode 1 \
        "$python" -m pytest -q -k "gpu and small and (attention or (silu or both) and (bfloat16 or unaligned))" \
        tests/test_spatial_norm_kernels.py tests/test_attention_kernels.py tests/test_epilogue_kernels.py \
        tests/test_upsampling_kernels.py
    else
      missing "$tool" "no compute-sanitizer"
    fi
  done
else
  MOVQ_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="$architecture" step build 100 bash -c install
  workers=()  # 1350 tests took 45 s in 9 processes, and would take minutes in one
  if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n 8); fi
  OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=1 step tests 100 "$python" -m pytest -q -m gpu "${workers[@]}" tests
  step spatial_norm 45 "$python" benchmarks/spatial_norm.py --minutes 0.5 --out "$out"
  step attention 45 "$python" benchmarks/attention.py --minutes 0.5 --out "$out"
  step epilogue 25 "$python" benchmarks/epilogue.py --minutes 0.3 --out "$out"
  step upsample 30 "$python" benchmarks/upsample.py --minutes 0.4 --out "$out"
  step host 40 "$python" benchmarks/host.py --minutes 0.5 --out "$out"
  step overview 75 "$python" benchmarks/gpu_overview.py --minutes 1 --out "$out"
  step memory 25 "$python" benchmarks/memory.py --device cuda --sizes 1024 --out "$out"
  step accuracy 40 "$python" benchmarks/accuracy.py --device cuda --compile --minutes 0.5 --out "$out"
  PYTHON="$python" step profile 40 benchmarks/profile_decode.sh "$out" --device cuda
fi
cat "$summary"
exit $failed
