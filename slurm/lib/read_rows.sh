# shellcheck shell=bash
# Sourced by run_stages.sh, run_part.sh and pipeline.sh: the rows of recipes/NAME/pipeline.txt, as dilqur/pipeline/rows.py reads them.
# shellcheck disable=SC2034  # the arrays are for those who source this

# Sets name (NAME without `recipes/` and a last `/`, so that the shell's completion of the folder can be used), the arrays stages,
# programs, batches, flags (one entry a row), and for each row words_ROW: what its program is started with.
read_rows() {
  local rows
  name='' stages=() programs=() batches=() flags=()
  find_python
  rows=$(python3 -m dilqur.pipeline.rows "$1") || exit 2
  eval "$rows"
}

# Sets row to the number of the stage $1.
find_stage() {
  for row in "${!stages[@]}"; do
    [[ ${stages[row]} != "$1" ]] || return 0
  done
  die "recipes/$name/pipeline.txt: no stage $1; there are: ${stages[*]}"
}

# Before any hour is spent: do the program and the recipe of row $1 exist?
check_row() {
  [[ -f ${programs[$1]} ]] || die "recipes/$name/pipeline.txt: ${stages[$1]}: ${programs[$1]}: no such program"
  local recipe=recipes/$name/${stages[$1]%%@*}.yaml
  [[ -f $recipe ]] || die "$recipe: no such file: the stage ${stages[$1]} reads the recipe of its name"
}
