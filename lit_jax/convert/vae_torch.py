"""Converts autoencoders of Hugging Face diffusers (`AutoencoderKL`: config.json and weights) to VAE folders.

The tensors' names follow from ours (`torch_names`). Old files call the attention's tensors query, key, value
and proj_attn, newer ones to_q, to_k, to_v and to_out.0; both are read. No code in a file is run
(`lit_jax.convert.torch_files`), and one error lists all tensors that are wrong."""
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_jax.checkpoint.model_folder import is_positive
from lit_jax.checkpoint.vae_folder import check_vae_target, save_vae_folder
from lit_jax.convert.torch_files import Source, hub_parts, open_weights
from lit_jax.convert.torch_hub import folder_id, hub_digests, read_hub_config, refuse_flags
from lit_jax.convert.torch_import import tool_name
from lit_jax.convert.torch_keys import TRANSFORMS
from lit_jax.models.vae import VaeNetwork, check_vae_arch
from lit_jax.runtime.claim import claims_out
from lit_jax.runtime.errors import UserError, listed, shown, shown_name
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.leaves import named_leaves, unflatten

CLASS = 'AutoencoderKL'
_OTHER_VAES = re.compile(r'Autoencoder|VAE|VQModel')
_PUBLISHED = {name: f'stabilityai/{name}' for name in ('sd-vae-ft-ema', 'sd-vae-ft-mse', 'sdxl-vae')}
_PUBLISHED['sdxl-vae-fp16-fix'] = 'madebyollin/sdxl-vae-fp16-fix'

# Our field <- diffusers' field and its default there.
_FIELDS = {'widths': ('block_out_channels', (64,)), 'layers': ('layers_per_block', 1),
           'groups': ('norm_num_groups', 32), 'channels': ('latent_channels', 4),
           'image_channels': ('in_channels', 3), 'quant_conv': ('use_quant_conv', True),
           'post_quant_conv': ('use_post_quant_conv', True),
           'mid_attention': ('mid_block_add_attention', True)}
_SCALE = 0.18215      # scaling_factor of Stable Diffusion 1 and 2; diffusers' default


@dataclass(frozen=True)
class ConvertedVae:
    """The result of a conversion, for the summary."""
    source: str
    config: dict
    id_told: bool
    parameters: int
    out: Path


def is_hub_vae(path) -> bool:
    """Whether `path` is a diffusers folder of an autoencoder, of this or another kind."""
    return _OTHER_VAES.search(str(read_hub_config(path).get('_class_name', ''))) is not None


@claims_out
def convert_vae(src, out, *, vae_id: str | None = None, overwrite: bool = False,
                asked: Iterable[str] = ()) -> ConvertedVae:
    """Reads the diffusers folder `src`, or a file of weights in it, and writes the VAE folder `out`.
    UserError if it cannot; nothing is written then.

    vae_id: its name for data sets and models; default: the published one if the folder's name or its place in
    the Hugging Face cache shows it, else the folder's name. asked: flags for diffusion models, refused."""
    (src, weights), out = hub_parts(src), Path(out)
    refuse_flags(src, 'a VAE', asked)
    check_vae_target(out, overwrite)
    hub = _read_config(src)
    arch, scale, shift = arch_of(hub, str(src / 'config.json'))
    source = open_weights(weights)
    params = read_vae_params(source, arch, str(src))
    name = folder_id(src, 'vae')
    provenance = {'source': src.resolve().name, 'tool': tool_name(), **hub_digests(source.files)}
    config = {'vae': arch, 'id': vae_id or _PUBLISHED.get(name, name), 'scale': scale,
              'shift': shift, 'provenance': provenance}
    return save_converted(src, out, config, params, told=vae_id is not None, overwrite=overwrite)


