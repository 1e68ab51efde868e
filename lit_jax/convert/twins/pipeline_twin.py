"""A diffusers pipeline of class-conditional models, written by lit_jax; Apache License 2.0."""
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class LiTPipeline(DiffusionPipeline):
    """Images of classes, as DiTPipeline; without a VAE where the model draws pixels.

    classes: names of the classes, if known. latent: {'scale', 'shift', 'null_class'} of the model. sampling:
    {'steps', 'cfg_scale'}, its defaults."""

    _optional_components = ['vae']     # none where the model draws pixels

    def __init__(self, transformer, scheduler, vae, classes=None, latent=None, sampling=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(classes=classes, latent=latent, sampling=sampling)
        self.image_processor = VaeImageProcessor()

    def get_label_ids(self, names):
        """Numbers of the classes of these names."""
        known = list(self.config.classes or ())
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f'no classes of the names {unknown}; known: {known}')
        return [known.index(name) for name in names]

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=None, generator=None, num_inference_steps=None,
                 latents=None, guidance_channels=3, guidance_interval=(0.0, 1.0), output_type='pil',
                 return_dict=True, callback_on_step_end=None):
        """guidance_scale, num_inference_steps: the model's own, else 4 and 50. guidance_channels: how many
        channels of the prediction are guided, as DiT's own code has it: 3. guidance_interval: the part of the
        schedule in which guidance acts, from 0, image, to 1, noise.

        latents: noise [B, C, H, W]. output_type: 'pil', 'np', 'pt', or 'latent'."""
        config, device = self.transformer.config, self._execution_device
        told = {'cfg_scale': 4.0, 'steps': 50, **(self.config.sampling or {})}
        guidance_scale = told['cfg_scale'] if guidance_scale is None else guidance_scale
        steps = told['steps'] if num_inference_steps is None else num_inference_steps
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if latents is None:
            latents = randn_tensor((len(labels), config.in_channels, height, width), generator=generator,
                                   device=device, dtype=self.transformer.dtype)
        timesteps = self._timesteps(steps, device)
        decided = getattr(self.scheduler, 'decided', timesteps)      # whether guidance acts
        scale_input = getattr(self.scheduler, 'scale_model_input', lambda x, t: x)
        x = latents.to(device, self.transformer.dtype) * getattr(self.scheduler, 'init_noise_sigma', 1.0)
        guided = guidance_scale != 1 and self.config.latent['null_class']
        low, high = (bound * (1000 if config.flow else self.scheduler.config.num_train_timesteps - 1)
                     for bound in guidance_interval)
        null = torch.full_like(labels, config.num_embeds_ada_norm)
        for i, t in enumerate(self.progress_bar(timesteps)):
            inputs = scale_input(x, t)
            if guided and low <= float(decided[i]) <= high:
                both = self.transformer(torch.cat([inputs, inputs]), t, torch.cat([labels, null])).sample
                given, without = both.chunk(2)
                noise = without + guidance_scale * (given - without)
                output = torch.cat([noise[:, :guidance_channels], given[:, guidance_channels:]], 1)
            else:
                output = self.transformer(inputs, t, labels).sample
            learned = str(self.scheduler.config.get('variance_type', '')).startswith('learned')
            output = output if learned else output[:, :config.in_channels]
            x = self.scheduler.step(output, t, x, generator=generator).prev_sample if self._is_random() else \
                self.scheduler.step(output, t, x).prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {'latents': x})
        images = self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _is_random(self):
        return type(self.scheduler).__name__ in ('DDPMScheduler', 'DDIMScheduler', 'LiTFlowScheduler')

    def _timesteps(self, steps, device):
        """Those that lit_jax takes, where the scheduler takes any."""
        if type(self.scheduler).__name__ == 'FlowMatchEulerDiscreteScheduler':
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
        elif type(self.scheduler).__name__ == 'DDPMScheduler':
            last = self.scheduler.config.num_train_timesteps - 1
            kept = np.linspace(0, last, steps).round().astype(int)[::-1]
            self.scheduler.set_timesteps(timesteps=kept.tolist(), device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.timesteps

    def _finish(self, x, output_type):
        if output_type == 'latent':
            return x
        x = x / self.config.latent['scale'] + (self.config.latent.get('shift') or 0)
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        return self.image_processor.postprocess(x, output_type=output_type)
