"""The model as a component of a diffusers pipeline."""
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin

from lit_jax.convert.twins.models_twin import MODELS


class LiTTransformer2DModel(ModelMixin, ConfigMixin):
    """arch: what lit_jax calls a model's architecture; the other arguments are for pipelines to read. flow:
    {'prediction', 'noise_at'} of a flow, whose timesteps are the time of the noise in thousandths, and whose
    velocity points to the noise, as everywhere in diffusers."""

    # REPA's projectors feed no sample; rotary tables are computed.
    _keys_to_ignore_on_load_unexpected = [r'^model\.(projectors|feat_rope)\.']

    @register_to_config
    def __init__(self, arch, sample_size, in_channels, out_channels, patch_size, num_embeds_ada_norm=None,
                 flow=None):
        super().__init__()
        self.model = MODELS[arch['family']](arch)

    def forward(self, hidden_states, timestep=None, class_labels=None, encoder_hidden_states=None,
                encoder_attention_mask=None, added_cond_kwargs=None, return_dict=True):
        """Images [B, C, H, W], timesteps, labels or a caption -> noise (and variance) [B, C or 2C, H, W], or
        the prediction of a flow [B, C, H, W]."""
        t, flow = timestep.expand(len(hidden_states)), self.config.flow
        if flow is not None:
            t = t.to(torch.promote_types(t.dtype, torch.float32)) / 1000
            t = t if flow['noise_at'] else 1 - t
        if encoder_hidden_states is None:
            sample = self.model(hidden_states, t, class_labels)
        else:
            sample = self.model(hidden_states, t, encoder_hidden_states, encoder_attention_mask)
        if flow is not None:
            sample = sample[:, :self.config.in_channels]
            turned = flow['prediction'] == 'velocity' and not flow['noise_at']
            sample = -sample if turned else sample
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
