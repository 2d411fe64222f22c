#!/usr/bin/env bash
# Measures the grids of benchmarks/grids/ on the GPUs of this node, and packs what came out into one file to send us:
#
#     benchmarks/run_gpu.sh                 one GPU
#     benchmarks/run_gpu.sh --gpus 8        the same on eight, under FSDP2 and DDP
#     benchmarks/run_gpu.sh --dry-run       prints the commands
#     benchmarks/run_gpu.sh --toy           the same grids with a tiny model and few steps, on any machine, in minutes
#     --largest                             find the largest batch of each variant, too
#     --grids NAME,...                      only these
#
# First it checks the node, and that the kernels of a GPU compute what plain ones do. Nothing is fetched: weights and tokens are random.
# It needs 30 GB of disk in runs/, and goes on where it was when it is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=1 dry='' toy='' largest='' grids=llama-1b,neobert-1024,neobert-4096,llama-1b-131072
usage() {
  sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"
}
while (($#)); do
  case $1 in
    --gpus) gpus=${2:-} && shift ;;
    --grids) grids=${2:-} && shift ;;
    --dry-run) dry=1 ;;
    --toy) toy=1 ;;
    --largest) largest=1 ;;
    --help) usage && exit 0 ;;
    *)
      echo "error: $1: no such option; $0 --help lists them" >&2
      exit 2
      ;;
  esac
  shift
done
[[ $gpus =~ ^[1-9][0-9]*$ ]] || {
  echo "error: --gpus '$gpus': give a number of GPUs" >&2
  exit 2
}
source slurm/read_site.sh
find_python
run() {
  echo "+ $*"
  [[ -n $dry ]] || "$@"
}

# -- is this a machine to measure on ------------------------------------------------------------------------------------------

if [[ -z $toy && -z $dry ]] && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "error: no GPU here (nvidia-smi -L): run this on a node that has one, or try it with --toy" >&2
  exit 2
fi
run python scripts/check_nodes.py --num_processes "$gpus"

# -- do its kernels compute the same ------------------------------------------------------------------------------------------

out=runs/benchmark${toy:+-toy}
if [[ -n $toy ]] || ! python -c 'import pytest' 2>/dev/null; then
  echo "the tests of kernels on a GPU are left out: they want a GPU, and pip install -r requirements-dev.txt"
else
  [[ -n $dry ]] || mkdir -p "$out"
  run python -m pytest -q -rs --junitxml "$out/gpu-tests.xml" tests/library/test_kernel_parity.py tests/library/test_step_phases.py
fi

# -- the grids ----------------------------------------------------------------------------------------------------------------

flags=()
if [[ -n $toy ]]; then # one run of each variant
  flags+=(--toy true --parity_steps 0 --profile false)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHINDUCTOR_CACHE_DIR=$PWD/$out/inductor # compiled once for all grids
fi
[[ -z $largest ]] || flags+=(--largest_batch 512)
IFS=, read -ra names <<<"$grids"
done_=()
[[ ! -e $out/gpu-tests.xml ]] || done_+=(gpu-tests.xml)
for name in "${names[@]}"; do
  where=()
  if ((gpus > 1)); then
    [[ $name != llama-1b-131072 ]] || continue # a step of one card
    where=(--num_processes "$gpus" --strategies accelerate_configs/ddp.yaml)
    [[ $name == neobert-* ]] || where+=(accelerate_configs/fsdp2.yaml)
  fi
  run python scripts/benchmark.py --config "benchmarks/grids/$name.yaml" --output_dir "$out/$name-$gpus" "${where[@]}" "${flags[@]}"
  done_+=("$name-$gpus/benchmark.json" "$name-$gpus/benchmark.md")
done

# -- to send ------------------------------------------------------------------------------------------------------------------

run tar -C "$out" -czf "$out/benchmark-$(hostname -s).tar.gz" "${done_[@]}"
echo "please send us $out/benchmark-$(hostname -s).tar.gz"
