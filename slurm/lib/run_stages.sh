#!/usr/bin/env bash
# Runs the stages of one batch file, in order; the last line of every batch file. It alone holds the trap and the requeue.
#
#     slurm/lib/run_stages.sh NAME BATCH            rows of recipes/NAME/pipeline.txt whose batch file is BATCH,
#                                               up to the first that waits for an unfinished row of another one
#     slurm/lib/run_stages.sh NAME BATCH STAGE ...  these rows: what pipeline.sh puts into one job
#     slurm/lib/run_stages.sh NAME local [STAGE ...]    all rows (or these) on this machine, also inside an allocation
#
# Asked to stop (USR1 or TERM), it touches runs/NAME/STAGE/STOP; the program saves, writes REQUEUE and exits 0. After a USR1, the warning
# before the end of the time or a preemption, the job is requeued and begins again at the top: what is finished says so. A TERM alone is
# scancel's: the job ends. DILQUR_REQUEUE=0 where requeueing is forbidden: in a chain (`sbatch --array=1-10%1`) the next task goes on. FAILED in a
# stage's folder says why it ended otherwise. What jobs note about their starts, and what follows from it, is in job_notes.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source slurm/lib/messages.sh
source slurm/lib/read_site.sh
source slurm/lib/read_rows.sh
source slurm/lib/job_notes.sh
(($# >= 2)) || die "usage: slurm/lib/run_stages.sh NAME BATCH [STAGE ...]"
read_rows "$1"
batch=$2
shift 2
slurm='' job=''
if [[ $batch != local && -n ${SLURM_JOB_ID:-} ]]; then
  slurm=yes job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} # a chain is one job
fi

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
names=()
for row in "${rows[@]}"; do
  check_row "$row"
  names+=("${stages[row]}")
done

# -- one stage ------------------------------------------------------------------------------------------------------------

launcher=(slurm/lib/launch.sh)
if [[ $slurm ]]; then
  # --export and --cpus-per-task: a step inherits neither sbatch's --export=NONE nor its CPUs as one would want.
  # --cpu-bind=none: the one task of a node starts a process for each GPU, and these need all the cores.
  # --wait=0: nodes with nothing to do leave at once, and a site's WaitTime would end the rest.
  launcher=(srun --kill-on-bad-exit=1 --nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 --cpu-bind=none --wait=0 --export=ALL
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} slurm/lib/launch.sh)
fi

# Starts row $1 in the background: bash runs a trap only when the command in the foreground has ended.
start() {
  local -n words=words_$1
  # No standard input: srun would read this script's.
  "${launcher[@]}" "${programs[$1]}" "${words[@]}" </dev/null &
  pid=$!
}

# Before the first stage that trains, if the site wants it: a slow or a broken node is found now, not by a slow run.
checked=''
check_nodes() {
  [[ $slurm && ${DILQUR_CHECK_NODES:-0} == 1 && ! $checked ]] || return 0
  case ${programs[$1]} in scripts/cpt.py | scripts/mlm.py | scripts/sft.py) ;; *) return 0 ;; esac
  "${launcher[@]}" scripts/check_nodes.py </dev/null &
  pid=$!
  wait_for_end
  ((code == 0)) || fail "$1" "the job's nodes are not fit to train on (DILQUR_CHECK_NODES in slurm/site.env)"
  checked=yes
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

# -- the end of a job -----------------------------------------------------------------------------------------------------

no_progress="three restarts without a new checkpoint: too little time between start and warning for one (save_steps), \
or what its last lines say; not requeueing"

