#!/usr/bin/env bash
# Runs train_command.sh on this host and starts it again after a preemption (75), a lost peer (76) or a crash by signal
# (128 and above; 134 is jax.distributed giving up a peer). A wrong recipe (1) or command (2) ends it, and so does TERM
# to this script, which lets the run save first. For hosts without a scheduler that restarts jobs.
set -uo pipefail

MAX_RESTARTS=${MAX_RESTARTS:-100}
RESTART_PAUSE=${RESTART_PAUSE:-15}    # seconds, so that the other hosts notice as well

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ -e train.pid ]] && kill -0 "$(cat train.pid)" 2>/dev/null; then
  echo "process $(cat train.pid) is running the loop on this host already" >&2
  exit 2
fi
echo $$ > train.pid
child='' stopping=''
on_term() {
  stopping=1
  if [[ -n $child ]]; then kill -TERM "$child"; fi
}
trap on_term TERM INT

for (( attempt = 0; ; attempt++ )); do
  bash launch/train_command.sh "$@" &
  child=$!
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do    # TERM to this script interrupts `wait`, not the run
    wait "$child"
    status=$?
  done
  child=''
  if [[ -n $stopping ]] || (( status < 75 || attempt >= MAX_RESTARTS )); then
    echo "train.py ended with $status; not started again" >&2
    exit "$status"
  fi
  echo "train.py ended with $status; restart $((attempt + 1)) of $MAX_RESTARTS in $RESTART_PAUSE s" >&2
  sleep "$RESTART_PAUSE" &
  wait $!
  if [[ -n $stopping ]]; then exit 75; fi
done
