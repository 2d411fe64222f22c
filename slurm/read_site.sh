# shellcheck shell=bash
# Sourced by launch.sh, run_stages.sh and pipeline.sh: a site's own settings, from slurm/site.env if it is there.
if [[ -f slurm/site.env ]]; then
  # `module` and the like are not written for -eu
  set -a +eu
  # shellcheck source=/dev/null
  source slurm/site.env
  set +a -eu
fi