# More is to do, from row $1 on: requeue the job, or say what to type. Never returns.
leave_for_more() {
  local row more=() file=slurm/${SLURM_JOB_NAME:-$batch}.sbatch # cpt_p4d runs the rows of cpt_p5
  [[ -f $file ]] || file=slurm/$batch.sbatch
  for row in "${rows[@]}"; do
    ((row < $1)) || more+=("${stages[row]}")
  done
  mark_clean_exit
  if [[ $batch == local ]]; then
    say "to go on: slurm/pipeline.sh $name --local --from ${more[0]}"
  elif [[ -z $slurm ]]; then
    say "to go on: slurm/lib/run_stages.sh $name $batch ${more[*]}"
  elif [[ $terminated && ! $warned ]]; then
    say "job $SLURM_JOB_ID was cancelled; to go on: sbatch $file $name ${more[*]}"
    exit 1 # what waits for this job must not start
  elif ! made_progress "$1"; then
    fail "$1" "$no_progress"
  elif [[ -n ${SLURM_ARRAY_JOB_ID:-} && $SLURM_ARRAY_TASK_ID -lt $SLURM_ARRAY_TASK_MAX ]]; then
    say "the next task of job $SLURM_ARRAY_JOB_ID goes on with ${more[0]}"
  elif [[ ${DILQUR_REQUEUE:-1} == 0 || -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    say "to go on: sbatch $file $name ${more[*]}"
    exit 1
  else
    say "requeueing job $SLURM_JOB_ID, to go on with ${more[0]}"
    scontrol requeue "$SLURM_JOB_ID" || {
      say "job $SLURM_JOB_ID cannot be requeued (DILQUR_REQUEUE=0 in slurm/site.env: a chain of jobs instead); to go on:" \
        "sbatch $file $name ${more[*]}" >&2
      exit 1
    }
  fi
  exit 0
}

# The stage of row $1 ends the job with code $3 (1), because of $2: --status shows it. Of a chain, the other tasks would say the same of a
# mistake; anything else may have been the node's fault, and they try again as long as there is progress.
fail() {
  local code=${3:-1} log=''
  say "$title: $2" >&2
  [[ ! $slurm ]] || log=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *StdOut=//p')
  echo "$2${job:+ (job $job${log:+; see ${log#"$PWD/"}})}" >"runs/$name/${stages[$1]}/FAILED"
  [[ $code != 2 && $2 != "$no_progress" ]] || end_chain
  exit "$code"
}

end_chain() { [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; }

# -- one after the other --------------------------------------------------------------------------------------------------

if [[ $slurm ]]; then
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${SLURM_JOB_NODELIST:-?}"
  log_job
fi
stop='' pid='' number=0 warned='' terminated=''
for row in "${rows[@]}"; do
  stage=${stages[row]} folder=runs/$name/${stages[row]} title="[$((++number))/${#rows[@]}] ${stages[row]}"
  began=${EPOCHREALTIME/[.,]/} DILQUR_STAGE_STARTED=$EPOCHSECONDS
  export DILQUR_STAGE_STARTED
  mkdir -p "$folder"
  claim_stage "$row"
  rm -f "$folder/STOP" "$folder/REQUEUE" "$folder/FAILED"
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

  if [[ $slurm && ! -e $folder/manifest.json ]]; then
    made_progress "$row" || fail "$row" "$no_progress"
    avoid_lost_nodes
    check_nodes "$row"
    log_start "$row"
  fi
  say "$title: ${programs[row]}${flags[row]:+ ${flags[row]}}"
  start "$row"
  wait_for_end
  tenths=$(((${EPOCHREALTIME/[.,]/} - began) / 100000))
  took="$((tenths / 10)).$((tenths % 10)) s"
  if ((code != 0)); then
    # Cancelled, or a node of the job went down.
    [[ ! $terminated ]] || exit "$code"
    # A hang leaves a REQUEUE, and what was saved goes on.
    [[ -e $folder/REQUEUE ]] || fail "$row" "exit code $code after $took" "$code"
    say "$title: exit code $code after $took" >&2
  fi
  if [[ -e $folder/REQUEUE ]]; then
    say "$title: stopped after $took"
    if [[ $slurm && ! -e $folder/STOP && $(checkpoints "$stage") == "$before" ]]; then
      fail "$row" "no step was made and nobody asked to stop (stop_at_step or max_minutes reached, a hang, or less than five \
minutes of the job left at its start): requeueing would go on for ever"
    fi
    leave_for_more "$row"
  fi
  # The next stage looks here; so does --status.
  mark_clean_exit
  [[ -e $folder/manifest.json ]] ||
    fail "$row" "exit code 0, but $folder/manifest.json is not there: in a pipeline, leave run_dir and output_dir alone"
  say "$title: $took"
done
end_chain
[[ -z $waits ]] || say "the other $batch rows of recipes/$name/pipeline.txt wait for $waits"
