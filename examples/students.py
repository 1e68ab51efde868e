"""The students that a demo compares: one recipe, with parts of the method left out."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from lit_jax.recipes.recipe import load_recipe

# The whole method, aligned before (its steps are `fields`), then without distillation, then also without
# inheritance.
ARMS = {'distilled': {}, 'aligned': {}, 'inherited': {'teacher': ''},
        'scratch': {'teacher': '', 'inherit': ''}}


@dataclass(frozen=True)
class Student:
    """One run of a comparison; a `pool.Job`.

    workdir: of the demo, with the folder teacher/. arm: a key of ARMS. base: a recipe in configs/. fields:
    further changes of the recipe, such as 'sample.every'."""
    workdir: Path
    arm: str
    seed: int
    base: str = 'digits_lit'
    fields: Mapping[str, object] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.workdir / f'{self.arm}_{self.seed}'

    def changes(self) -> dict[str, object]:
        """The changes of the recipe's fields."""
        teacher = str(self.workdir / 'teacher')
        return {'name': f'{self.base}_{self.arm}', 'seed': self.seed,
                'teacher.path': ARMS[self.arm].get('teacher', teacher),
                'inherit.path': ARMS[self.arm].get('inherit', teacher), **self.fields}

    def recipe(self) -> ConfigDict:
        config = load_recipe(self.base)
        config.update_from_flattened_dict(self.changes())
        return config

    def command(self) -> str:
        """The same run from the command line."""
        flags = ' '.join(f'--config.{name}={value!r}' if value == '' else f'--config.{name}={value}'
                         for name, value in self.changes().items())
        return f'python train.py --config=configs/{self.base}.py {flags} --workdir={self.path}'
