"""Imports what a person adds from outside the package, named as package.module:NAME."""
import importlib
import types

from lit_jax.runtime.errors import UserError, reason_of, shown


def import_module_of(what: str, name: str, form: str) -> types.ModuleType:
    """The module of 'package.module:NAME', for names that a person gave, in a recipe or as a flag; files with
    weights and workdirs are data, and their names import nothing.

    what, form: for the message: 'the mixer', 'package.module:Class'. UserError if there is none."""
    module = name.partition(':')[0]
    try:
        return importlib.import_module(module)
    except Exception as error:      # a module is a program: it may raise anything
        raise UserError(f'{what} {shown(name)} cannot be imported: {reason_of(error)}; give {form}, with the '
                        f'package installed or its folder in PYTHONPATH') from error


def import_function(what: str, name: str):
    """The function of 'package.module:function'; UserError if there is none."""
    form = 'package.module:function'
    function = getattr(import_module_of(what, name, form), name.partition(':')[2], None)
    if not callable(function):
        raise UserError(f'{what} {shown(name)} is no function of that module; give {form}')
    return function
