"""Describes a recipe without training it: `train.py --dry_run`."""
import json

import jax
from ml_collections import ConfigDict

from lit_jax.models.cost import format_parameters
from lit_jax.recipes.recipe import finalize
from lit_jax.runtime.errors import UserError
from lit_jax.training import setup
from lit_jax.training.from_teacher import complete
from lit_jax.training.mesh import format_shardings, make_mesh
from lit_jax.training.state import abstract_state


def describe_recipe(config: ConfigDict) -> str:
    """The resolved recipe, parameters with GMACs, sharding of the state, and missing inputs."""
    config = finalize(complete(config), jax.device_count())
    network = setup.build_network(config)
    state = abstract_state(network, setup.build_optimizer(config))
    sections = [('recipe', json.dumps(config.to_dict(), indent=1)),
                ('parameters', format_parameters(network)),
                (f'train state on {jax.device_count()} device(s)',
                 format_shardings(state, make_mesh(config.mesh.to_dict()), network.arch))]
    try:
        setup.check_inputs(config)
        missing = 'nothing: this recipe can run here'
    except UserError as error:
        missing = str(error)
    sections.append(('missing', missing))
    return '\n\n'.join(f'== {title}\n{body}' for title, body in sections)
