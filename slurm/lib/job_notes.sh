# shellcheck shell=bash
# Sourced by run_stages.sh: what a job notes, for its later starts, for other jobs of the recipe, and for --status.
#
#     runs/NAME/jobs            a line for each job: JOB BATCH STAGE ...
#     runs/NAME/STAGE/.job      the job that is running the stage, or was the last to
#     runs/NAME/STAGE/.starts   a line for each start: JOB SECONDS NODES PROGRESS, and `left` after it unless it died
#
# It reads run_stages.sh's variables; job and slurm are empty outside of a job, and a chain is one job.
# shellcheck disable=SC2154

# A job that sbatch was typed for is not in the list yet.
log_job() {
  mkdir -p "runs/$name"
  grep -qs "^$job " "runs/$name/jobs" || echo "$job ${SLURM_JOB_NAME:-$batch} ${names[*]}" >>"runs/$name/jobs"
}

# The stage of row $1 begins.
log_start() { echo "$job $EPOCHSECONDS ${SLURM_JOB_NODELIST:-?} $(progress "$1")" >>"$folder/.starts"; }

# Ends the job if another one is running the stage of row $1; from now on it is this one's. Where files can be locked the programs refuse as
# well, but not every Lustre can.
claim_stage() {
  local owner=runs/$name/${stages[$1]}/.job other
  [[ $slurm ]] || return 0
  if ! (set -o noclobber && echo "$job" >"$owner") 2>/dev/null; then
    other=$(<"$owner")
    if [[ $other != "$job" && -n $(squeue --noheader --states=RUNNING --jobs="$other" 2>/dev/null) ]]; then
      die "${stages[$1]}: job $other is running it; this one, $job, ends here (scancel $other, to submit it anew)"
    fi
    echo "$job" >"$owner"
  fi
}

# How far the stage of row $1 is: a word that differs once there is more for a later start to go on from.
progress() {
  local newest
  newest=$(checkpoints "${stages[$1]}" | sort | tail -n 1)
  case ${programs[$1]} in
    scripts/cpt.py | scripts/mlm.py) basename "$(dirname "${newest:-./none/COMPLETE}")" ;;
    *) find "runs/$name/${stages[$1]}" -type f ! -name '.*' ! -name STOP ! -name REQUEUE -printf '%s\n' | awk '{n++; size += $1} END {print n + 0 "-files-" size + 0}' ;;
  esac
}

# Fails if the last three starts of this job found the stage of row $1 as it is now.
made_progress() {
  local now
  now=$(progress "$1")
  (($(tail -n 3 "runs/$name/${stages[$1]}/.starts" 2>/dev/null | awk -v job="$job" -v now="$now" '$1 == job && $4 == now' | wc -l) < 3))
}

# Notes that a start ended in good order.
mark_clean_exit() { [[ ! $slurm || ! -f $folder/.starts ]] || sed -i '$s/$/ left/' "$folder/.starts"; }

# If the last start died, and one of its nodes that is this job's again has been down since: back into the queue, to wait for others.
avoid_lost_nodes() {
  local last seconds nodes ended node since lost=() free
  [[ $slurm && ${SLURM_RESTART_COUNT:-0} -gt 0 && ${DILQUR_REQUEUE:-1} != 0 ]] || return 0
  read -r last seconds nodes _ ended < <(tail -n 1 "$folder/.starts" 2>/dev/null) || return 0
  [[ $last == "$job" && -z $ended ]] || return 0
  for node in $(comm -12 <(scontrol show hostnames "$nodes" | sort) <(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort)); do
    since=$(scontrol show node "$node" | sed -n 's/.*SlurmdStartTime=\([^ ]*\).*/\1/p')
    since=$(date -d "$since" +%s 2>/dev/null) || continue
    ((since <= seconds)) || lost+=("$node")
  done
  ((${#lost[@]})) || return 0
  free=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,allocated,mixed,completing -o %N | sort -u | wc -l)
  if ((free - ${#lost[@]} < SLURM_JOB_NUM_NODES)); then
    say "${lost[*]} went down during the last start; there are too few other nodes to avoid it"
    return 0
  fi
  say "${lost[*]} went down during the last start: requeueing job $SLURM_JOB_ID to run without"
  mark_clean_exit
  trap '' TERM # it comes with the requeue, to scontrol as well, and only a job that waits can be told which nodes to avoid
  scontrol requeue "$SLURM_JOB_ID"
  for _ in 1 2 3 4 5; do
    ! scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(IFS=, && echo "${lost[*]}")" || break
  done
  exit 0
}
