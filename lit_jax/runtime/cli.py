"""What the scripts share: logging, clean errors, exit statuses, and the recipe flag.

Exit statuses: 0 done, 1 error, 2 wrong usage, 75 stopped on request with everything saved (start it again),
76 another process of the run is gone (start all of them again).
"""
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from absl import flags
from ml_collections import ConfigDict, config_flags

from lit_jax.runtime import virtual_devices
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import Options, Processes, parse_beside


def setup_logging(stream: TextIO | None = None) -> None:
    """Our own lines to `stream` (default: stderr) with a clock; other packages only from WARNING on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S'))
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger('lit_jax').setLevel(logging.INFO)


def name_process(index: int, count: int) -> None:
    """In a run of several processes only process 0 tells what goes well; every line of another carries its
    number."""
    if count > 1:
        clock = '%(asctime)s' if index == 0 else f'%(asctime)s [process {index}]'
        logging.getLogger().handlers[0].setFormatter(
            logging.Formatter(f'{clock} %(message)s', datefmt='%H:%M:%S'))
        logging.getLogger('lit_jax').setLevel(logging.INFO if index == 0 else logging.WARNING)


def join(options: Processes) -> bool:
    """Makes this process one of the run, if there are several; returns whether it is the one that reports."""
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.runtime import cluster
    cluster.join(options.coordinator, options.num_processes, options.process_id, options.heartbeat_seconds)
    index, count = cluster.process()
    name_process(index, count)
    return index == 0


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a UserError becomes one message and status 1, without a
    traceback."""
    setup_logging()
    virtual_devices.give_threads()
    try:
        status = main()
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted')
    except BrokenPipeError:      # `... --dry_run | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status or 0)


def _check_recipe_file(argv: Sequence[str]) -> None:
    """config_flags hides a missing file behind the first access to the recipe: look for it before."""
    for argument in argv:
        name, _, path = argument.partition('=')
        if name in ('--config', '-config') and path and not Path(path.split(':')[0]).is_file():
            raise UserError(f'the recipe {path} does not exist; recipes are the files in configs/')


def _describe_recipes() -> str:
    """The part of a help that is about --config, with the recipes there are."""
    lines = ['recipe:',
             '  --config=FILE[:NAME]   the recipe, a file; NAME: one of several in the file',
             '  --config.FIELD=VALUE   overrides a field, for example --config.train.batch_size=64;',
             '                         train.py --config=FILE --dry_run prints all fields', '',
             'recipes in configs/:']
    for path in sorted((Path(__file__).parents[2] / 'configs').rglob('*.py')):
        title = ' '.join(path.read_text(encoding='utf-8').split('"""')[1].split('\n\n')[0].split())
        name = path.name if path.parent.name == 'configs' else f'{path.parent.name}/{path.name}'
        lines.append(f'  {name:22} {textwrap.shorten(title, 84, placeholder=" ...")}')
    return '\n'.join(lines)


def parse_recipe(kind: type[Options], description: str | None = None) -> tuple[ConfigDict, Options]:
    """The recipe of --config with its overrides, and the script's own flags, from sys.argv.

    Raises:
        UserError: names a recipe that is missing, and fields that are unknown or mistyped.
    """
    help_wanted = {'-h', '--help'} & set(sys.argv)
    options, rest = parse_beside('config', kind, description=description,
                                 epilog=_describe_recipes() if help_wanted else None)
    argv = [sys.argv[0], *rest]
    config = config_flags.DEFINE_config_file('config', None, 'A recipe: a file in configs/.',
                                             lock_config=True, sys_argv=argv)
    _check_recipe_file(argv)
    try:
        stray = flags.FLAGS(argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = error         # what config_flags has to say comes wrapped in further exceptions
        while isinstance(reason, Exception) and len(reason.args) == 1:
            reason = reason.args[0]
        # config_flags puts the traceback of a recipe into its text: what the recipe itself had to say comes
        # last.
        _, marker, said = str(error).rpartition(f'{UserError.__module__}.{UserError.__name__}: ')
        if marker:
            raise UserError(said.strip()) from error
        raise UserError(f'the command line cannot be read: {"; ".join(str(reason).splitlines())}') from error
    if config.value is None:
        raise UserError('no recipe given; try --config=configs/digits_dit.py')
    if stray:
        raise UserError(f'unknown arguments: {" ".join(stray)}; fields of the recipe are set with '
                        f'--config.NAME=VALUE')
    return config.value, options
