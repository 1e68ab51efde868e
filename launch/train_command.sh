#!/usr/bin/env bash
# The one training command. Every launcher ends here, once for each process of the run:
#
#   CONFIG=configs/lit_xl.py WORKDIR=gs://BUCKET/runs/lit_xl launch/train_command.sh --config.train.batch_size=512
#
# Paths are relative to the repository. Exit statuses are those of train.py: 0 done, 1 error, 2 usage, 75 preempted and
# saved (start again), 76 another process was lost (start all again).
set -euo pipefail

CONFIG=${CONFIG:?a recipe, such as configs/lit_xl.py}
WORKDIR=${WORKDIR:?where the run lives: a folder that all hosts see, or gs://BUCKET/runs/NAME}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" train.py --config="$CONFIG" --workdir="$WORKDIR" "$@"
