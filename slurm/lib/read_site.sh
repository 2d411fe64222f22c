# shellcheck shell=bash
# Sourced by launch.sh, run_stages.sh and pipeline.sh: a site's own settings, from slurm/site.env if it is there.
if [[ -f slurm/site.env && -z ${APPTAINER_CONTAINER:-} ]]; then # inside an image its variables have come along
  # `module` and the like are not written for -eu
  set -a +eu
  # shellcheck source=/dev/null
  source slurm/site.env
  set +a -eu
fi

# Puts the environment in front that Python is to be from: an active one, DILQUR_VENV, or .venv.
find_python() {
  local venv=${DILQUR_VENV:-.venv}
  if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $venv/bin/python ]]; then
    [[ $venv == /* ]] || venv=$PWD/$venv
    export PATH=$venv/bin:$PATH
  fi
}

# Loads DILQUR_MODULES. A batch job's shell reads no login files, and may not know `module`.
load_modules() {
  local file modules
  set +eu # not written for them
  for file in /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
    # shellcheck source=/dev/null
    [[ $(type -t module) || ! -r $file ]] || source "$file"
  done
  read -ra modules <<<"$DILQUR_MODULES"
  module load "${modules[@]}" ||
    die "DILQUR_MODULES in slurm/site.env: module load $DILQUR_MODULES failed on $(hostname); module avail lists what there is"
  set -eu
}
