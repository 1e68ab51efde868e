"""Builds the parts of a run from a finalized recipe and checks everything before the first compile."""
import functools
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lit_jax.checkpoint.foreign import conversion_hint
from lit_jax.checkpoint.identity import are_weights
from lit_jax.checkpoint.load import load_weights, read_weights_config
from lit_jax.checkpoint.text_encoder_folder import TextEncoder
from lit_jax.checkpoint.vae_folder import Vae, is_vae_folder, load_vae, read_vae_config
from lit_jax.data.latent_space import LatentSpace
from lit_jax.data.sources import Source, is_image_source, open_source
from lit_jax.diffusion.kinds import deciding, read_diffusion
from lit_jax.diffusion.own_terms import import_losses
from lit_jax.diffusion.settings import recorded
from lit_jax.models.arch import check_arch, check_partition
from lit_jax.models.facts import has_null_class
from lit_jax.models.network import DTYPES, Model, Network
from lit_jax.models.t5 import T5Network
from lit_jax.models.vae import VaeNetwork
from lit_jax.recipes.recipe import architecture, is_text
from lit_jax.runtime import peers
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError, shown_name
from lit_jax.runtime.paths import check_reachable
from lit_jax.training.frozen_features import Features, read_features
from lit_jax.training.mesh import replicated, state_shardings
from lit_jax.training.stages import Stage
from lit_jax.training.state import make_optimizer
from lit_jax.training.step import Objective, make_train_step
from lit_jax.training.text_conditioning import (
    find_text_problems,
    load_frozen_text_encoder,
    null_features,
    reads_captions,
    text_encoder_path,
)


def build_network(config: ConfigDict) -> Network:
    return Network(architecture(config), dtype=DTYPES[config.train.dtype],
                   scan_layers=config.train.scan_layers, remat=config.train.remat,
                   wide_gradients=config.train.float32_gradients)


def build_objective(config: ConfigDict) -> Objective:
    names = 'label_dropout', 'balance_weight', 'ema_decay', 'ema_warmup', 'accumulate'
    return Objective(read_diffusion(config.diffusion), config.latent.scale,
                     lambda_noise=config.teacher.lambda_noise, lambda_variance=config.teacher.lambda_variance,
                     lambda_blocks=config.teacher.lambda_blocks,
                     losses=import_losses(config.train.losses), features=read_features(config),
                     **{name: config.train[name] for name in names})


def build_optimizer(config: ConfigDict):
    train = config.train
    names = 'learning_rate', 'warmup_steps', 'cooldown_steps', 'steps', 'weight_decay', 'clip_norm', 'beta2'
    return make_optimizer(name=train.optimizer, **{name: train[name] for name in names},
                          arch=architecture(config))


def reads_images(config: ConfigDict) -> bool:
    """Whether batches hold images that the step encodes with a VAE."""
    return config.latent.space == 'vae' and (is_image_source(config.data.name) or reads_captions(config))


def build_source(config: ConfigDict, split: str = 'train') -> Source:
    """The recipe's data, in the size of the network's input or of its VAE's."""
    arch, data = architecture(config), config.data
    size = (data.image_size, 3) if reads_images(config) else (arch['input_size'][0], arch['channels'])
    common = {'split': split, 'image_size': size[0], 'channels': size[1], 'path': data.path,
              'data_dir': data.path, 'seed': config.seed, 'strict': data.strict}
    if not is_text(config):
        return open_source(data.name, num_classes=arch['num_classes'], classes=data.classes, **common)
    captions = {'caption_tokens': config.text.tokens, 'buckets': data.buckets}
    if reads_captions(config):
        from lit_jax.text.tokenizer import Tokenizer
        captions |= {'tokenizer': Tokenizer.load(text_encoder_path(config)),
                     'multiple': config.latent.downscale * config.model.patch}
    return open_source(data.name, **captions, **common)


def build_augment(config: ConfigDict):
    """The augmentation of an element before batching, or None."""
    if is_text(config):
        from lit_jax.data.captions import choose_caption
        return functools.partial(choose_caption, long_ratio=config.text.long_ratio)
    if config.data.name == 'latents':
        from lit_jax.data.latents import choose_mirror, first_of_both
        return choose_mirror if config.data.flip else first_of_both
    from lit_jax.data.augment import random_flip
    return random_flip if config.data.flip and is_image_source(config.data.name) else None


