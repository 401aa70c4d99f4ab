#!/usr/bin/env bash
# Profile a decode: a table of times by layer and, with a GPU and Nsight Systems, a report of nsys.
#   benchmarks/profile_decode.sh [OUT] [options of profile_decode.py]
# OUT (benchmarks/results/profile) receives the files of profile_decode.py and, from nsys, decode.nsys-rep and its summaries by
# layer and by kernel (nsys.txt). PYTHON is the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
out=benchmarks/results/profile
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then out=$1; shift; fi
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

if ! command -v nsys > /dev/null; then
  echo "nsys was not found: using torch.profiler only"
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU was found: using torch.profiler only"
else
  # Only the decodes between cudaProfilerStart and cudaProfilerStop are recorded, without start-up and warm-up.
  nsys profile --trace=cuda,nvtx,cudnn,cublas --sample=none --cpuctxsw=none --capture-range=cudaProfilerApi --capture-range-end=stop \
    --force-overwrite=true --output="$out/decode" "$python" benchmarks/profile_decode.py "$@" --capture || failed=1
  nsys stats --force-export=true --report nvtx_gpu_proj_sum --report nvtx_kern_sum --report cuda_gpu_kern_sum \
    "$out/decode.nsys-rep" | tee "$out/nsys.txt" || failed=1
fi
"$python" benchmarks/profile_decode.py "$@" --out "$out" || failed=1
exit $failed
