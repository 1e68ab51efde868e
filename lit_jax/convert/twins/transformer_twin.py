"""The model as a component of a diffusers pipeline."""
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin

from lit_jax.convert.twins.models_twin import MODELS


class LiTTransformer2DModel(ModelMixin, ConfigMixin):
    """arch: what lit_jax calls a model's architecture; the other arguments are for pipelines to read."""

    @register_to_config
    def __init__(self, arch, sample_size, in_channels, out_channels, patch_size, num_embeds_ada_norm=None):
        super().__init__()
        self.model = MODELS[arch['family']](arch)

    def forward(self, hidden_states, timestep=None, class_labels=None, encoder_hidden_states=None,
                encoder_attention_mask=None, added_cond_kwargs=None, return_dict=True):
        """Images [B, C, H, W], timesteps, labels or a caption -> noise (and variance) [B, C or 2C, H, W]."""
        t = timestep.expand(len(hidden_states))
        if encoder_hidden_states is None:
            sample = self.model(hidden_states, t, class_labels)
        else:
            sample = self.model(hidden_states, t, encoder_hidden_states, encoder_attention_mask)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
