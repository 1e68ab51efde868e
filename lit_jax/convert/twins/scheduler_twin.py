"""The samplers of flows as a scheduler of diffusers."""
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from lit_jax.convert.twins.flow_rows_twin import make_rows, model_time, prediction


class LiTFlowScheduler(SchedulerMixin, ConfigMixin):
    """Any method on any path. Timesteps are the time of the noise in thousandths, several for one step; the
    model's velocity points to the noise, as everywhere in diffusers."""

    order = 1

    @register_to_config
    def __init__(self, method='heun', path='linear', prediction_type='velocity', shift=1.0, sde_form='sigma',
                 sde_norm=1.0, last_step='mean', last_size=0.04, num_train_timesteps=1000):
        self.flow = {'path': path, 'prediction': prediction_type, 'noise_at': 1}
        self.init_noise_sigma, self.timesteps, self.rows = 1.0, None, None

    def set_timesteps(self, num_inference_steps, device=None):
        config = self.config
        self.rows = make_rows(self.flow, config.method, num_inference_steps, config.shift, config.sde_form,
                              config.sde_norm, config.last_step, config.last_size)
        self.timesteps, self.decided = (
            torch.tensor([1000 * model_time(self.flow, t) for t in times], dtype=torch.float32, device=device)
            for times in ([row.time for row in self.rows], [row.decided for row in self.rows]))
        # The noise that the first step of sde_heun starts with, which a scheduler cannot add to its input.
        self.init_noise_sigma = float((1 + self.rows[0].before ** 2) ** 0.5)
        self.index, self.base, self.k = 0, None, 0.0

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """The state before the next evaluation; the step's first state is kept in float32 or wider."""
        def noise():
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=wide)

        wide = torch.promote_types(sample.dtype, torch.float32)
        row, x, before = self.rows[self.index], sample.to(wide), self.k
        if self.index == 0 or self.rows[self.index - 1].ends:
            self.base = x
        output = prediction(self.flow, model_output.to(wide), sample.shape[1])
        self.k = float(row.of_x) * x + float(row.of_output) * output
        x = float(row.keep) * self.base + float(row.now) * self.k + float(row.earlier) * before
        if row.after:
            x = x + float(row.after) * noise()
        self.index += 1
        if self.index < len(self.rows) and self.rows[self.index].before:
            x = x + float(self.rows[self.index].before) * noise()
        x = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
