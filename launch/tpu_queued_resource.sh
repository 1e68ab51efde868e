#!/usr/bin/env bash
# A TPU slice through a queued resource, and a run on all of its hosts. docs/run/tpu.md walks through it.
#
#   launch/tpu_queued_resource.sh create            ask for the slice
#   launch/tpu_queued_resource.sh wait              until it is there
#   launch/tpu_queued_resource.sh setup             this commit and its requirements, on every host
#   launch/tpu_queued_resource.sh train [FLAGS]     start (or go on with) the run on every host, detached
#   launch/tpu_queued_resource.sh log | status | stop | delete
#
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail

PROJECT=${PROJECT:?your Google Cloud project}
ZONE=${ZONE:?a zone that has the accelerator, such as us-west4-a}
TPU_NAME=${TPU_NAME:-lit-xl}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-1}                       # 1: cheaper, may be taken away at any time
CONFIG=${CONFIG:-configs/lit_xl.py}
WORKDIR=${WORKDIR:-}                  # gs://BUCKET/runs/NAME; needed by `train`
POLL_SECONDS=${POLL_SECONDS:-30}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

where=(--project="$PROJECT" --zone="$ZONE")

on_workers() {  # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

create() {
  local flags=(--node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
  if [[ $SPOT == 1 ]]; then flags+=(--spot); fi
  run gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}" "${flags[@]}"
}

wait_until_active() {
  local describe=(gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" '--format=value(state.state)') state
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    print_command "${describe[@]}"
    return
  fi
  until state=$("${describe[@]}"); [[ $state == ACTIVE ]]; do
    echo "$(date +%H:%M:%S) $TPU_NAME: $state"
    case $state in
      FAILED | SUSPENDED | SUSPENDING) echo "delete it and create it again" >&2; exit 1 ;;
    esac
    sleep "$POLL_SECONDS"
  done
  echo "$TPU_NAME is active"
}

setup() {
  run git archive --format=tar.gz --output=/tmp/lit_jax.tar.gz HEAD    # what is not committed stays behind
  run gcloud compute tpus tpu-vm scp /tmp/lit_jax.tar.gz "$TPU_NAME:" "${where[@]}" --worker=all
  # The images of the TPU hosts come with Python 3.10; uv brings 3.12 without root.
  # shellcheck disable=SC2016  # $HOME is that of the host
  on_workers all 'set -e; mkdir -p lit_jax; tar -xzf lit_jax.tar.gz -C lit_jax; cd lit_jax;'\
' python3 -m pip install --user --quiet uv; uv="$HOME/.local/bin/uv"; "$uv" venv --quiet --allow-existing --python 3.12 .venv;'\
' "$uv" pip install --quiet --python .venv/bin/python -e ".[gcs,tpu]"'
}

train() {
  : "${WORKDIR:?gs://BUCKET/runs/NAME: every host must see it}"
  # ssh returns once nothing holds its output: the run gets files instead, and a session of its own.
  on_workers all "cd lit_jax || exit; nohup setsid $(train_line restart_loop.sh "$@") >> train.log 2>&1 < /dev/null & sleep 1"
}

stop() {
  # shellcheck disable=SC2016  # the pid is that of the host
  on_workers all 'kill -TERM "$(cat lit_jax/train.pid)"'
}

case ${1:-} in
  create) create ;;
  wait) wait_until_active ;;
  setup) setup ;;
  train) shift; train "$@" ;;
  log) on_workers 0 'tail -n 40 -F lit_jax/train.log' ;;
  status) on_workers all 'tail -n 1 lit_jax/train.log' ;;
  stop) stop ;;
  delete) run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet ;;
  *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
