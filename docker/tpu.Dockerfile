# The image of a TPU host (GKE, or a TPU VM with docker). From the repository:
#
#   docker build --file=docker/tpu.Dockerfile --tag=REGION-docker.pkg.dev/PROJECT/REPOSITORY/lit_jax:TAG .
#
# It runs launch/train_command.sh: give it CONFIG and WORKDIR (-e), and flags of train.py as arguments. Credentials come
# from the machine's service account; none belong in the image.
FROM python:3.12-slim

# RUN_AS=root for machines whose TPU devices belong to root alone.
ARG RUN_AS=lit
RUN useradd --create-home --uid 1000 lit

WORKDIR /lit_jax
COPY pyproject.toml README.md LICENSE NOTICE train.py convert_torch_ckpt.py sample.py ./
COPY configs configs
COPY assets assets
COPY launch launch
COPY lit_jax lit_jax
# One call, so that jax and libtpu fit each other.
RUN pip install --no-cache-dir --editable ".[gcs,tpu]"
# A relative WORKDIR (runs/...) and compiled programs land here.
RUN chown lit /lit_jax

USER ${RUN_AS}
ENV PYTHONUNBUFFERED=1 CONFIG=configs/lit_xl.py
ENTRYPOINT ["bash", "launch/train_command.sh"]
