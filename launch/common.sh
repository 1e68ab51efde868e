# shellcheck shell=bash
# Sourced by the launchers. DRY_RUN=1 prints every command instead of running it; the lines can be pasted into a shell.

run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    print_command "$@"
  else
    "$@"
  fi
}

print_command() {
  local word line='' quote="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/$quote}'"
    fi
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# The train command as one string for a shell elsewhere: what the run needs of this shell's variables, then
# launch/SCRIPT and its flags.
train_line() {
  local script=$1 name line='env'
  shift
  for name in CONFIG WORKDIR LIT_JAX_DATA JAX_COMPILATION_CACHE_DIR LIBTPU_INIT_ARGS XLA_FLAGS; do
    if [[ -n ${!name:-} ]]; then
      line+=" $(printf '%q' "$name=${!name}")"
    fi
  done
  line+=" bash launch/$script"
  if (( $# )); then
    line+="$(printf ' %q' "$@")"
  fi
  printf '%s' "$line"
}
