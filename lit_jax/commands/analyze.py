"""Analyzes a model and its teacher, if it has one; writes report.html, figures and analysis.json.

    python analyze.py --from runs/digits_lit                        # a workdir: its own data, its own teacher
    python analyze.py --from models/digits_dit --data digits
    python analyze.py --from runs/lit_xl --teacher models/dit_xl --parts loss,rank --out analysis/lit_xl

The parts are: similarity of the heads' attention maps, by layer and timestep (LiT, figure 10); tokens, the
attention maps of one token (DyDi-LiT, figure 6); rank of the mixer, with and without the depth-wise
convolution; loss by timestep; routing, the choices of mixers that route, by class (DyDi-LiT, figure 5).
"""
from lit_jax.analysis.analyze_options import AnalyzeOptions
from lit_jax.runtime.options import parse_options


def main() -> None:
    options = parse_options(AnalyzeOptions, description=__doc__)
    # jax is imported after the flags are read, so that wrong ones are reported at once.
    from lit_jax.analysis.analysis import analyze
    print(analyze(options))
