"""The mixers of the blocks of a model, from its config."""

MIXERS = {}


def block_mixers(arch):
    """The options of the mixer of each block; a stage of another kind takes nothing of the first."""
    base, found = dict(arch['mixer']), []
    for stage in arch.get('stages') or [{'depth': arch['depth']}]:
        own = stage.get('mixer') or {}
        like = own.get('name', base['name']) == base['name']
        found += [{**base, **own} if like else dict(own)] * stage['depth']
    return found


def make_mixer(options, width, grid):
    options = {name: value for name, value in options.items() if value is not None}
    return MIXERS[options.pop('name')](width, grid, **options)
