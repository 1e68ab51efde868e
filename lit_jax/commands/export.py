"""Writes a model for ONNX Runtime (ONNX), or for jax without lit_jax (StableHLO).

    python export.py runs/lit_xl --to onnx --out lit_xl_onnx
    python export.py runs/lit_xl --to onnx --int8 --out lit_xl_int8      # its error is measured and printed
    python export.py models/lit_s --to stablehlo --sampler --steps 20 --method dpm++ --out lit_s_draws

The folder holds the program, its weights, config.json, and a README that says how it is used. The batch is
open. ONNX needs the extra `export`: pip install "lit_jax[export]". docs/run/export.md has more.
"""
from dataclasses import dataclass

from lit_jax.runtime.errors import UserError, as_typed
from lit_jax.runtime.options import given, option, parse_options
from lit_jax.sampling.request import HOW, SamplerFlags


@dataclass(frozen=True, kw_only=True)
class ExportOptions(SamplerFlags):
    """A model, the form, and what of it is written."""
    src: str = option('model folder or workdir', flag='MODEL')
    to: str = option('the form', choices=('onnx', 'stablehlo'))
    out: str = option('output folder')
    sampler: bool = option('the whole guided sampler instead of the model; settings below', default=False)
    int8: bool = option('of ONNX: matrices in 8 bit, a quarter of the size; the error is measured',
                        default=False)
    any_size: bool = option('of a text model: images of any size', default=False)
    overwrite: bool = option('replace an existing output', default=False)

    def __post_init__(self):
        if flags := not self.sampler and given(self, HOW):
            raise UserError(f'{", ".join(flags)} requires --sampler')


def main() -> None:
    options = parse_options(ExportOptions, description=__doc__)
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.deploy.export_model import describe, export_model
    done = export_model(options.src, options.out, to=options.to, sampler=options.sampler, flags=options,
                        int8=options.int8, any_size=options.any_size, overwrite=options.overwrite)
    print(as_typed(describe(done)))
