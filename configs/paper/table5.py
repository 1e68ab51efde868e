"""LiT table 5: every size after 100K and 400K steps, and DiT after 400K. The DiG rows come with DiG.

LiT inherits from the DiT of its size (S, B, L: trained by the authors; XL: the released one) and is taught by
DiT-XL/2. The paper names the teacher only for S; for the others DiT-XL/2 is the reading taken here."""
from lit_jax.recipes.paper import Row, inherits, reader, scores

DIT = {'s': 68.40, 'b': 43.47, 'l': 23.33, 'xl': 19.47}
LIT = {
    ('s', 100): scores(60.91, 23.51, .399, .583), ('b', 100): scores(38.39, 38.59, .516, .627),
    ('l', 100): scores(17.80, 76.26, .639, .636), ('xl', 100): scores(12.90, 95.80, .657, .653),
    ('s', 400): scores(50.79, 29.17, .443, .618), ('b', 400): scores(29.55, 50.57, .557, .645),
    ('l', 400): scores(13.73, 90.53, .656, .650), ('xl', 400): scores(10.67, 110.95, .668, .667),
}
SOURCES = {'s': 'dit_s_800k', 'b': 'dit_b', 'l': 'dit_l', 'xl': 'dit_xl'}
ROWS = {f'dit_{size}_400k': Row(size, 'softmax', published=scores(fid)) for size, fid in DIT.items()}
ROWS |= {f'lit_{size}_{thousands}k': Row(
    size, set=inherits(SOURCES[size], teacher='dit_xl', noise=0.5, variance=0.05,
                       **{'train.steps': 1000 * thousands}),
    published=published) for (size, thousands), published in LIT.items()}
get_config = reader(__file__, ROWS)
