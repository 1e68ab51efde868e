"""A page in the browser that draws images of classes or of prompts; nothing leaves this machine.

    python demo.py  # the digits teacher that is shipped
    python demo.py --from=runs/digits_lit --teacher=models/digits_dit             # both, from the same noise
    python demo.py --from=runs/lit_xl --vae=models/sd_vae
    python demo.py --from=runs/lit_t2i --text_encoder=models/t5 --vae=models/sdxl_vae --low_memory

It needs Gradio: pip install "lit_jax[demo]". docs/start/page.md has more.
"""
import argparse
import sys


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--from', dest='source', help='model folder or workdir; default: the digits teacher of assets/')
    add('--teacher', help='a second model, drawn beside it from the same noise')
    add('--vae', help='VAE folder, for models that draw latents')
    add('--text_encoder', help='text encoder folder, for models that take prompts')
    add('--dtype', help='float32 (the default) or bfloat16')
    add('--text_dtype', help='of the text encoder: float32, bfloat16, or int8; default float32 on CPU, '
                             'bfloat16 elsewhere')
    add('--low_memory', action='store_true', default=None,
        help='one network in memory at a time: text encoder, backbone, VAE')
    add('--port', type=int, help='default 7860')
    add('--host', help='default 127.0.0.1, this machine alone; 0.0.0.0: everyone in its network, without a '
                       'password')
    return parser.parse_args(arguments)


def main() -> None:
    options = {name: value for name, value in vars(parse(sys.argv[1:])).items() if value is not None}
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.app.serve import serve
    serve(**options)
