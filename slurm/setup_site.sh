#!/usr/bin/env bash
# Makes slurm/site.env: what is special about this cluster, as far as Slurm tells; the rest is asked.
#
#     slurm/setup_site.sh                        on a login node, from anywhere
#     slurm/setup_site.sh --yes KEY=VALUE ...    without a question: these values, and the guesses for the others
#
# A KEY is one of slurm/site.env.example. --force: even where there is a slurm/site.env. At the end `sbatch --test-only` says what
# Slurm thinks of every batch file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/lib/messages.sh
source slurm/lib/messages.sh
usage="usage: slurm/setup_site.sh [--yes] [--force] [KEY=VALUE ...]"
keys=$(sed -n 's/^#\(export \)\{0,1\}\([A-Z_]*\)=.*/\2/p' slurm/site.env.example)
declare -A value guess
yes='' force=''
for word; do
  case $word in
    --yes) yes=yes ;;
    --force) force=yes ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *=*)
      grep -qx "${word%%=*}" <<<"$keys" || die "${word%%=*}: no such key; slurm/site.env.example has: $(xargs <<<"$keys")"
      value[${word%%=*}]=${word#*=}
      ;;
    *) die "$word: $usage" ;;
  esac
done
[[ ! -e slurm/site.env || $force ]] || die "slurm/site.env is there already: edit it, or make it anew with --force"
command -v sbatch >/dev/null || die "no sbatch here: run this on a login node (without Slurm: slurm/pipeline.sh NAME --local)"

# -- what Slurm tells -----------------------------------------------------------------------------------------------------

config=$(scontrol show config) || die "scontrol show config failed: does Slurm answer here?"
setting() { sed -n "s/^$1 *= *//p" <<<"$config"; }

# The partition with the most GPUs, and the one for jobs without: the default one if it has no GPU.
gpu_partition='' gpu_limit='' gpu_type='' most=0 cpu_partition='' cpu_limit='' fallback='' fallback_limit=''
while IFS='|' read -r partition gres nodes limit up; do
  name=${partition%\*}
  [[ $up == up ]] || continue
  [[ -n $fallback && $partition != *\* ]] || fallback=$name fallback_limit=$limit
  if [[ $gres =~ gpu:(([^:,()]+):)?([0-9]+) ]]; then
    if ((nodes * BASH_REMATCH[3] > most)); then
      most=$((nodes * BASH_REMATCH[3])) gpu_partition=$name gpu_limit=$limit gpu_type=${BASH_REMATCH[2]}
    fi
  elif [[ -z $cpu_partition || $partition == *\* ]]; then
    cpu_partition=$name cpu_limit=$limit
  fi
done < <(sinfo -h -o '%P|%G|%D|%l|%a')
[[ -n $fallback ]] || die "sinfo shows no partition that is up"
[[ -n $cpu_partition ]] || cpu_partition=$fallback cpu_limit=$fallback_limit
guess[SBATCH_PARTITION]=${gpu_partition:-$fallback} guess[DILQUR_CPU_PARTITION]=$cpu_partition
[[ -z $gpu_type ]] || guess[DILQUR_GPUS]=--gres=gpu:$gpu_type:N
is_limit='^([0-9]+-)?[0-9]+:[0-9:]+$' # and not "infinite"
[[ ! $gpu_limit =~ $is_limit ]] || guess[DILQUR_MAX_TIME]=$gpu_limit
guess[DILQUR_CPU_MAX_TIME]=-
[[ ! $cpu_limit =~ $is_limit ]] || guess[DILQUR_CPU_MAX_TIME]=$cpu_limit
if [[ $(setting AccountingStorageType) != *none ]]; then
  guess[SBATCH_ACCOUNT]=$(sacctmgr -nP show assoc where "user=$(id -un)" format=Account 2>/dev/null | head -n 1) || true
fi

# -- what it does not ---------------------------------------------------------------------------------------------------

# From here on the text of slurm/site.env.example is the questionnaire, and its copy with the answers the result.
if [[ ! $yes ]]; then
  echo "For each key: Enter takes what stands in brackets, or leaves it out; - sets it to nothing."
fi
made=$(mktemp slurm/.site.env.XXXXXX)
trap 'rm -f "$made"' EXIT
while IFS= read -r line <&3; do
  if [[ $line =~ ^#(export )?([A-Z_]+)=$ ]]; then
    export=${BASH_REMATCH[1]} key=${BASH_REMATCH[2]}
    answer=${value[$key]-${guess[$key]:-}}
    if [[ ! $yes && ! -v value[$key] ]]; then
      read -rp "$key [$answer]: " typed || die "no answer: --yes takes the guesses"
      answer=${typed:-$answer}
    fi
    [[ $answer != - ]] || line="$export$key="
    answer=${answer//\\/\\\\} # in double quotes: $SLURM_TMPDIR means each node's own
    [[ -z $answer || $answer == - ]] || line="$export$key=\"${answer//\"/\\\"}\""
  elif [[ ! $yes && ($line == '# '* || -z $line) ]]; then
    echo "$line"
  fi
  echo "$line" >>"$made"
done 3<slurm/site.env.example
mv "$made" slurm/site.env
echo "slurm/site.env: $(grep -cE '^(export )?[A-Z_]+=' slurm/site.env) settings"

# -- what Slurm thinks of it ----------------------------------------------------------------------------------------------

source slurm/lib/read_site.sh
refused=0
for file in slurm/*.sbatch; do
  if said=$(sbatch --test-only "$file" 2>&1); then
    echo "ok    $file"
  else
    echo "FAIL  $file: $(sed -n 's/^.*\(error\|failure\): //p' <<<"$said" | head -n 1)"
    refused=1
  fi
done
((!refused)) || die "sbatch refuses some: edit slurm/site.env, then try again: source slurm/site.env; sbatch --test-only FILE"
