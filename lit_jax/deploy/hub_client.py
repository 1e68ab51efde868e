"""The package huggingface_hub: what it downloads, and what its errors mean."""
import contextlib
import re
from pathlib import Path

from lit_jax.checkpoint.model_folder import CONFIG
from lit_jax.convert.torch_student import WEIGHTS
from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.paths import cache_folder, explain_unwritable, file_sha256

_SHA256 = re.compile(r'[0-9a-f]{64}')
_LOG_IN = 'hf auth login, or set HF_TOKEN to a token'


def client():
    """The package; UserError without it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError('models on the hub need the package huggingface_hub: pip install "lit_jax[hub]"'
                        ) from error
    return huggingface_hub


def check_token() -> None:
    """UserError on a machine that is not logged in."""
    if not client().get_token():
        raise UserError(f'this machine is not logged in to the hub: {_LOG_IN} that may write '
                        '(huggingface.co/settings/tokens)')


@contextlib.contextmanager
def explain_hub(name: str, doing: str):
    """Turns what the hub answers into a UserError. doing: 'pushed' or 'downloaded'."""
    client()
    from huggingface_hub import errors
    failed = f'{name} cannot be {doing}'
    try:
        with explain_unwritable(hub_cache()):
            yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(f'{failed}: it is gated. Accept its terms on its page, then {_LOG_IN} of the same '
                        'account') from error
    except errors.RepositoryNotFoundError as error:
        why = (f'there is no model {name} on the hub, or it is private and this machine is not logged in: '
               f'check the name, or {_LOG_IN}') if doing == 'downloaded' else (
            f'{failed}: the token may not write there, or there is no such owner. hf auth whoami says whose '
            'token it is')
        raise UserError(why) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(f'{failed}: the hub is not reachable, or HF_HUB_OFFLINE is set; and it is not in the '
                        f'cache ({hub_cache()}). Check the network') from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError, errors.XetDownloadError,
            errors.EntryNotFoundError) as error:
        response = getattr(error, 'response', None)
        if getattr(response, 'status_code', None) in (401, 403):
            raise UserError(f'{failed}: the hub does not take the token of this machine. hf auth whoami says '
                            f'whose it is; {_LOG_IN} that may do this') from error
        raise UserError(f"{failed}: {reason_of(error).rstrip('.')}. Give the command again: it goes on where "
                        'it stopped') from error


def hub_cache() -> Path:
    """Folder of what was downloaded, and of the model folders made of it."""
    return cache_folder() / 'hub'


def download(name: str) -> Path:
    """The folder of the newest version: its config and its weights, no code. A stopped download goes on;
    without a network, what the cache has."""
    where = hub_cache() / 'files'
    with explain_hub(name, 'downloaded'):
        # The config first: it is small, and says whether the weights are wanted.
        folder = Path(client().snapshot_download(name, allow_patterns=[CONFIG], cache_dir=where))
        _check_ours(folder, name)
        return Path(client().snapshot_download(name, revision=folder.name, cache_dir=where,
                                               allow_patterns=[CONFIG, WEIGHTS]))


def _check_ours(folder: Path, name: str) -> None:
    config = read_json(folder / CONFIG, {str: object}, absent={})
    if not isinstance(config.get('model'), dict) or 'format' not in config:
        raise UserError(f'{name} is no model of lit_jax: it has no {CONFIG} that push.py wrote. Checkpoints '
                        'of others: download one, then python convert_torch_ckpt.py FILE --out FOLDER')


def check_arrived(file: Path, name: str) -> None:
    """UserError for weights whose sha256 is not the one that the hub names; they are removed."""
    stored = file.resolve()      # named by its sha256
    if _SHA256.fullmatch(stored.name) and file_sha256(stored) != stored.name:
        stored.unlink()
        file.unlink(missing_ok=True)
        raise UserError(f'{file.name} of {name} arrived damaged and was removed: give the command again')
