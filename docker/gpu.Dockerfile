# The image of a GPU host (NVIDIA driver and container toolkit on the machine). From the repository:
#
#   docker build --file=docker/gpu.Dockerfile --tag=lit_jax:gpu .
#   docker run --rm --gpus=all --ipc=host -e CONFIG=configs/digits_dit.py -e WORKDIR=/runs/digits -v "$PWD/runs:/runs" lit_jax:gpu
#
# It runs launch/train_command.sh: give it CONFIG and WORKDIR (-e), and flags of train.py as arguments. CUDA, cuDNN and
# NCCL come as wheels with jax; the machine gives the driver only.
FROM python:3.12-slim

# cuda12 needs driver 525 or newer, cuda13 needs 580 or newer.
ARG CUDA=cuda12
RUN useradd --create-home --uid 1000 lit

WORKDIR /lit_jax
COPY pyproject.toml README.md LICENSE NOTICE train.py convert_torch_ckpt.py sample.py ./
COPY configs configs
COPY assets assets
COPY launch launch
COPY lit_jax lit_jax
# One call, so that jax and its CUDA plugin fit each other.
RUN pip install --no-cache-dir --editable ".[gcs,${CUDA}]"
# A relative WORKDIR (runs/...) and compiled programs land here.
RUN chown lit /lit_jax

USER lit
ENV PYTHONUNBUFFERED=1 CONFIG=configs/lit_xl.py
ENTRYPOINT ["bash", "launch/train_command.sh"]