def reading_threads(config: ConfigDict) -> int:
    """Threads that read ahead, each with a batch; decoding images keeps a core busy, other sources do not."""
    if config.data.threads:
        return config.data.threads
    if is_image_source(config.data.name):
        return min(os.cpu_count(), 32)
    return 4 if config.data.name == 'caption_latents' else 1


def load_frozen_vae(config: ConfigDict, mesh) -> Vae | None:
    """The recipe's VAE, replicated, checked against its latent section; None if none is given."""
    latent = config.latent
    if latent.space != 'vae' or not latent.vae_path:
        return None
    vae = load_vae(latent.vae_path, config.train.dtype,
                   lambda abstract: jax.tree.map(lambda _: replicated(mesh), abstract))
    LatentSpace.of_vae(vae).check(LatentSpace.of_recipe(latent), 'in the VAE', 'in the recipe',
                                  f'the VAE {latent.vae_path} does not fit this recipe',
                                  'Give latent.vae_path the folder of the VAE that the latent section names, '
                                  'or correct that section.')
    return vae


def check_inputs(config: ConfigDict) -> None:
    """Raises one UserError that lists all missing inputs of a run, with the commands that make them."""
    problems = []
    read_features(config)
    if reads_images(config) and not config.latent.vae_path:
        problems.append(f'latent.vae_path: to train from the images of {config.data.name} give the folder of '
                        f'{config.latent.vae} (python convert_torch_ckpt.py VAE_FOLDER --out models/sd_vae), '
                        f'or cache their latents first: python prepare_latents.py --help')
    if config.latent.vae_path and not is_vae_folder(config.latent.vae_path):
        hint = conversion_hint(config.latent.vae_path) or (
            f' One is made by: python convert_torch_ckpt.py VAE_FOLDER --out {config.latent.vae_path}')
        problems.append(f'latent.vae_path: {config.latent.vae_path} is not a VAE folder.{hint}')
    paths = {f'{section}.path': config[section].path for section in ('teacher', 'inherit')}
    for path in dict.fromkeys(filter(None, paths.values())):
        check_reachable(path)
        try:
            read_weights_config(path)
        except UserError as error:
            fields = ' and '.join(name for name, given in paths.items() if given == path)
            problems.append(f'{fields}: {error}')
    problems += find_text_problems(config)
    source = None
    try:
        source = build_source(config)
        check_data(config, source)
    except UserError as error:
        problems.append(f'data: {error}')
    if problems:
        raise UserError('this recipe cannot run here yet:\n  ' + '\n  '.join(problems))
    _check_drawn_by(config, getattr(source, 'metadata', {}).get('teacher'))


def _check_drawn_by(config: ConfigDict, drawer: Mapping | None) -> None:
    """Raises UserError if cached latents were drawn by another teacher than the recipe's. drawer: identity of
    the weights that drew them."""
    path = config.teacher.path
    if drawer and path and not are_weights(path, drawer):
        step = f' at step {drawer["step"]}' if drawer.get('step') else ''
        raise UserError(f'the latents in {config.data.path} were drawn by another teacher than {path}: by '
                        f'{shown_name(drawer["name"])}{step} (sha256 of its parameters: '
                        f'{drawer["sha256"][:12]}). Give that teacher, or draw a set with this one: python '
                        f'prepare_latents.py --teacher={shlex.quote(path)} --count=NUMBER --out=FOLDER')


def check_data(config: ConfigDict, source: Source) -> None:
    """Raises UserError unless cached latents have the recipe's VAE, scale, size and crop."""
    if config.data.name not in ('latents', 'caption_latents'):
        return
    from lit_jax.data import buckets, crop
    from lit_jax.data.latents import check_latents
    rule = buckets.RULE if config.data.buckets else crop.RULE
    if source.metadata['source']['name'] in ('shapes', 'teacher'):      # drawn at their size
        rule = 'none'
    check_latents(source, LatentSpace.of_recipe(config.latent), image_size=config.data.image_size, crop=rule)
    if config.data.name == 'caption_latents':
        from lit_jax.data.text_features import check_text
        text = config.text
        check_text(source.folder, source.metadata, encoder=text.encoder or None, tokens=text.tokens,
                   width=text.channels)
    if path := config.latent.vae_path:
        check_latents(source, LatentSpace(sha256=read_vae_config(path)['provenance']['sha256']),
                      where=f'in the VAE {path}')