def save_converted(src: Path, out: Path, config: dict, params: dict, *, told: bool,
                   overwrite: bool) -> ConvertedVae:
    """Writes the VAE folder and returns what the summary says."""
    save_vae_folder(out, config, params, overwrite=overwrite)
    count = sum(leaf.size for leaf in named_leaves(params).values())
    return ConvertedVae(str(src), config, told, count, out)


def describe_vae(done: ConvertedVae) -> str:
    """The summary that the script prints."""
    arch, config = done.config['vae'], done.config
    told = '' if done.id_told else ' (from the folder\'s name; --vae_id NAME changes it)'
    shift = f', shift {config["shift"]:g}' if config['shift'] else ''
    shift += ', normalised by mean and deviation of each channel' if 'normalised' in config else ''
    return '\n'.join([
        f'read     {done.source} ({CLASS})',
        f'id       {config["id"]}{told}',
        f'model    widths {", ".join(map(str, arch["widths"]))}, {arch["layers"]} blocks a level, '
        f'{2 ** (len(arch["widths"]) - 1)} image pixels a latent pixel',
        f'latent   {arch["channels"]} channels, scale {config["scale"]:g}{shift}',
        f'numbers  {done.parameters:,} parameters',
        f'written  {done.out}'])


def _read_config(folder: Path) -> dict:
    """config.json of a diffusers AutoencoderKL folder."""
    path = folder / 'config.json'
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder; give the diffusers folder of the VAE')
    if not path.is_file():
        inside = ', '.join(sorted(shown_name(entry.name) for entry in folder.iterdir())[:8]) or 'nothing'
        hint = f' {folder / "vae"} has one: give that.' if (folder / 'vae' / 'config.json').is_file() else ''
        raise UserError(f'{folder} has no config.json with the architecture and scale of a VAE; it holds '
                        f'{inside}.{hint} Get the whole diffusers folder')
    config = read_json(path, {str: object})
    name = config.get('_class_name')
    if name != CLASS:
        raise UserError(f'{folder} holds a {shown_name(name or "model of unknown class")}; lit_jax '
                        f'reads VAEs of the class {CLASS} (sd-vae-ft-ema, sd-vae-ft-mse, sdxl-vae and the '
                        f'like)')
    return config


def arch_of(hub: Mapping, where: str) -> tuple[dict, float, float]:
    """(architecture, scaling factor, shift) of a diffusers config.json. UserError for what is unknown."""
    arch = {ours: hub.get(theirs, default) for ours, (theirs, default) in _FIELDS.items()}
    try:
        arch = check_vae_arch(arch)
    except UserError as error:
        names = ', '.join(f'vae.{ours} is {theirs}' for ours, (theirs, _) in _FIELDS.items()
                          if f'vae.{ours}' in str(error))
        raise UserError(f'{where}: {error} ({names})') from error
    depth, problems, attending = len(arch['widths']), [], []
    for name, known in (('down_block_types', 'DownEncoderBlock2D'), ('up_block_types', 'UpDecoderBlock2D')):
        types = hub.get(name, [known])
        if not isinstance(types, list) or not types or any(kind not in (known, f'Attn{known}')
                                                           for kind in types):
            problems.append(f'{name} is {shown(types)}; only {known} and Attn{known} are known')
        elif len(types) != depth:
            problems.append(f'{name} has {len(types)} entries, block_out_channels {depth}')
        else:
            ordered = types if name == 'down_block_types' else types[::-1]
            attending.append(tuple(i for i, kind in enumerate(ordered) if kind != known))
    if len(set(attending)) == 2:
        problems.append('down_block_types and up_block_types have attention at different levels')
    elif attending:
        arch['attention_levels'] = attending[0]
    for name, known in {'act_fn': 'silu', 'out_channels': arch['image_channels'], 'latents_mean': None,
                        'latents_std': None}.items():
        if hub.get(name, known) != known:
            problems.append(f'{name} is {shown(hub[name])}; only {known!r} is known')
    scale, shift = hub.get('scaling_factor', _SCALE), hub.get('shift_factor') or 0.0
    if not is_positive(scale):
        problems.append(f'scaling_factor must be a number above 0, got {shown(scale)}')
    if shift != 0 and not is_positive(shift) and not (isinstance(shift, int | float) and is_positive(-shift)):
        problems.append(f'shift_factor must be a finite number, got {shown(shift)}')
    if problems:
        raise UserError(f'{where} describes a VAE that lit_jax does not have:\n  ' + '\n  '.join(problems))
    return arch, float(scale), float(shift)


