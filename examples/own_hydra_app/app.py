"""An application of one's own under Hydra: ``import diffaug`` makes the package's groups, schedule=cosine, ..., known.

python examples/own_hydra_app/app.py schedule=linear schedule.timesteps=100 steps=200
python examples/own_hydra_app/app.py schedule=mine

Its own groups come first: data/ is all its own, and schedule/mine.yaml stands beside the package's schedules.
"""

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from network import Denoiser
from omegaconf import DictConfig

import diffaug  # noqa: F401 - so that Hydra finds the package's configs


@hydra.main(config_path="configs", config_name="app", version_base="1.3")
def main(config: DictConfig) -> None:
    pl.seed_everything(config.seed)
    data = instantiate(config.data)
    trainer = pl.Trainer(max_steps=config.steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Denoiser(), data)
    print(f"trained {trainer.global_step} steps with {data.process.schedule}")


if __name__ == "__main__":
    main()
