"""What a training says at its end."""
from lit_jax import recipes
from lit_jax.training.next_steps import next_commands


def test_commands_carry_the_folders_of_the_recipe(monkeypatch):
    config = recipes.default()
    config.latent.vae_path, config.teacher.path = 'models/my vae', 'models/dit'
    assert next_commands('runs/a', config.to_dict()) == [
        "python sample.py --from=runs/a '--vae=models/my vae' --out=grid.png",
        "python sample.py --grid_compare models/dit runs/a '--vae=models/my vae' --out=compare.png",
        'python analyze.py --from=runs/a']
    config.latent.space, config.teacher.path = 'pixels', ''
    monkeypatch.setattr('sys.argv', ['lit-jax'])
    assert next_commands('runs/a', config.to_dict()) == [
        'lit-jax sample --from=runs/a --out=grid.png', 'lit-jax analyze --from=runs/a']
    config.model.family = 'pixart'
    assert next_commands('runs/a', config.to_dict()) == []
    config.text.encoder_path = 'models/t5'
    assert next_commands('runs/a', config.to_dict())[0].endswith(
        "--text_encoder=models/t5 '--prompt=a red circle' --out=grid.png")
