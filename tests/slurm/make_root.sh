#!/usr/bin/env bash
# Makes Debian 13 with Slurm 24.11 and Apptainer 1.4 in a folder: a root file system for the lab's LAB_ROOT.
#
#     MIRROR=ADDRESS-OF-A-DEBIAN-MIRROR tests/slurm/make_root.sh FOLDER
#
# Needs root, debootstrap and network. Apptainer is packaged for Debian's unstable suite only and needs a libc of Debian 13 or newer:
# that one package comes from there.
set -euo pipefail

die() {
  echo "make_root.sh: $*" >&2
  exit 2
}

(($# == 1)) || die "usage: MIRROR=URL tests/slurm/make_root.sh FOLDER"
root=$(readlink -m "$1")
[[ -n ${MIRROR:-} ]] || die "set MIRROR to the URL of a Debian mirror"
[[ ! -e $root ]] || die "$root: is there already"
((EUID == 0)) || die "has to be root"
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"

debootstrap --variant=minbase trixie "$root" "$MIRROR"
printf 'deb %s %s main\n' "$MIRROR" trixie "$MIRROR" sid >"$root/etc/apt/sources.list"
printf 'Package: %s\nPin: release n=sid\nPin-Priority: %s\n\n' '*' 50 apptainer 600 >"$root/etc/apt/preferences.d/apptainer"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d" # an install starts no daemon
chmod +x "$root/usr/sbin/policy-rc.d"
# A mount namespace of its own: /proc in the new root goes with it.
# shellcheck disable=SC2016 # the inner shell expands it
unshare --mount bash -euc '
  mount -t proc proc "$0/proc"
  export DEBIAN_FRONTEND=noninteractive
  chroot "$0" apt-get -q -o Acquire::Check-Valid-Until=false update # the lists of a mirror that is a snapshot have expired
  chroot "$0" apt-get -q -y --no-install-recommends install \
    slurmctld slurmd slurm-client munge iproute2 procps hostname apptainer squashfuse fuse3 git libffi8
  chroot "$0" apt-get clean
  rm -rf "$0"/var/lib/apt/lists/*
' "$root"
# `apptainer build --fakeroot` needs them, also as root, where root has not got every capability.
echo root:100000:65536 | tee "$root/etc/subuid" >"$root/etc/subgid"
chroot "$root" apptainer --version
chroot "$root" slurmd -V
