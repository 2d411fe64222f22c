#!/usr/bin/env bash
# Runs one part of a data stage (clean_corpus.py or pack_mmap.py): the last line of array_cpu.sbatch.
#
#     slurm/lib/run_part.sh NAME STAGE PARTS [PART]     PART counts from 0; the default is this task's place in its Slurm array
#
# Killed and started again it goes on where it was. The stage run as ever afterwards puts the parts together.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source slurm/lib/messages.sh
source slurm/lib/read_site.sh
source slurm/lib/read_rows.sh
(($# >= 3)) || die "usage: slurm/lib/run_part.sh NAME STAGE PARTS [PART]"
read_rows "$1"
find_stage "$2"
check_row "$row"
parts=$3 part=${4:-${SLURM_ARRAY_TASK_ID:-}}
[[ -n $part ]] || die "which part? Give it, or start this as a Slurm array: sbatch slurm/array_cpu.sbatch $name $2"
case ${programs[row]} in
  data_tools/clean_corpus.py | data_tools/pack_mmap.py) ;;
  *) die "recipes/$name/pipeline.txt: $2: ${programs[row]} does not work in parts" ;;
esac
declare -n words=words_$row
exec slurm/lib/launch.sh "${programs[row]}" "${words[@]}" --shard "$part" --of "$parts"
