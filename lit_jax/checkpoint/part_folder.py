"""Folders of the frozen networks around a model (VAE, text encoder), like model folders with a `kind`."""
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from etils import epath

from lit_jax.checkpoint.foreign import conversion_hint
from lit_jax.checkpoint.model_folder import ARRAYS, CONFIG, check_target, parse_config, write_folder
from lit_jax.runtime import leaves, peers
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.json_file import read_json, sealed
from lit_jax.runtime.paths import absolute, as_path

FORMAT = 1


@dataclass(frozen=True)
class Part:
    """A kind of folder. kind: in config.json. name: for people. give: what to give instead, in messages.
    hub_field: a field of config.json that only folders of the Hugging Face hub have."""
    kind: str
    name: str
    give: str
    hub_field: str

    def is_folder(self, path) -> bool:
        """Whether `path` looks like one (its content may still be damaged; loading checks that)."""
        path = as_path(path)
        try:
            config = read_json(path / CONFIG, {}, absent={})
        except UserError:
            return False
        return config.get('kind') == self.kind and (path / ARRAYS).is_dir()

    def read_config(self, path, check: Callable[[dict, str], dict]) -> dict:
        """config.json of a folder, without its arrays; check(config, name of the file) checks the fields."""
        path = absolute(path)
        config = parse_config(path, self.name, self.name, self.give)
        if isinstance(config, dict) and 'kind' not in config and self.hub_field in config:
            raise UserError(f'{path} is a folder of the Hugging Face hub ({config[self.hub_field]}), not yet '
                            f'a {self.name} folder: python convert_torch_ckpt.py {path} --out DIR makes one.')
        if isinstance(config, dict) and 'kind' not in config and (hint := conversion_hint(path)):
            raise UserError(f'{path} is not a {self.name} folder.{hint}')
        return check(config, str(path / CONFIG))

    def check_fields(self, config, source: str, rules: Callable[[dict], Sequence[tuple[bool, str]]]) -> None:
        """Raises one UserError that lists what is wrong: kind, format, or rules (holds, text)."""
        if not isinstance(config, dict) or config.get('kind') != self.kind:
            kind = config.get('kind', 'a model') if isinstance(config, dict) else shown(config)
            raise UserError(f'{source} describes {kind}, not a {self.name}. {self.give}')
        if config.get('format') != FORMAT:
            raise UserError(f'{source} has format {shown(config.get("format"))}; this lit_jax reads format '
                            f'{FORMAT}. Use the version that wrote it, or convert the {self.name} again.')
        provenance = config.get('provenance')
        common = [(isinstance(config.get('id'), str) and bool(config['id']), '"id" must be a name'),
                  (isinstance(provenance, dict) and isinstance(provenance.get('sha256'), str),
                   '"provenance.sha256" must be the sha256 of the weights')]
        if problems := [text for holds, text in [*rules(config), *common] if not holds]:
            raise UserError(f'{source} is not a valid {self.name} config: {"; ".join(problems)}.')

    def check_target(self, path, overwrite: bool) -> None:
        """Refuses an output that exists, before anything is read."""
        check_target(path, overwrite, self.name, self.is_folder)

    def save(self, path, config: Mapping, params, *, check: Callable[[dict, str], dict],
             abstract: Callable[[dict], dict], overwrite: bool, **written) -> epath.Path:
        """Writes a folder, all of it or nothing, and returns its path.

        config: without a 'sha256' of source files in its provenance (trained here), the sha256 of the
        parameters is added. check: as for `read_config`. abstract: config -> the parameter tree that it
        describes. written: further arguments of `write_folder`."""
        path, config = absolute(path), {'format': FORMAT, 'kind': self.kind, **config}
        config['provenance'] = dict(config.get('provenance') or {})
        if 'sha256' not in config['provenance']:
            config['provenance']['sha256'] = leaves.params_sha256(params)
        config = check(config, 'the config to be saved')
        leaves.check_leaves(leaves.named_leaves(params), leaves.named_leaves(abstract(config)),
                            'the parameters to be saved')
        peers.only_lead(lambda: self.check_target(path, overwrite))
        write_folder(path, json.dumps(sealed(config), indent=2, allow_nan=False) + '\n', params, **written)
        return path