def describe(config: ConfigDict, class_names: list[str] | None) -> dict:
    """What a reader of the weights needs to know, as in a model folder's config.json."""
    text = config.text
    captions = {'text': {'encoder': text.encoder or None, 'channels': text.channels, 'tokens': text.tokens}}
    return {'model': architecture(config), 'diffusion': read_diffusion(config.diffusion).to_json(),
            **(captions | {'classes': None} if is_text(config) else {'classes': class_names}),
            'latent': LatentSpace.of_recipe(config.latent).published(),
            'sampling': recorded(config.sample)}


@dataclass(frozen=True)
class Frozen:
    """What a step uses and does not train; None where the recipe has none.

    Attributes:
        vae: also to draw samples. encodes: whether the step encodes images with it. null_text: features
            float32 [L, C] of the empty caption. features: of another network, which the tokens learn."""
    teacher: Model | None
    vae: Vae | None
    text_encoder: TextEncoder | None
    null_text: np.ndarray | None
    encodes: bool
    mesh: Mesh
    features: Features | None = None

    @property
    def networks(self) -> tuple[Network | None, VaeNetwork | None, T5Network | None]:
        """Of teacher, VAE and text encoder, for `jit_stage`."""
        return (self.teacher and self.teacher.network,
                self.vae.network if self.vae and self.encodes else None,
                self.text_encoder and self.text_encoder.network)

    @functools.cached_property
    def params(self) -> dict:
        """The second argument of a step."""
        parts = {'teacher': self.teacher, 'vae': self.vae, 'text_encoder': self.text_encoder}
        params = {name: part.params for name, part in parts.items() if part is not None}
        if self.null_text is not None:
            params['null_text'] = jax.device_put(self.null_text, replicated(self.mesh))
        if self.features is not None:
            params['features'] = jax.device_put(self.features.params, replicated(self.mesh))
        return params


def load_frozen(config: ConfigDict, mesh: Mesh, source: Source, step: int | None = None) -> Frozen:
    """Loads the frozen parts of a run, checked against its recipe. step: of the teacher (`load_teacher`)."""
    teacher, vae = load_teacher(config, mesh, step), load_frozen_vae(config, mesh)
    text_encoder = load_frozen_text_encoder(config, mesh)
    return Frozen(teacher, vae, text_encoder, null_features(config, source, text_encoder),
                  reads_images(config), mesh, read_features(config))


def load_teacher(config: ConfigDict, mesh, step: int | None = None) -> Model | None:
    """The recipe's teacher, checked against the student, its weights stored in the compute dtype. step: of a
    teacher that is a workdir, the checkpoint to take instead of the newest."""
    if not config.teacher.path:
        return None
    dtype = DTYPES[config.train.dtype]
    teacher_config = peers.together(lambda: read_teacher_config(config))
    _, params = load_weights(config.teacher.path, lambda tree, arch: state_shardings(tree, mesh, arch),
                             step=step)
    network = Network(teacher_config['model'], dtype=dtype, scan_layers=config.train.scan_layers)
    shardings = state_shardings(network.abstract(), mesh, network.arch)
    cast = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree), out_shardings=shardings)
    return Model(network, cast(params), teacher_config)


def read_teacher_config(config: ConfigDict) -> dict:
    """The config of the recipe's teacher, checked against recipe and mesh; its weights are not read."""
    path = config.teacher.path
    teacher_config = read_weights_config(path)
    if config.train.label_dropout and not has_null_class(teacher_config['model']):
        raise UserError(f'the teacher {path} was trained without dropping classes, so it has nothing to '
                        f'teach about the null class: set train.label_dropout to 0')
    check_same_task('teacher', path, teacher_config, config)
    check_partition(teacher_config['model'], config.mesh.to_dict(), f'the teacher {path}')
    return teacher_config


