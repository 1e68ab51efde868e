"""Rows of published tables as recipes: `--config=configs/paper/table4.py:xl_teacher_0.5_0.05`.

A file of configs/paper/ has ROWS, a dict of row name -> `Row`, and `get_config(row)`, which is `row_recipe` of its rows.
The published figures travel with the recipe (`config.published`) into the workdir and its report.
"""
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ml_collections import ConfigDict

from lit_jax import config as recipes
from lit_jax.errors import UserError

ABLATION_STEPS = 400_000


@dataclass(frozen=True)
class Row:
    """One row: what it trains, and what was published for it.

    Attributes:
        size: a key of `recipes.SIZES`. mixer: 'linear' or 'softmax'.
        set: fields by their path, {'model.mixer.heads': 2}.
        published: FID-50K and, where given, inception score, precision and recall; {'fid', 'is', 'precision', 'recall'}.
        cfg_scale: classifier-free guidance of the figures, 1 = none.
    """
    size: str
    mixer: str = 'linear'
    set: Mapping = None
    published: Mapping = None
    cfg_scale: float = 1.0


def scores(fid: float, inception: float | None = None, precision: float | None = None, recall: float | None = None) -> dict:
    """The columns of the papers' tables; those that are not published are left out."""
    values = {'fid': fid, 'is': inception, 'precision': precision, 'recall': recall}
    return {name: value for name, value in values.items() if value is not None}


def row_recipe(table: str, rows: Mapping[str, Row], name: str) -> ConfigDict:
    """The recipe of a row: LiT's settings for its ablations (400K steps, batch 256), then what the row sets."""
    if name not in rows:
        raise UserError(f'{table} has no row {name!r}; give one after the file, as in configs/paper/{table}.py:'
                        f'{next(iter(rows))}; its rows: {", ".join(rows)}')
    row = rows[name]
    config = recipes.size(recipes.default(), row.size, row.mixer)
    config.name = f'{table}_{name}'
    config.train.steps = ABLATION_STEPS
    config.update_from_flattened_dict(dict(row.set or {}))
    config.published = {'table': f'LiT (arXiv 2501.12976) {table.replace("table", "table ")}, row {name}',
                        'cfg_scale': row.cfg_scale, **(row.published or {})}
    config.sample.cfg_scale = max(row.cfg_scale, config.sample.cfg_scale)
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
