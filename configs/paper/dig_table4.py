"""DiG table 4: ImageNet at 256px, DiG of four sizes after 400K steps, the largest after 1.2M, and DiT.

The guidance of the row `dig_xl_1200k_guided` is not printed; 1.5, that of DiT's row, is the reading taken
here. The other systems of the table (ADM, CDM, LDM, DiM, DiS, DiMSUM) are not part of this project. The
authors trained in float32."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid is precision recall'
DIT = {'s': '68.40', 'b': '43.47', 'l': '23.33', 'xl': '19.47'}
DIG = {'s': '62.06 11.77 22.81 0.39 0.56', 'b': '39.50 8.50 37.21 0.51 0.63',
       'l': '22.90 6.91 59.87 0.60 0.64', 'xl': '18.53 6.06 68.53 0.63 0.64'}
LONG = {
    'dit_xl_7m': ('dit', 7_000_000, 1.0, '9.62 6.85 121.50 0.67 0.67'),
    'dig_xl_1200k': ('dig', 1_200_000, 1.0, '8.60 6.46 130.03 0.68 0.68'),
    'dit_xl_7m_guided': ('dit', 7_000_000, 1.5, '2.27 4.60 278.24 0.83 0.57'),
    'dig_xl_1200k_guided': ('dig', 1_200_000, 1.5, '2.07 4.53 278.95 0.82 0.60'),
}
FLOAT32 = {'train.dtype': 'float32'}
ROWS = {f'dit_{size}_400k': Row(size, published=printed('fid', line), system='dit')
        for size, line in DIT.items()}
ROWS |= {f'dig_{size}_400k': Row(size, set=FLOAT32, published=printed(COLUMNS, line), system='dig')
         for size, line in DIG.items()}
ROWS |= {name: Row('xl', set={'train.steps': steps} | (FLOAT32 if system == 'dig' else {}), cfg_scale=scale,
                   system=system, published=printed(COLUMNS, line))
         for name, (system, steps, scale, line) in LONG.items()}
get_config = reader(__file__, ROWS)
