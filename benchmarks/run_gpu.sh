#!/usr/bin/env bash
# Measures the grids of benchmarks/grids/ on the GPUs of this node, and packs what came out into one file to send us:
#
#     benchmarks/run_gpu.sh                 one GPU
#     benchmarks/run_gpu.sh --gpus 8        the same on eight, under FSDP2 and DDP
#     benchmarks/run_gpu.sh --minutes 30    what is worth most first, and the rest left out when time is up
#     benchmarks/run_gpu.sh --dry-run       prints the commands
#     benchmarks/run_gpu.sh --toy           the same grids with a tiny model and few steps, on any machine, in minutes
#     --largest                             find the largest batch of each variant, too
#     --grids NAME,...                      only these; the path of a grid of your own is a name, too
#     --tests FILE,...                      other tests than those of the kernels
#     --output_dir DIR                      instead of runs/benchmark
#
# First it checks the node, and that the kernels of a GPU compute what plain ones do (with --minutes last, if there is time).
# On a shared node it takes the GPUs that CUDA_VISIBLE_DEVICES names. Nothing is fetched: weights and tokens are random.
# It needs 30 GB of disk, and goes on where it was when it is started again. What fails is named at the end and ends nothing else;
# the file is written even if it is interrupted. Exit code 1: a test, a row or a grid failed; a row whose package is not here is left out.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=1 minutes='' dry='' toy='' largest='' output='' tests='' grids=llama-1b,neobert-1024,neobert-4096,llama-1b-131072
usage() {
  sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"
}
from_there() { # a path, as the caller means it
  [[ $1 == /* ]] || printf '%s/' "$from"
  echo "$1"
}
while (($#)); do
  case $1 in
    --gpus) gpus=${2:-} && shift ;;
    --minutes) minutes=${2:-} && shift ;;
    --grids) grids=${2:-} && shift ;;
    --tests) tests=${2:-} && shift ;;
    --output_dir) output=${2:-} && shift ;;
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
for option in gpus minutes; do
  [[ ${!option} =~ ^[1-9][0-9]*$ || ($option == minutes && -z $minutes) ]] || {
    echo "error: --$option '${!option}': give a number of ${option/gpus/GPUs}" >&2
    exit 2
  }
done
if [[ -z $tests ]]; then
  tests=tests/unit/kernels/test_kernel_parity.py
  [[ -n $toy ]] || tests+=,tests/unit/training/test_step_phases.py
fi
IFS=, read -ra names <<<"$grids"
IFS=, read -ra test_files <<<"$tests"
for at in "${!names[@]}"; do
  case ${names[at]} in
    *.yaml) names[at]=$(from_there "${names[at]}") ;;
    *) names[at]=benchmarks/grids/${names[at]}.yaml ;;
  esac
  [[ -f ${names[at]} ]] || {
    echo "error: --grids: ${names[at]}: no such file; there are: $(cd benchmarks/grids && echo *.yaml)" >&2
    exit 2
  }
done
for at in "${!test_files[@]}"; do
  [[ -f ${test_files[at]} ]] || test_files[at]=$(from_there "${test_files[at]}")
done
out=runs/benchmark${toy:+-toy}
[[ -z $output ]] || out=$(from_there "$output")
# shellcheck source=/dev/null
source slurm/lib/read_site.sh
find_python
if [[ -z $toy && -z $dry ]] && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "error: no GPU here (nvidia-smi -L): run this on a node that has one, or try it with --toy" >&2
  exit 2
fi
[[ -n $dry ]] || mkdir -p "$out"

# -- what is run, and what becomes of it --------------------------------------------------------------------------------------

failed=() left_out=() results=() child='' stopped=''
run() { # in a process group of its own, so that it can be ended with all that it has started
  echo "+ $*"
  [[ -z $dry ]] || return 0
  set -m
  if [[ -n ${into:-} ]]; then "$@" >"$into" & else "$@" & fi
  child=$!
  set +m
  local code=0
  wait "$child" || code=$?
  child=''
  return "$code"
}

interrupted() {
  trap '' INT TERM
  stopped=$1
  echo "$1: ending what runs; what was measured is packed" >&2
  if [[ -n $child ]]; then
    kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" || true # benchmark.py writes its tables
  fi
  exit "$((128 + $2))"
}

finish() {
  local code=$? lines=() files=() line file
  trap '' INT TERM
  [[ -z $dry ]] || exit "$code"
  for file in "${results[@]}"; do
    [[ ! -f $out/$file ]] || files+=("$out/$file")
  done
  ((${#files[@]} == 0)) || mapfile -t lines < <(python -m dilqur.benchmarking.what_failed "${files[@]}")
  for line in "${lines[@]}"; do
    case $line in
      failed:*) failed+=("${line#failed: }") ;;
      *) left_out+=("${line#left out: }") ;;
    esac
  done
  {
    echo
    [[ -z $stopped ]] || echo "interrupted ($stopped): started again it goes on"
    ((${#left_out[@]} == 0)) || printf 'left out: %s\n' "${left_out[@]}"
    ((${#failed[@]} == 0)) || printf 'FAILED: %s\n' "${failed[@]}"
    echo "$((SECONDS / 60)) min, ${#failed[@]} failed, ${#left_out[@]} left out"
  } | tee "$out/summary.txt"
  mapfile -d '' files < <(cd "$out" && find . -maxdepth 3 -type f \( -name summary.txt -o -name check_nodes.txt -o -name gpu-tests.xml \
    -o -name benchmark.json -o -name benchmark.md -o -path './*/runs/*.log' -o -path './*/runs/*.json' \) -print0)
  tar -C "$out" -czf "$out/benchmark-$(hostname -s).tar.gz" "${files[@]}" || code=1
  echo "please send us $out/benchmark-$(hostname -s).tar.gz"
  ((code != 0 || ${#failed[@]} == 0)) || code=1
  exit "$code"
}
trap finish EXIT
trap 'interrupted SIGINT 2' INT
trap 'interrupted SIGTERM 15' TERM

# -- the grids: how long they will take ---------------------------------------------------------------------------------------

flags=()
if [[ -n $toy ]]; then # one run of each variant
  flags+=(--toy true --parity_steps 0 --profile false)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHINDUCTOR_CACHE_DIR
  TORCHINDUCTOR_CACHE_DIR=$(realpath -m "$out/inductor") # compiled once for all grids
fi
[[ -z $largest ]] || flags+=(--largest_batch 512)
grid() { # sets `command`, and `folder`, where in $out its results go
  local name
  name=$(basename "$1" .yaml)
  folder=$name-$gpus command=(python scripts/benchmark.py --config "$1" --output_dir "$out/$name-$gpus")
  if ((gpus > 1)); then
    command+=(--num_processes "$gpus" --strategies accelerate_configs/ddp.yaml)
    [[ $name == neobert-* ]] || command+=(accelerate_configs/fsdp2.yaml)
  fi
  command+=("${flags[@]}")
}
((gpus == 1)) || for at in "${!names[@]}"; do # a step of one card
  [[ ${names[at]} != */llama-1b-131072.yaml ]] || unset "names[at]"
done

seconds=() total=0 shown=''
if [[ -n $toy ]] || nvidia-smi -L >/dev/null 2>&1; then
  for name in "${names[@]}"; do
    grid "$name"
    said=$("${command[@]}" --check 2>&1) || true # what is wrong with it, its run says
    each=0
    [[ ! $said =~ about\ ([0-9]+)\.([0-9])\ min ]] || each=$((60 * BASH_REMATCH[1] + 6 * BASH_REMATCH[2]))
    seconds+=("$each") total=$((total + each)) shown+=", $(basename "$name" .yaml) $(((each + 59) / 60))"
  done
  echo "about $(((total + 59) / 60)) min${minutes:+, of which $minutes are given}: ${shown#, }"
  echo "(a guess: each run's start, and its steps at the planner's rate for this GPU; without the tests; corrected after the first grid)"
fi

# -- is this a machine to measure on ------------------------------------------------------------------------------------------

code=0
into=$out/check_nodes.txt run python scripts/check_nodes.py --num_processes "$gpus" || code=$?
[[ -n $dry ]] || cat "$out/check_nodes.txt"
if ((code != 0)); then
  mapfile -t lines < <(sed -nE 's/^FAIL +//; T; s/ +/: /; p' "$out/check_nodes.txt")
  ((${#lines[@]})) || lines=("check_nodes.py's exit code $code")
  failed+=("${lines[@]/#/node: }")
  if [[ -z $toy ]] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    failed+=("no GPU works for torch: nothing was measured")
    exit 1
  fi
fi

# -- do its kernels compute the same ------------------------------------------------------------------------------------------

time_left() { # seconds
  echo $((60 * minutes - SECONDS))
}
run_tests() {
  local code=0 within=()
  [[ -n $dry ]] || rm -f "$out/gpu-tests.xml"
  if ! python -c 'import pytest, hypothesis' 2>/dev/null; then
    echo "the tests of kernels are left out: pip install -r requirements-dev.txt"
    left_out+=("tests of kernels: pytest or hypothesis is not installed")
    return
  fi
  if [[ -n $minutes ]]; then
    (($(time_left) > 0)) || {
      left_out+=("tests of kernels: no time")
      return
    }
    within=(timeout --signal=INT "$(time_left)")
  fi
  results+=(gpu-tests.xml)
  run "${within[@]}" python -m pytest -q -rs --junitxml "$out/gpu-tests.xml" "${test_files[@]}" || code=$?
  if ((code == 124)); then
    left_out+=("tests of kernels: cut when time was up")
  elif ((code > 1)); then # 1: some failed, which the report names
    failed+=("tests of kernels: pytest's exit code $code")
  fi
}
[[ -n $minutes ]] || run_tests

# -- the grids ----------------------------------------------------------------------------------------------------------------

in_minutes() { # of seconds
  printf '%d.%02d' $(($1 / 60)) $(($1 % 60 * 100 / 60))
}
rest=$total last=${#names[@]} number=0
for name in "${names[@]}"; do
  grid "$name"
  if [[ -n $minutes ]]; then # half of what is left, and all of it for the last
    (($(time_left) > 0)) || {
      left_out+=("grid $folder: no time")
      continue
    }
    share=$(($(time_left) / (number + 1 < last ? 2 : 1)))
    command+=(--max_minutes "$(in_minutes $((share + 1)))" --cut_minutes "$(in_minutes $(($(time_left) + 1)))")
  fi
  began=$SECONDS code=0
  results+=("$folder/benchmark.json")
  run "${command[@]}" || code=$?
  ((code == 0)) || failed+=("grid $folder: exit code $code")
  if [[ -z $dry$minutes ]] && ((total > 0 && number + 1 < last)); then
    rest=$((rest - seconds[number]))
    if ((number == 0 && seconds[0] > 60)); then # what was guessed, by what it took
      rest=$((rest * (SECONDS - began) / seconds[0]))
      for at in "${!seconds[@]}"; do seconds[at]=$((seconds[at] * (SECONDS - began) / seconds[0])); done
    fi
    ((rest <= 0)) || echo "about $(((rest + 59) / 60)) min are left"
  fi
  number=$((number + 1))
done
[[ -z $minutes ]] || run_tests
