"""LiT table 3 (details: table 13): what LiT-S/2 inherits from DiT-S/2. No distillation, 2 heads, 400K steps.

The sources are DiT-S/2 after 200K to 800K steps, in models/dit_s_200k and so on; their EMA weights, or the
raw ones in models/dit_s_400k_model (`convert_torch_ckpt.py --weights model`). For the 200K to 800K rows the
paper loads the raw ones."""
from lit_jax.recipes.paper import Row, inherits, reader, scores

SOURCES = {
    '400k_ema': scores(56.07, 25.61, .416, .601), '200k_model': scores(57.84, 24.72, .408, .600),
    '300k_model': scores(56.95, 25.04, .414, .608), '400k_model': scores(56.07, 25.62, .418, .608),
    '600k_model': scores(54.80, 26.65, .424, .613), '800k_model': scores(53.83, 27.16, .425, .614),
}
COPIED = {
    'q,k,v': scores(55.29, 26.09, .419, .619), 'k,v': scores(55.07, 26.38, .422, .609),
    'v': scores(54.93, 26.44, .427, .612), 'q': scores(54.82, 26.72, .423, .605),
    'o': scores(54.84, 26.33, .425, .607),
}
ROWS = {f'from_{source}': Row('s', set=inherits(f'dit_s_{source}'), published=published)
        for source, published in SOURCES.items()}
ROWS |= {f'from_600k_model_{parts.replace(",", "")}': Row(
    's', set=inherits('dit_s_600k_model', **{'inherit.copy': parts}), published=published)
    for parts, published in COPIED.items()}
get_config = reader(__file__, ROWS)
