"""Analyzes a model, beside its teacher if it has one: writes a folder with report.html, figures and
analysis.json.

    python analyze.py --from runs/digits_lit                        # a workdir: its own data, its own teacher
    python analyze.py --from models/digits_dit --data digits
    python analyze.py --from runs/lit_xl --teacher models/dit_xl --parts loss,rank --out analysis/lit_xl

similarity: of the attention maps of the heads, over layers and timesteps (LiT, figure 10). tokens: where one
token looks (DyDi-LiT, figure 6). rank: of the mixer, with and without the depth-wise convolution. loss: by
timestep. routing: what mixers that route choose for each class (DyDi-LiT, figure 5).
"""
from lit_jax.analysis.analyze_options import AnalyzeOptions
from lit_jax.runtime.options import parse_options


def main() -> None:
    options = parse_options(AnalyzeOptions, description=__doc__)
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.analysis.analysis import analyze
    print(analyze(options))