# Parts of our paths -> parts of diffusers' names; the first part says which tower it is.
_NAMES = [
    (r'^encoder/level(\d+)/resample', r'encoder/down_blocks/\1/downsamplers/0/conv'),
    (r'^decoder/level(\d+)/resample', r'decoder/up_blocks/\1/upsamplers/0/conv'),
    (r'^encoder/level', r'encoder/down_blocks/'),
    (r'^decoder/level', r'decoder/up_blocks/'),
    (r'/resnet(\d+)/', r'/resnets/\1/'),
    (r'/mid/', '/mid_block/'),
    (r'/attention/', '/attention0/'),
    (r'/attention(\d+)/norm/', r'/attentions/\1/group_norm/'),
    (r'/attention(\d+)/attn/proj/', r'/attentions/\1/to_out/0/'),
    (r'/attention(\d+)/attn/qkv/', r'/attentions/\1/to_{}/'),
    (r'/norm_out/', '/conv_norm_out/'),
    (r'/shortcut/', '/conv_shortcut/'),
    (r'/(kernel|gain)$', '/weight'),
]
_OLD_ATTENTION = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}


def torch_names(path: str, *, old: bool = False) -> list[str]:
    """The tensors of one of our leaves, joined along their first axis: one, or three for qkv.

    'encoder/level0/resnet1/conv1/kernel' -> ['encoder.down_blocks.0.resnets.1.conv1.weight']."""
    for pattern, theirs in _NAMES:
        path = re.sub(pattern, theirs, path)
    pattern = path.replace('/', '.')
    names = [pattern.format(part) for part in 'qkv'] if '{}' in pattern else [pattern]
    for new, before in _OLD_ATTENTION.items() if old else ():
        names = [name.replace(f'.{new}.', f'.{before}.') for name in names]
    return names


def read_vae_params(source: Source, arch: Mapping, name: str) -> dict:
    """The float32 parameters of `arch`, or one UserError with everything that is wrong in `name`."""
    old = any('.attentions.0.query.' in key for key in source.tensors)
    problems, used, flat = list(source.problems), set(), {}
    for path, leaf in named_leaves(VaeNetwork(arch).abstract()).items():
        keys = torch_names(path, old=old)
        transform = TRANSFORMS[_transform(path, leaf.shape)]
        whole = transform.torch_shape(leaf.shape)
        used.update(keys)
        tensors = []
        for key in keys:
            problem = source.problem(key, (whole[0] // len(keys), *whole[1:]))
            if not problem and not np.isfinite(values := source.read(key)).all():
                problem = f'non-finite values in tensor: {shown_name(key)}'
            if problem:
                problems.append(problem)
            else:
                tensors.append(values)
        if len(tensors) == len(keys):
            joined = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
            # A copy, as it may be a view of the mapped file.
            flat[path] = np.array(transform.to_leaf(joined, leaf.shape), np.float32, order='C')
    problems += [f'unexpected tensor: {shown_name(key)}' for key in source.tensors if key not in used]
    if problems:
        raise UserError(f'{name} does not hold the whole VAE of its config.json:' + listed(problems))
    return unflatten(flat)


def _transform(path: str, shape: tuple[int, ...]) -> str:
    if '/attn/qkv/' in path:
        return 'linear' if path.endswith('kernel') else 'flat'
    if '/attn/proj/' in path and path.endswith('kernel'):
        return 'linear_in'
    return 'conv' if len(shape) == 4 else 'copy'