def read_teacher_arch(config: ConfigDict) -> dict | None:
    """The architecture of the recipe's teacher, as `read_teacher_config`; None without a teacher."""
    return check_arch(read_teacher_config(config)['model']) if config.teacher.path else None


def check_same_task(role: str, path: str, given: dict, config: ConfigDict) -> None:
    """Raises UserError unless a teacher (of any size) has the recipe's inputs and noise levels."""
    mine = architecture(config)
    names = ('num_classes', 'caption_channels', 'caption_tokens', 'input_size', 'learn_sigma')

    def facts(arch: Mapping, diffusion: Mapping, latent: LatentSpace) -> dict:
        own = {name: arch.get(name) for name in names if name in mine} | {'channels': arch['channels']}
        return own | {'diffusion': deciding(diffusion), 'latent': latent.published()}

    theirs = facts({'learn_sigma': True, **given['model']}, given['diffusion'], LatentSpace.of_model(given))
    ours = facts(mine, config.diffusion, LatentSpace.of_recipe(config.latent))
    if theirs['latent']['downscale'] is None:      # folders of early versions do not say
        theirs['latent']['downscale'] = config.latent.downscale
    check_alike(theirs, ours, f'in the {role}', 'in the recipe',
                f'the {role} {path} does not fit this recipe',
                f'Give another {role}, or a recipe of the same task: the same inputs and noise levels.')


def init_params(config: ConfigDict, network: Network, mesh, inherited_step: int | None = None
                ) -> tuple[dict, dict | None]:
    """(the parameters before step 1, the inheritance report or None). inherited_step: of a workdir to inherit
    from, the checkpoint to take instead of the newest."""
    key = jax.random.key(config.seed)
    shardings = state_shardings(network.abstract(), mesh, network.arch)
    params = jax.jit(network.init, out_shardings=shardings)(key)
    report = None
    if config.inherit.path:
        from lit_jax.training.inherit import inherit_params
        source_config, source_params = load_weights(config.inherit.path,
                                                    lambda tree, arch: state_shardings(tree, mesh, arch),
                                                    step=inherited_step)
        params, report = inherit_params(source_params, source_config['model'], params, network.arch,
                                        copy=config.inherit.copy)
        params = jax.device_put(params, shardings)
    return params, report


def init_state(config: ConfigDict, network: Network, optimizer, mesh) -> tuple[dict, dict | None]:
    """(the state before step 1 of training, the inheritance report or None)."""
    params, report = init_params(config, network, mesh)
    return Stage('train', 1, config.train.steps, optimizer).begin(params, network, mesh), report


def jit_stage(config: ConfigDict, network: Network, stage: Stage, mesh, teacher: Network | None = None,
              vae: VaeNetwork | None = None, text_encoder: T5Network | None = None):
    """The jitted step of a stage, as `jit_step`."""
    abstract = stage.abstract(network, mesh)
    if stage.name == 'train':
        return jit_step(config, network, stage.optimizer, mesh, abstract, teacher, vae, text_encoder)
    from lit_jax.training.align import make_align_step
    step = make_align_step(network, stage.optimizer, build_objective(config), teacher, vae, text_encoder,
                           loss=config.align.loss, delta=config.align.delta)
    return _jit(step, abstract, mesh)


def jit_step(config: ConfigDict, network: Network, optimizer, mesh, abstract: dict,
             teacher: Network | None = None, vae: VaeNetwork | None = None,
             text_encoder: T5Network | None = None):
    """The jitted train step: the state is donated and sharded as `abstract`, metrics are replicated."""
    return _jit(make_train_step(network, optimizer, build_objective(config), teacher, vae, text_encoder),
                abstract, mesh)


def _jit(step, abstract: dict, mesh):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def abstract_sharded_state(network: Network, optimizer, mesh) -> dict:
    """The state as ShapeDtypeStructs with shardings, to restore a checkpoint into."""
    return Stage('train', 1, 1, optimizer).abstract(network, mesh)


def run_key(config: ConfigDict, mesh) -> jax.Array:
    """The key that each step folds its number into; not the one of the initial weights."""
    return jax.device_put(jax.random.fold_in(jax.random.key(config.seed), 1), replicated(mesh))
