# shellcheck shell=bash
# Sourced first: what every script says a mistake with, and what jobs log with.

die() {
  echo "error: $*" >&2
  exit 2
}

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }
