#!/usr/bin/env bash
# Runs recipes/NAME/pipeline.txt, all of it, in order.
#
#     slurm/pipeline.sh NAME                 submit it: a job for each run of rows with the same batch file, one after the other
#     slurm/pipeline.sh NAME --dry-run       print the commands that would submit it
#     slurm/pipeline.sh NAME --local         run it here, without Slurm
#     slurm/pipeline.sh NAME --status        what is finished, running, stopped, not started
#     slurm/pipeline.sh NAME --from STAGE    begin there (with any of these)
#
# A stage that has finished says so and costs a second. Options of sbatch go into its SBATCH_* variables, e.g. SBATCH_ACCOUNT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/read_pipeline.sh
source slurm/read_site.sh
usage="usage: slurm/pipeline.sh NAME [--local | --dry-run | --status] [--from STAGE]"
recipe='' mode=submit from=''
while (($#)); do
  case $1 in
    --local | --dry-run | --status)
      [[ $mode == submit ]] || die "$1: --$mode is given already; $usage"
      mode=${1#--}
      ;;
    --from)
      (($# >= 2)) || die "--from: which stage? $usage"
      from=$2
      shift
      ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*) die "unknown option $1; $usage" ;;
    *)
      [[ -z $recipe ]] || die "one recipe at a time, not $recipe and $1; $usage"
      recipe=$1
      ;;
  esac
  shift
done
[[ -n $recipe ]] || die "$usage"
read_pipeline "$recipe"
first=0
if [[ -n $from ]]; then
  find_stage "$from"
  first=$row
fi
todo=("${stages[@]:first}")

# -- --status -------------------------------------------------------------------------------------------------------------

# What became of the stage in folder $1, in words.
state_of() {
  local folder=$1 ended seconds newest step
  if [[ -e $folder/manifest.json ]]; then
    ended=$(sed -n 's/^ "ended": "\(.*\)",*$/\1/p' "$folder/manifest.json") # one blank: a key of the outermost table
    seconds=$(sed -n 's/^ "seconds": \([0-9]*\).*$/\1/p' "$folder/manifest.json")
    echo "finished $ended, $seconds s"
    return
  fi
  newest=$(compgen -G "$folder/checkpoints/step-*/COMPLETE" | sort | tail -n 1 | xargs -r dirname | xargs -r basename) || true
  step=$(tail -n 1 "$folder/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\).*$/\1/p') || true
  # A shared lock: two people may look at once, and the program's own is not shared.
  if [[ -e $folder/.lock ]] && ! flock --shared --nonblock "$folder/.lock" true; then
    echo "running, $(<"$folder/.lock")${step:+, step $step}${newest:+, newest checkpoint $newest}$([[ ! -e $folder/STOP ]] || echo ", asked to stop")"
  elif [[ -e $folder/REQUEUE ]]; then
    echo "stopped, goes on from ${newest:-its start} when started again"
  elif [[ -e $folder/.lock || -n $newest ]]; then
    echo "interrupted${step:+ in step $((step + 1))}, goes on from ${newest:-its start} when started again"
  else
    echo "not started"
  fi
}

if [[ $mode == status ]]; then
  width=$(printf '%s\n' "${todo[@]}" | wc -L)
  for stage in "${todo[@]}"; do
    printf "%-${width}s  %s\n" "$stage" "$(state_of "runs/$name/$stage")"
  done
  exit 0
fi

# -- --local --------------------------------------------------------------------------------------------------------------

if [[ $mode == local ]]; then
  exec slurm/run_stages.sh "$name" local "${todo[@]}"
fi

# -- submit, --dry-run ----------------------------------------------------------------------------------------------------

# Rows that follow each other with the same batch file are one job: `blocks` has the stages, `files` the batch file.
blocks=() files=() finished=()
for ((row = first; row < ${#stages[@]}; row++)); do
  check_row "$row"
  [[ -f slurm/${batches[row]}.sbatch ]] || die "recipes/$name/pipeline.txt: ${stages[row]}: slurm/${batches[row]}.sbatch: no such batch file"
  if ((${#files[@]})) && [[ ${files[-1]} == "${batches[row]}" ]]; then
    blocks[-1]+=" ${stages[row]}"
  else
    blocks+=("${stages[row]}") files+=("${batches[row]}")
  fi
  if ((${#finished[@]} == row - first)) && [[ -e runs/$name/${stages[row]}/manifest.json ]]; then
    finished+=("${stages[row]}")
  fi
done
if ((${#finished[@]} && ${#finished[@]} < ${#todo[@]})); then
  echo "# finished already: ${finished[*]}; --from ${todo[${#finished[@]}]} leaves them out"
fi

# What --dry-run prints is a script that does the same.
folder=runs/$name jobs=()
if [[ $mode == dry-run ]]; then
  echo "mkdir -p $folder"
else
  mkdir -p "$folder" # Slurm starts no job whose output it cannot write
fi
for block in "${!blocks[@]}"; do
  read -ra members <<<"${blocks[block]}"
  command=(sbatch --parsable "--output=$folder/%x-%j.out")
  if ((block)); then
    # Without --kill-on-invalid-dep, jobs behind a failed one wait for ever.
    command+=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
  fi
  command+=("slurm/${files[block]}.sbatch" "$name" "${members[@]}")
  if [[ $mode == dry-run ]]; then
    echo "job$((block + 1))=\$(${command[*]})"
    jobs+=("\$job$((block + 1))")
  else
    job=$("${command[@]}") || {
      echo "error: sbatch slurm/${files[block]}.sbatch failed${jobs[*]:+; submitted before it: ${jobs[*]}}" >&2
      exit 1
    }
    jobs+=("${job%%;*}") # with several clusters: ID;CLUSTER
    echo "job ${jobs[-1]}: slurm/${files[block]}.sbatch: ${members[*]}"
  fi
done
