"""A mixer named on the command line starts from its own defaults."""
import pytest

from lit_jax import recipes
from lit_jax.commands.mixer_flags import set_mixer, split_mixer
from lit_jax.recipes.recipe import architecture
from lit_jax.runtime.errors import UserError


def named(recipe='lit_s', **options):
    rest, mixer = split_mixer([('train.steps', '3'), *((f'model.mixer.{key}', text) for key, text in
                                                      options.items())])
    assert rest == [('train.steps', '3')]
    config = recipes.load_recipe(recipe)
    set_mixer(config, mixer)
    assert config.is_locked
    return config


def test_another_mixer_has_its_own_defaults_and_the_flags():
    config = named(name='dydila', projectors='5')
    assert config.model.mixer.to_dict() == {**recipes.mixer('dydila', heads=2, projectors=5).to_dict()}
    assert architecture(config)['mixer']['name'] == 'dydila'
    softmax = named(name='softmax', heads='6')
    assert softmax.model.mixer.to_dict() == recipes.mixer('softmax', heads=6).to_dict()


def test_the_same_mixer_keeps_the_options_of_the_recipe():
    config = named(recipe='digits_lit', name='linear', dwc_kernel='3')
    assert config.model.mixer.to_dict() == recipes.load_recipe('digits_lit').model.mixer.to_dict()
    assert split_mixer([('model.mixer.heads', '4')]) == ([('model.mixer.heads', '4')], {})


def test_a_recipe_without_a_mixer_and_an_unknown_one():
    with pytest.raises(UserError, match='has no model.mixer'):
        named(recipe='vae_tiny', name='softmax')
    with pytest.raises(UserError, match="unknown mixer 'cubic'"):
        named(name='cubic')
