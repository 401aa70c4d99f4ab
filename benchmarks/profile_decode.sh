#!/usr/bin/env bash
# A decode under Nsight Systems, and the table of where its time goes.
#   benchmarks/profile_decode.sh [OUT] [options of profile_decode.py]
# OUT (benchmarks/results/profile) gets decode.nsys-rep, which opens in Nsight Systems, its summaries by layer and by kernel
# (nsys.txt), and what profile_decode.py writes. Without nsys or a GPU only the latter. PYTHON names the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
out=benchmarks/results/profile
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then out=$1; shift; fi
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

if ! command -v nsys > /dev/null; then
  echo "no nsys: torch.profiler alone"
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: torch.profiler alone"
else
  # The decodes between cudaProfilerStart and cudaProfilerStop are recorded: not the start, the warm-up or the choice of algorithms.
  nsys profile --trace=cuda,nvtx,cudnn,cublas --sample=none --cpuctxsw=none --capture-range=cudaProfilerApi --capture-range-end=stop \
    --force-overwrite=true --output="$out/decode" "$python" benchmarks/profile_decode.py "$@" --capture || failed=1
  nsys stats --force-export=true --report nvtx_gpu_proj_sum --report nvtx_kern_sum --report cuda_gpu_kern_sum \
    "$out/decode.nsys-rep" | tee "$out/nsys.txt" || failed=1
fi
"$python" benchmarks/profile_decode.py "$@" --out "$out" || failed=1
exit $failed
