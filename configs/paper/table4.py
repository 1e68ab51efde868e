"""LiT table 4 (details: table 14): distillation of LiT-S/2 from DiT-S/2 after 800K steps. 400K steps.

Rows are named by the teacher, λ1 and λ2: `xl_teacher_0.5_0.05`. Teachers: models/dit_s_800k, models/dit_xl.
"""
from lit_jax.recipes.paper import Row, inherits, reader, scores

SOURCE = 'dit_s_800k'
PUBLISHED = {
    ('s', 0.1, 0): scores(55.11, 26.28, .419, .614),
    ('xl', 0.1, 0): scores(53.05, 27.43, .431, .609), ('xl', 0.05, 0): scores(53.41, 27.26, .427, .610),
    ('xl', 0.5, 0): scores(51.13, 28.89, .438, .616), ('xl', 0.1, 0.05): scores(52.76, 27.70, .431, .620),
    ('xl', 0, 0.05): scores(53.49, 27.26, .429, .609), ('xl', 0.05, 0.05): scores(53.14, 27.46, .431, .609),
    ('xl', 0.5, 0.05): scores(50.79, 29.17, .443, .618),
}
ROWS = {'no_teacher': Row('s', set=inherits(SOURCE), published=scores(53.83, 27.16, .425, .614))}
ROWS |= {f'{teacher}_teacher_{noise:g}_{variance:g}': Row(
    's', set=inherits(SOURCE, teacher='dit_xl' if teacher == 'xl' else SOURCE, noise=float(noise),
                      variance=float(variance)),
    published=published) for (teacher, noise, variance), published in PUBLISHED.items()}
get_config = reader(__file__, ROWS)
