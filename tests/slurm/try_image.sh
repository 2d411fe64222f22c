#!/usr/bin/env bash
# The image for real, without a GPU: built by Apptainer from apptainer/dilqur.def on a plain Debian, tested, and jobs of a real Slurm in it.
#
#     MIRROR=ADDRESS-OF-A-DEBIAN-MIRROR tests/slurm/try_image.sh FOLDER [FLAGS OF apptainer build ...]
#
# FOLDER (10 GB) gets root/, Debian 13 with Slurm and Apptainer; base/, Debian 12 with nothing; and dilqur.sif. What is there already is
# taken. Needs root, debootstrap, what the lab needs, and an environment with pytest. Variables PIP_... hold for the build; LAB_SHARE
# names folders of this machine that FLAGS speak of.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
(($#)) && [[ -n ${MIRROR:-} ]] || {
  echo "usage: MIRROR=URL tests/slurm/try_image.sh FOLDER [FLAGS OF apptainer build ...]" >&2
  exit 2
}
mkdir -p "$1/tmp"
folder=$(readlink -f "$1")
shift

export LAB_DIR=$folder/lab LAB_ROOT=$folder/root APPTAINER_TMPDIR=$folder/tmp
LAB_SHARE=$PWD:$(git rev-parse --path-format=absolute --git-common-dir):$folder${LAB_SHARE:+:$LAB_SHARE}
export LAB_SHARE

seconds() { # WHAT CMD …
  local began=$SECONDS
  "${@:2}"
  echo "== $1: $((SECONDS - began)) s"
}

root() { tests/slurm/make_root.sh "$folder/root" >/dev/null; }
base() {
  debootstrap --variant=minbase bookworm "$folder/base" "$MIRROR" >/dev/null
  find "$folder/base/dev" -mindepth 1 -delete
}

[[ -d $folder/root ]] || seconds "a root with Slurm and Apptainer" root
[[ -d $folder/base ]] || seconds "a base" base
image=$folder/dilqur.sif
[[ -f $image ]] || seconds "build with its test" tests/slurm/lab root apptainer/build.sh "$image" --base "$folder/base" -- "$@"

export APPTAINER_NO_PRIVS=1 # root of a machine that has not got every capability
tests/slurm/lab root apptainer inspect "$image"
seconds "apptainer test" tests/slurm/lab root apptainer test "$image"
for try in 1 2 3; do
  TIMEFORMAT="== start of a command in the image, $try: %R s"
  time tests/slurm/lab root apptainer exec "$image" true
done
unset LAB_DIR LAB_ROOT LAB_SHARE
DILQUR_LAB_ROOT=$folder/root DILQUR_LAB_IMAGE=$image pytest -v --durations=0 tests/slurm/test_image.py -k inside_the_image
