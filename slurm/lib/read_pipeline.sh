# shellcheck shell=bash
# Sourced by run_stages.sh and pipeline.sh: reads recipes/NAME/pipeline.txt, as dilqur/pipeline/stage.py does.
# A line: stage, program, batch file, flags; flags may be quoted as in a shell; `#` begins a comment.
# STAGE reads STAGE.yaml, and RECIPE@VARIANT reads RECIPE.yaml; the row's flags win over it.
# shellcheck disable=SC2034  # the arrays are for those who source this

# Sets the arrays stages, programs, batches, flags (one entry a row), and name: NAME without `recipes/` and a last `/`,
# so that the shell's completion of the folder can be used.
read_pipeline() {
  local stage program batch rest table
  name=${1#recipes/} name=${name%/}
  table=recipes/$name/pipeline.txt
  [[ -f $table ]] || die "$table: no such file; recipes with one: $(compgen -G 'recipes/*/pipeline.txt' | cut -d/ -f2 | xargs)"
  stages=() programs=() batches=() flags=()
  while read -r stage program batch rest || [[ -n $stage ]]; do
    [[ -n $stage ]] || continue
    [[ -n $batch ]] || die "$table: $stage: a line is: stage, program, batch file, flags"
    [[ $stage =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*(@[A-Za-z0-9_.@-]+)?$ ]] ||
      die "$table: the stage $stage gives a folder its name: take letters, digits and . _ -, and for a variant @ after its recipe's name"
    stages+=("$stage") programs+=("$program") batches+=("$batch") flags+=("$rest")
  done < <(sed -e 's/#.*//' -e 's/\r$//' "$table")
  ((${#stages[@]})) || die "$table: no stage in it"
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

# Sets the array words to what row $1's program is started with: its recipe, the name of a variant, and the row's flags.
row_arguments() {
  split_words "${flags[$1]}"
  [[ ${stages[$1]} != *@* ]] || words=(--stage "${stages[$1]}" "${words[@]}")
  words=(--config "recipes/$name/${stages[$1]%%@*}.yaml" "${words[@]}")
}

# Sets the array words: $1 split as a shell would, without running anything in it (xargs knows quotes, and no `$(...)`).
split_words() {
  words=()
  [[ -n $1 ]] || return 0
  mapfile -d '' -t words < <(xargs printf '%s\0' <<<"$1")
  wait "$!" || die "recipes/$name/pipeline.txt: flags $1: a quote is not closed"
}
