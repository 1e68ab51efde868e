"""Imports what a person adds from outside the package, named as package.module:NAME."""
import contextlib
import importlib
import traceback
import types
from collections.abc import Callable, Iterator

from lit_jax.runtime.errors import UserError, reason_of, shown, shown_name


def import_module_of(what: str, name: str, form: str) -> types.ModuleType:
    """The module of 'package.module:NAME', for names that a person gave, in a recipe or as a flag; files with
    weights and workdirs are data, and their names import nothing.

    what, form: for the message: 'the mixer', 'package.module:Class'. UserError if there is none."""
    module = name.partition(':')[0]
    try:
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:      # a module is a program: it may raise anything, and call sys.exit
        raise UserError(f'{what} {shown(name)} cannot be imported: {reason_of(error)}; give {form}, with the '
                        f'package installed or its folder in PYTHONPATH') from error


def import_function(what: str, name: str):
    """The function of 'package.module:function'; UserError if there is none."""
    form = 'package.module:function'
    function = getattr(import_module_of(what, name, form), name.partition(':')[2], None)
    if not callable(function):
        raise UserError(f'{what} {shown(name)} is no function of that module; give {form}')
    return function


def call_function(what: str, name: str, *args):
    """The result of 'package.module:function'; UserError, with the line, where it raises anything."""
    def explain(error: BaseException) -> str:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (f'{what} {shown(name)} does not open ({shown_name(last.filename)}, line {last.lineno}): '
                f'{reason_of(error)}')

    function = import_function(what, name)
    with explained(explain):
        return function(*args)


@contextlib.contextmanager
def explained(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Around a program of a person's own, which may raise anything and call sys.exit: a UserError with what
    `explain` says of it. Its own UserErrors pass, and so does Ctrl-C."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(explain(error)) from error
