"""Fields of a recipe that are set from texts."""
import pytest
from ml_collections import ConfigDict

from lit_jax.commands.recipe_flags import split_arguments
from lit_jax.recipes.override import override
from lit_jax.recipes.recipe import load_recipe
from lit_jax.runtime.errors import UserError


def recipe() -> ConfigDict:
    return ConfigDict({'name': '', 'train': {'steps': 10, 'rate': 0.1, 'ema': False}, 'eval': {'steps': 5},
                       'model': {'mixer': {'name': 'softmax', 'heads': 4}, 'stages': ()}}).lock()


@pytest.mark.parametrize('field, text, value', [
    ('train.steps', '1e5', 100_000), ('train.rate', '3', 3.0), ('train.ema', 'true', True),
    ('train.ema', True, True), ('name', '1e5', '1e5'), ('model.stages', '2,', (2,)),
    ('model.stages', '1,2', (1, 2)), ('model.mixer.name', 'linear', 'linear')])
def test_a_text_becomes_a_value_of_the_fields_type(field, text, value):
    config = recipe()
    override(config, field, text)
    for name in field.split('.'):
        config = config[name]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize('field, text, message', [
    ('train.step', '5', r'did you mean --config\.train\.steps\?'),
    ('steps', '5', r'did you mean --config\.train\.steps or --config\.eval\.steps\?'),
    ('train.steps', '1.5', 'expected a whole number'), ('train.steps', 'inf', 'expected a whole number'),
    ('train.ema', 'maybe', 'expected True or False'),
    ('train.steps', True, r'train\.steps needs a value: the recipe has 10'), ('name', False, 'needs a value'),
    ('model.stages', '2', 'say what it counts: last:2, first:2 or every:2 .* "2,", block 2 alone'),
    ('model.mixer', 'linear', r'is a section, .* as in --config\.model\.mixer\.name=linear')])
def test_what_cannot_be_set_is_answered_with_what_was_meant(field, text, message):
    with pytest.raises(UserError, match=message):
        override(recipe(), field, text)


def test_words_of_a_command_line_become_a_recipe_and_its_changes():
    words = ['--config', 'a', '--config.b.c=1=2', '--config.d', '-1', '--noconfig.e', '--config.f']
    assert split_arguments(words) == ('a', [('b.c', '1=2'), ('d', '-1'), ('e', False), ('f', True)])
    for words, message in ((['lit_b'], 'did you mean --config=lit_b'), ([], 'no recipe given'),
                           (['--config=a', 'train.steps=5'], r'did you mean --config\.train\.steps=5')):
        with pytest.raises(UserError, match=message):
            split_arguments(words)


def test_short_forms_of_stages_are_words():
    config = recipe()
    override(config, 'model.stages', 'first:1,last:2')
    assert config.model.stages == ('first:1', 'last:2')


def test_open_fields_of_a_student_take_texts_of_their_type():
    """They have no value until the teacher is read."""
    config = load_recipe('student:linear')
    for field, text, value in (('data.name', 'folder', 'folder'), ('data.image_size', '64', 64),
                               ('latent.scale', '1', 1.0), ('data.flip', 'no', False),
                               ('model.depth', '1e1', 10), ('inherit.path', '', '')):
        override(config, field, text)
        section, name = field.split('.')
        assert config[section][name] == value and type(config[section][name]) is type(value)
    with pytest.raises(UserError, match=r'model\.depth=.two.: expected a whole number'):
        override(config, 'model.depth', 'two')
