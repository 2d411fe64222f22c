# shellcheck shell=bash
# Sourced by launch.sh: with DILQUR_IMAGE=dilqur.sif, launch.sh begins once more inside that image (docs/image.md). Sets nothing without.
#
# Seen inside, besides what the site's Apptainer shows of itself (home, /tmp, /dev with InfiniBand): this checkout, the node-local
# folders, where data/, models/ and runs/ lead to, and DILQUR_BINDS, `SOURCE[:TARGET[:ro]]` separated by blanks or commas.
[[ -n ${DILQUR_IMAGE:-} && -z ${APPTAINER_CONTAINER:-} ]] || return 0

[[ -e $DILQUR_IMAGE ]] || die "DILQUR_IMAGE: $DILQUR_IMAGE: not there on $HOSTNAME; apptainer/build.sh makes one"
command -v apptainer >/dev/null || die "DILQUR_IMAGE is set, but apptainer is not on PATH on $HOSTNAME: load its module in slurm/site.env"
checkout=$(pwd -P)
enter=(apptainer exec --pwd "$checkout" --bind "$checkout")
for folder in "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}" "${DILQUR_LOCAL_DIR:-/tmp}"; do
  [[ $folder/ == /tmp/* || ! -d $folder ]] || enter+=(--bind "$folder")
done
for folder in data models runs; do
  [[ ! -L $folder || ! -e $folder ]] || enter+=(--bind "$(readlink -f "$folder")")
done
binds=${DILQUR_BINDS:-}
read -ra binds <<<"${binds//,/ }"
for bind in "${binds[@]}"; do
  [[ -e ${bind%%:*} ]] || die "DILQUR_BINDS: ${bind%%:*}: not there on $HOSTNAME"
  enter+=(--bind "$bind")
done
if [[ -e /dev/nvidiactl ]] || nvidia-smi -L >/dev/null 2>&1; then
  enter+=(--nv)
fi

# Home is seen inside: what DeepSpeed compiled there, with another compiler, is not for this Python.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions}
# Slurm's commands are not inside: what they say comes along.
if ((${SLURM_STEP_NUM_NODES:-1} > 1)); then
  DILQUR_HOSTS=$(scontrol show hostnames "$SLURM_STEP_NODELIST") # a line each
  export DILQUR_HOSTS
fi
if [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_JOB_END_TIME:-} ]] && ((${SLURM_NODEID:-0} == 0)); then
  ends=$(squeue -h -j "$SLURM_JOB_ID" -O EndTime 2>/dev/null) && ends=$(date -d "$ends" +%s 2>/dev/null) && export SLURM_JOB_END_TIME=$ends
fi
# shellcheck disable=SC2154 # launch.sh has set program
exec "${enter[@]}" "$DILQUR_IMAGE" slurm/lib/launch.sh "$program" "$@"
