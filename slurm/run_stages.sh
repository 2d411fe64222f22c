#!/usr/bin/env bash
# Runs the stages of one batch file, in order; the last line of every batch file. It alone holds the trap and the requeue.
#
#     slurm/run_stages.sh NAME BATCH            rows of recipes/NAME/pipeline.txt whose batch file is BATCH,
#                                               up to the first that waits for an unfinished row of another one
#     slurm/run_stages.sh NAME BATCH STAGE ...  these rows: what pipeline.sh puts into one job
#     slurm/run_stages.sh NAME local [STAGE ...]    all rows (or these) on this machine, also inside an allocation
#
# Asked to stop (USR1 or TERM), it touches runs/NAME/STAGE/STOP; the program saves, writes REQUEUE and exits 0. After a USR1, the warning
# before the end of the time or a preemption, the job is requeued and begins again at the top: what is finished says so. A TERM alone is
# scancel's: the job ends. DILQUR_REQUEUE=0 where requeueing is forbidden (`sbatch --array=1-10%1` does the same there).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/read_pipeline.sh
source slurm/read_site.sh
(($# >= 2)) || die "usage: slurm/run_stages.sh NAME BATCH [STAGE ...]"
read_pipeline "$1"
batch=$2
shift 2
slurm=
[[ $batch == local || -z ${SLURM_JOB_ID:-} ]] || slurm=yes

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }

# -- which rows -----------------------------------------------------------------------------------------------------------

rows=() waits=
if (($#)); then
  for stage; do
    find_stage "$stage"
    rows+=("$row")
  done
else
  for row in "${!stages[@]}"; do
    if [[ $batch == local || ${batches[row]} == "$batch" ]]; then
      rows+=("$row")
    elif ((${#rows[@]})) && [[ ! -e runs/$name/${stages[row]}/manifest.json ]]; then
      waits=${stages[row]} # e.g. report is a prepare_cpu row as clean is, but needs all that is between them
      break
    fi
  done
  ((${#rows[@]})) || die "recipes/$name/pipeline.txt: no row's batch file is $batch; there are: $(printf '%s\n' "${batches[@]}" | sort -u | xargs)"
fi
for row in "${rows[@]}"; do
  check_row "$row"
done

# -- one stage ------------------------------------------------------------------------------------------------------------

launcher=(slurm/launch.sh)
if [[ $slurm ]]; then
  # --export and --cpus-per-task: a step inherits neither sbatch's --export=NONE nor its CPUs as one would want.
  # --cpu-bind=none: the one task of a node starts a process for each GPU, and these need all the cores.
  # --wait=0: nodes with nothing to do leave at once, and a site's WaitTime would end the rest.
  launcher=(srun --kill-on-bad-exit=1 --nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 --cpu-bind=none --wait=0 --export=ALL
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} slurm/launch.sh)
fi

# Starts row $1 in the background: bash runs a trap only when the command in the foreground has ended.
start() {
  local words
  row_arguments "$1"
  # No standard input: srun would read this script's.
  "${launcher[@]}" "${programs[$1]}" "${words[@]}" </dev/null &
  pid=$!
}

exec {never}<> <(:) # a pipe without anybody to write into it

# Sets code to the exit code of pid, once it has ended. A `wait` that a signal interrupts may give 138 or -1 for a child that
# ends just then (bash 5.2), so what is waited for has ended already. No `sleep`: bash forgets a Ctrl-C that comes in the moment
# in which a command in the foreground ends.
wait_for_end() {
  local naps=0 nap=0.05
  while kill -0 "$pid" 2>/dev/null; do
    ((++naps < 100)) || nap=1
    read -rt "$nap" -u "$never" || true
  done
  code=0
  wait "$pid" || code=$?
}

checkpoints() { compgen -G "runs/$name/$1/checkpoints/step-*/COMPLETE" || true; }

# More is to do, from row $1 on: requeue the job, or say what to type. Never returns.
leave_for_more() {
  local row left=() file=slurm/${SLURM_JOB_NAME:-$batch}.sbatch # cpt_p4d runs the rows of cpt_p5
  [[ -f $file ]] || file=slurm/$batch.sbatch
  for row in "${rows[@]}"; do
    ((row < $1)) || left+=("${stages[row]}")
  done
  if [[ $batch == local ]]; then
    say "to go on: slurm/pipeline.sh $name --local --from ${left[0]}"
  elif [[ -z $slurm ]]; then
    say "to go on: slurm/run_stages.sh $name $batch ${left[*]}"
  elif [[ $terminated && ! $warned ]]; then
    say "job $SLURM_JOB_ID was cancelled; to go on: sbatch $file $name ${left[*]}"
    exit 1 # what waits for this job must not start
  elif [[ ${DILQUR_REQUEUE:-1} == 0 ]]; then
    say "to go on: sbatch $file $name ${left[*]}"
  else
    say "requeueing job $SLURM_JOB_ID, to go on with ${left[0]}"
    scontrol requeue "$SLURM_JOB_ID" || {
      say "job $SLURM_JOB_ID cannot be requeued (DILQUR_REQUEUE=0: do not try); to go on: sbatch $file $name ${left[*]}" >&2
      exit 1 # what waits for this job must not start
    }
  fi
  exit 0
}

# -- one after the other --------------------------------------------------------------------------------------------------

[[ -z $slurm ]] || say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${SLURM_JOB_NODELIST:-?}"
stop='' pid='' number=0 warned='' terminated=''
for row in "${rows[@]}"; do
  stage=${stages[row]} folder=runs/$name/${stages[row]} title="[$((++number))/${#rows[@]}] ${stages[row]}"
  began=${EPOCHREALTIME/[.,]/} DILQUR_STAGE_STARTED=$EPOCHSECONDS
  export DILQUR_STAGE_STARTED
  mkdir -p "$folder"
  rm -f "$folder/STOP" "$folder/REQUEUE"
  before=$(checkpoints "$stage")
  asked=$stop stop=$folder/STOP
  if [[ -z $asked ]]; then
    # Only a touch, and only these: bash may lose a signal whose trap runs commands when CONT comes with it.
    trap ': >"$stop" || true; warned=yes' USR1
    trap ': >"$stop" || true; terminated=yes' TERM
    # A script's background commands ignore Ctrl-C: without this they would outlive it. By the table of jobs: pid is set a moment later.
    trap 'kill $(jobs -p) 2>/dev/null || exit 130' INT
  elif [[ -e $asked ]]; then
    say "asked to stop before $stage"
    leave_for_more "$row"
  fi

  say "$title: ${programs[row]}${flags[row]:+ ${flags[row]}}"
  start "$row"
  wait_for_end
  tenths=$(((${EPOCHREALTIME/[.,]/} - began) / 100000))
  took="$((tenths / 10)).$((tenths % 10)) s"
  if ((code != 0)); then
    say "$title: exit code $code after $took" >&2
    [[ -e $folder/REQUEUE ]] || exit "$code" # a hang leaves one, and what was saved goes on
  fi
  if [[ -e $folder/REQUEUE ]]; then
    say "$title: stopped after $took"
    if [[ $slurm && ! -e $folder/STOP && $(checkpoints "$stage") == "$before" ]]; then
      say "$title: no step was made and nobody asked to stop (stop_at_step or max_minutes reached, a hang, or less than five" \
        "minutes of the job left at its start): requeueing would go on for ever" >&2
      exit 1
    fi
    leave_for_more "$row"
  fi
  # The next stage looks here; so does --status.
  [[ -e $folder/manifest.json ]] || {
    say "$title: exit code 0, but $folder/manifest.json is not there: in a pipeline, leave run_dir and output_dir alone" >&2
    exit 1
  }
  say "$title: $took"
done
[[ -z $waits ]] || say "the other $batch rows of recipes/$name/pipeline.txt wait for $waits"
