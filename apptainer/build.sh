#!/usr/bin/env bash
# Builds the image that DILQUR_IMAGE names, from apptainer/dilqur.def.
#
#     apptainer/build.sh [IMAGE.sif] [--base BASE] [--force] [-- FLAGS OF apptainer build ...]
#
#     IMAGE.sif    dilqur.sif; --force replaces one that is there
#     --base       docker://NAME:TAG, or a Debian or Ubuntu as a folder or a .sif; the default is CUDA's image that dilqur.def names
#
# The image takes its name when its %test has passed. Variables PIP_... (PIP_INDEX_URL, PIP_FIND_LINKS ...) and TORCH_INDEX_URL hold for
# pip inside and are not kept in the image; a folder of wheels comes in with `-- --bind FOLDER:/mnt` and PIP_FIND_LINKS=/mnt.
# APPTAINER_TMPDIR: where there is room for the unpacked image, if /tmp is small.
set -euo pipefail
# shellcheck source=slurm/lib/messages.sh
source "$(dirname "${BASH_SOURCE[0]}")/../slurm/lib/messages.sh"
usage="usage: apptainer/build.sh [IMAGE.sif] [--base BASE] [--force] [-- FLAGS OF apptainer build ...]"
image='' base='' force=''
while (($#)); do
  case $1 in
    --base)
      (($# > 1)) || die "--base: which?"
      base=$2
      shift
      ;;
    --force) force=yes ;;
    --)
      shift
      break
      ;;
    *.sif)
      [[ -z $image ]] || die "$1: one image at a time"
      image=$(readlink -m "$1")
      ;;
    *) die "$1: $usage" ;;
  esac
  shift
done
[[ $base == docker://* || -z $base ]] || base=$(readlink -m "$base")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
image=${image:-$PWD/dilqur.sif}

# -- what would fail late -------------------------------------------------------------------------------------------------

command -v apptainer >/dev/null || die "apptainer is not on PATH: load its module, or build on a machine that has it"
[[ -n $force || ! -e $image ]] || die "$image: is there already; --force replaces it"
[[ -w $(dirname "$image") ]] || die "$(dirname "$image"): no such folder, or not writable"
flags=(--build-arg "COMMIT=$(git --no-optional-locks describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo unknown)")
# Somebody who is not root, or root of a container that may not do everything, works as root of a user namespace.
printf -v all '%016x' $(((1 << ($(</proc/sys/kernel/cap_last_cap) + 1)) - 1))
grep -q "^CapEff:[[:space:]]*$all$" /proc/self/status || flags+=(--fakeroot)
case $base in
  '') ;;
  docker://*) flags+=(--build-arg BOOTSTRAP=docker --build-arg "BASE=${base#docker://}") ;;
  *)
    [[ -f $base || -d $base/usr ]] || die "$base: no such base: docker://NAME:TAG, a folder with a root file system, or a .sif"
    if [[ -d $base && -n $(find "$base/dev" -mindepth 1 -print -quit 2>/dev/null) ]]; then
      die "$base/dev: empty it, the image gets the node's own: device files cannot be copied without root"
    fi
    flags+=(--build-arg BOOTSTRAP=localimage --build-arg "BASE=$base")
    ;;
esac
for variable in "${!PIP_@}" TORCH_INDEX_URL; do
  [[ -z ${!variable:-} ]] || export "APPTAINERENV_$variable=${!variable}"
done

# -- build ----------------------------------------------------------------------------------------------------------------

partial=${image%.sif}.partial-$$.sif
trap 'rm -f "$partial"' EXIT
apptainer build "${flags[@]}" "$@" "$partial" apptainer/dilqur.def || {
  echo "error: no image: apptainer build ended with $?" >&2
  exit 1
}
mv -f "$partial" "$image"
echo "$image: $(($(stat -c %s "$image") / 1000000)) MB"
