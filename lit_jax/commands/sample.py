"""Draws images from a model folder or a workdir, of classes or of prompts. The name of --out decides the
form:

    python sample.py --from runs/digits_lit --classes 3,7 --cfg_scale 4 --steps 50 --out grid.png
    python sample.py --from runs/lit_xl --vae models/sd_vae --classes 207,360 --per_class 4 --out images/
    python sample.py --from runs/lit_xl --vae models/sd_vae --count 50000 --cfg_scale 1.5 --out lit_xl.npz
    python sample.py --grid_compare models/dit_xl runs/lit_xl --vae models/sd_vae --out compare.png
    python sample.py --from=runs/lit_t2i --text_encoder=models/t5 --vae=models/sdxl_vae \\
        --prompt="a red fox in the snow" --seeds=0,1,2 --size=1024x1024 --low_memory --out=fox.png

.png: a grid with one row per class or prompt. .npz: a set for evaluation (arr_0 uint8 [N, H, W, 3], arr_1
labels), its recipe card beside it. Anything else: a folder of single PNG files. A set or folder that is
stopped goes on when its command is given again. On several hosts the same command runs on each of them
(docs/run/clusters.md).
"""
from lit_jax.runtime import cli
from lit_jax.runtime.options import parse_options
from lit_jax.sampling.request import SampleRequest


def main() -> None:
    request = parse_options(SampleRequest, description=__doc__)
    reports = cli.join(request)
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.sampling.draw import draw
    line = draw(request)
    if reports:
        print(line)
