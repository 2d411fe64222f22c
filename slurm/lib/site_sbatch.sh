# shellcheck shell=bash
# Sourced by slurm/site.env: from then on `sbatch slurm/FILE.sbatch` asks for what this site wants. What is typed wins.
# The variables SBATCH_* could say most of it, but not a number of GPUs, nor what only some of the batch files need.

# Seconds of a time as HH:MM:SS or D-HH:MM:SS.
seconds_of() {
  local days=0 time=$1 hours minutes seconds
  [[ $time != *-* ]] || days=${time%%-*} time=${time#*-}
  IFS=: read -r hours minutes seconds <<<"$time"
  echo $((((10#$days * 24 + 10#$hours) * 60 + 10#${minutes:-0}) * 60 + 10#${seconds:-0}))
}

# Sets the array site_options for the batch file $1, and, for one without GPUs, SBATCH_*. The other words are those that were typed.
apply_site_options() {
  local file=$1 gpus time kind cpu limit=${DILQUR_MAX_TIME:-}
  gpus=$(sed -n 's/^#SBATCH --gres=gpu:\([0-9]*\)$/\1/p' "$file")
  time=$(sed -n 's/^#SBATCH --time=//p' "$file")
  read -ra site_options <<<"${DILQUR_OPTIONS:-}"
  if [[ -z $gpus ]]; then
    limit=${DILQUR_CPU_MAX_TIME-$limit}
    for kind in ACCOUNT PARTITION CONSTRAINT QOS; do
      cpu=DILQUR_CPU_$kind
      [[ -v $cpu ]] || continue
      if [[ -n ${!cpu} ]]; then export "SBATCH_$kind=${!cpu}"; else unset "SBATCH_$kind"; fi
    done
  elif [[ -n ${DILQUR_GPUS:-} && " ${*:2}" != *" --gres"* && " ${*:2}" != *" --gpus"* && " ${*:2}" != *" -G"* ]]; then
    [[ $DILQUR_GPUS == --gres=* ]] || site_options+=(--gres=none) # or both would count
    site_options+=("${DILQUR_GPUS%N}$gpus")
  fi
  [[ -z ${DILQUR_EXCLUDE:-} ]] || site_options+=("--exclude=$DILQUR_EXCLUDE")
  if [[ -n $limit && $(seconds_of "$time") -gt $(seconds_of "$limit") ]]; then
    site_options+=("--time=$limit")
  fi
  if [[ ${DILQUR_REQUEUE:-1} == 0 ]]; then
    site_options+=(--no-requeue)
    grep -q '^#SBATCH --array=' "$file" || ! grep -q '^#SBATCH --requeue' "$file" || site_options+=("--array=1-${DILQUR_CHAIN:-10}%1")
  fi
}

sbatch() (
  site_options=()
  for word; do
    if [[ $word == *.sbatch && -f $word ]]; then
      apply_site_options "$word" "$@"
      break
    fi
  done
  command sbatch "${site_options[@]}" "$@"
)

export -nf seconds_of apply_site_options sbatch # read_site.sh exports what site.env sets
