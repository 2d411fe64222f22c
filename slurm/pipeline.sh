#!/usr/bin/env bash
# Runs recipes/NAME/pipeline.txt, all of it, in order.
#
#     slurm/pipeline.sh NAME                 submit it: a job for each run of rows with the same batch file, one after the other
#     slurm/pipeline.sh NAME --dry-run       print the commands that would submit it
#     slurm/pipeline.sh NAME --local         run it here, without Slurm
#     slurm/pipeline.sh NAME --status        every stage: its state, job, step, loss, tokens/s and time left, or why it ended
#     slurm/pipeline.sh NAME --from STAGE    begin there (with any of these)
#
# A stage that has finished says so and costs a second. What the cluster wants (account, partition, ...) is in slurm/site.env, which
# slurm/setup_site.sh makes; without it, sbatch's variables count, e.g. SBATCH_ACCOUNT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/lib/messages.sh
source slurm/lib/read_site.sh
source slurm/lib/read_rows.sh
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
read_rows "$recipe"
first=0
if [[ -n $from ]]; then
  find_stage "$from"
  first=$row
fi
todo=("${stages[@]:first}")

if [[ $mode == status ]]; then
  exec python -m dilqur.pipeline.status "$name" "${todo[@]}"
fi

# -- --local --------------------------------------------------------------------------------------------------------------

if [[ $mode == local ]]; then
  exec slurm/lib/run_stages.sh "$name" local "${todo[@]}"
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
folder=runs/$name jobs=() after=afterok
[[ ${DILQUR_REQUEUE:-1} != 0 ]] || after=afterany # a start of a chain may fail and the next go on; what waits looks for itself
if [[ $mode == dry-run ]]; then
  [[ ! -f slurm/site.env ]] || echo "source slurm/site.env"
  echo "mkdir -p $folder"
else
  command -v sbatch >/dev/null || die "no sbatch here; without Slurm: slurm/pipeline.sh $name --local"
  waiting=$(squeue --noheader --me --format=%F 2>/dev/null | sort -u | grep -xf <(cut -d' ' -f1 "$folder/jobs" 2>/dev/null)) || true
  [[ -z $waiting ]] || die "jobs of this recipe are in the queue already: slurm/pipeline.sh $name --status;" \
    "to submit it anew: scancel $(xargs <<<"$waiting")"
  [[ -f slurm/site.env ]] || echo "note: there is no slurm/site.env (slurm/setup_site.sh makes one): sbatch's own defaults are taken" >&2
  mkdir -p "$folder" # Slurm starts no job whose output it cannot write
fi
for block in "${!blocks[@]}"; do
  read -ra members <<<"${blocks[block]}"
  command=(sbatch --parsable "--output=$folder/%x-%j.out")
  if ((block)); then
    # Without --kill-on-invalid-dep, jobs behind a failed one wait for ever.
    command+=("--dependency=$after:${jobs[-1]}" --kill-on-invalid-dep=yes)
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
    echo "${jobs[-1]} ${files[block]} ${members[*]}" >>"$folder/jobs"
    echo "job ${jobs[-1]}: slurm/${files[block]}.sbatch: ${members[*]}"
  fi
done
