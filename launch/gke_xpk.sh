#!/usr/bin/env bash
# A run on GKE through xpk (pip install xpk; it needs gcloud, kubectl and docker). docs/run/tpu.md walks through it.
#
#   launch/gke_xpk.sh cluster          create the cluster with one slice
#   launch/gke_xpk.sh image            build the image of this checkout and push it
#   launch/gke_xpk.sh train [FLAGS]    submit the run
#   launch/gke_xpk.sh list | stop | delete
#
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail

PROJECT=${PROJECT:?your Google Cloud project}
ZONE=${ZONE:?a zone that has the accelerator, such as us-west4-a}
CLUSTER=${CLUSTER:-lit-jax}
WORKLOAD=${WORKLOAD:-lit-xl}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
CAPACITY=${CAPACITY:---spot}          # or --on-demand, or --reservation=NAME
IMAGE=${IMAGE:-}                      # REGION-docker.pkg.dev/PROJECT/REPOSITORY/lit_jax:TAG; `image` and `train`
CONFIG=${CONFIG:-configs/lit_xl.py}
WORKDIR=${WORKDIR:-}                  # gs://BUCKET/runs/NAME; `train`
MAX_RESTARTS=${MAX_RESTARTS:-100}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
image_needed() { : "${IMAGE:?REGION-docker.pkg.dev/PROJECT/REPOSITORY/lit_jax:TAG}"; }

image() {
  image_needed
  run docker build --file=docker/tpu.Dockerfile --tag="$IMAGE" .
  run docker push "$IMAGE"
}

train() {
  image_needed
  : "${WORKDIR:?gs://BUCKET/runs/NAME: every host must see it}"
  # `exec`: TERM of a preempted node must reach python. xpk itself restarts on 127 to 255.
  run xpk workload create --workload="$WORKLOAD" "${where[@]}" --tpu-type="$TPU_TYPE" --docker-image="$IMAGE" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=75,76 --termination-grace-period-seconds=120 \
    --command="exec $(train_line train_command.sh "$@")"
}

case ${1:-} in
  cluster) run xpk cluster create "${where[@]}" --tpu-type="$TPU_TYPE" --num-slices=1 "$CAPACITY" ;;
  image) image ;;
  train) shift; train "$@" ;;
  list) run xpk workload list "${where[@]}" ;;
  stop) run xpk workload delete --workload="$WORKLOAD" "${where[@]}" ;;
  delete) run xpk cluster delete "${where[@]}" ;;
  *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
