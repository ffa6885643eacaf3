"""Train a denoiser: compose the configs, make the objects, fit. ``python train.py --help`` lists what can be chosen."""

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from diffaug.config import check_keys, check_words, checkpoint_path, report, seed_all
from diffaug.training.quiet import quieten
from diffaug.training.sweeps import job


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
@job
def main(config: DictConfig) -> None:
    check_keys(config, HydraConfig.get())
    quieten(config.lightning.diffaug)
    ckpt_path = checkpoint_path(config.ckpt_path, config.folder)
    check_words(config.trainer)
    seed_all(config.seed)
    data = instantiate(config.data)
    model = instantiate(config.model, process=data.process)
    trainer = instantiate(config.trainer)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    if trainer.enable_validation:
        trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero:
        print(report(config.folder))


if __name__ == "__main__":
    main()
