"""Command lines, one file each, run by `lit-jax VERB` and by the scripts of a checkout."""
from pathlib import Path

from lit_jax.runtime import hub


def open_hub_model(name: str) -> Path:
    """The model folder of a model on the hub."""
    from lit_jax.deploy.hub_models import local_model
    return local_model(name)


hub.open_with(open_hub_model)
