"""Rows of published tables as recipes: `--config=configs/paper/table4.py:xl_teacher_0.5_0.05`.

A file of configs/paper/ has ROWS, a dict of row name -> `Row`, and `get_config(row)`, made by `reader`. The
published figures (`config.published`) are copied to the workdir and its report."""
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ml_collections import ConfigDict

from lit_jax import recipes
from lit_jax.recipes.systems import sub_imagenet, system
from lit_jax.runtime.errors import UserError, shown

ABLATION_STEPS = 400_000
# The paper of a table, by the prefix of its file name.
PAPERS = {'dydi_table': 'DyDi-LiT (arXiv 2601.13683)', 'dig_table': 'DiG (arXiv 2405.18428)',
          'table': 'LiT (arXiv 2501.12976)'}


@dataclass(frozen=True)
class Row:
    """One row: the training, and the published figures.

    Attributes:
        size: a key of `recipes.SIZES`. mixer: 'linear' or 'softmax'.
        set: fields by their path, {'model.mixer.heads': 2}.
        published: {'fid', 'is', 'precision', 'recall'} as far as given (FID-50K), and other columns of the
            table (`printed`). 'gflops' is the paper's own count.
        cfg_scale: classifier-free guidance of the figures, 1 = none.
        system: a key of `lit_jax.recipes.systems.SYSTEMS`; then `size` is one of its sizes and `mixer` is
            ignored.
        sub_imagenet: trained on 100 classes, at the image size that `set` may give. flow: trained as SiT, and
            scored with 250 steps of its SDE."""
    size: str
    mixer: str = 'linear'
    set: Mapping | None = None
    published: Mapping | None = None
    cfg_scale: float = 1.0
    system: str = ''
    sub_imagenet: bool = False
    flow: bool = False


def scores(fid: float, inception: float | None = None, precision: float | None = None,
           recall: float | None = None) -> dict:
    """The columns of the papers' tables; unpublished ones are left out."""
    values = {'fid': fid, 'is': inception, 'precision': precision, 'recall': recall}
    return {name: value for name, value in values.items() if value is not None}


def printed(columns: str, line: str, **more: float) -> dict:
    """A printed line of a table: columns 'fid sfid precision%', line '111.85 11.81 20.50'; `more`: further
    columns. A column with % is a percentage and becomes a fraction; '-' is left out."""
    values = {}
    for name, text in zip(columns.split(), line.split(), strict=True):
        if text != '-':
            values[name.rstrip('%')] = round(float(text) / 100, 6) if name.endswith('%') else float(text)
    return values | more


def row_recipe(table: str, rows: Mapping[str, Row], name: str) -> ConfigDict:
    """The common settings of the papers (400K steps of 256, or Sub-ImageNet's), then those of the row."""
    if name not in rows:
        raise UserError(f'{table} has no row {shown(name)}; give one after the file, as in '
                        f'configs/paper/{table}.py:{next(iter(rows))}; its rows: {", ".join(rows)}')
    row = rows[name]
    config = recipes.default()
    config.train.steps, config.eval.steps = ABLATION_STEPS, 250      # all papers sample ImageNet in 250 steps
    config = system(config, row.system, row.size) if row.system else recipes.size(config, row.size, row.mixer)
    if row.flow:
        recipes.flow(config)
    if row.sub_imagenet:
        sub_imagenet(config)
    config.name = f'{table}_{name}'
    config.update_from_flattened_dict(dict(row.set or {}))
    prefix = next(prefix for prefix in PAPERS if table.startswith(prefix))
    config.published = {'table': f'{PAPERS[prefix]} table {table.removeprefix(prefix)}, row {name}',
                        'cfg_scale': row.cfg_scale, **(row.published or {})}
    config.sample.cfg_scale = max(row.cfg_scale, config.sample.cfg_scale)
    config.eval.cfg_scales = (row.cfg_scale,)
    return config


def inherits(path: str, *, teacher: str = '', noise: float = 0.0, variance: float = 0.0, **more) -> dict:
    """Fields of a student that inherits from one model folder and may be taught by another."""
    fields = {'inherit.path': recipes.models_folder(path)}
    if teacher:
        fields |= {'teacher.path': recipes.models_folder(teacher), 'teacher.lambda_noise': noise,
                   'teacher.lambda_variance': variance}
    return fields | more


def reader(path: str, rows: Mapping[str, Row]) -> Callable[[str], ConfigDict]:
    """`get_config` of a file of configs/paper/: `get_config = reader(__file__, ROWS)`."""
    table = os.path.splitext(os.path.basename(path))[0]

    def get_config(row: str = '') -> ConfigDict:
        return row_recipe(table, rows, row)

    return get_config
