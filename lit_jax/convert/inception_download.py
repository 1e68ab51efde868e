"""Downloads the published weights of FID-Inception, once, into the cache folder."""
import contextlib
import hashlib
import http.client
import logging
import os
import time
import urllib.request
from pathlib import Path

from lit_jax.runtime import writers
from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.paths import cache_folder

LOG = logging.getLogger('lit_jax')
PUBLISHED_NAME = 'pt_inception-2015-12-05-6726825d.pth'
# Where pytorch-fid (Apache-2.0) keeps them: its constant FID_WEIGHTS_URL.
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PUBLISHED_NAME}'
DIGEST = '6726825d'       # the sha256 of the file begins with it
TIMEOUT = 20.0            # seconds without an answer
_PART = 1 << 20


def download(flags: str) -> Path:
    """Downloads the weights into the cache folder, whole or not at all, also if several processes do; returns
    the path.

    flags: how a person names the file, for the UserError if it cannot be downloaded."""
    target = cache_folder() / PUBLISHED_NAME
    partial = writers.sibling(target, 'partial')
    ways = f'Fetch {PUBLISHED_NAME} on a machine that can, and put it at {target}, or name it with {flags}'
    LOG.info('fetching the weights of Inception: %s', URL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = _fetch(partial)
        if not digest.startswith(DIGEST):
            raise UserError(f'{URL} gave a file with the sha256 {digest}, expected one that begins with '
                            f'{DIGEST}: something on the way changed it. {ways}')
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f'FID, IS and the like need the weights of Inception, which are not here and cannot '
                        f'be fetched from {URL} ({reason_of(error)}). {ways}') from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return target


def _fetch(partial: Path) -> str:
    """Writes the file and returns its sha256; a line of progress every ten seconds."""
    digest, done, said = hashlib.sha256(), 0, time.monotonic()
    with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer, open(partial, 'wb') as file:
        size = int(answer.headers.get('Content-Length') or 0)
        while part := answer.read(_PART):
            file.write(part)
            digest.update(part)
            done += len(part)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                LOG.info('%.0f of %s MB', done / 1e6, f'{size / 1e6:.0f}' if size else '?')
        file.flush()
        os.fsync(file.fileno())
    if size and done != size:
        raise OSError(f'the connection ended after {done} of {size} bytes')
    return digest.hexdigest()
