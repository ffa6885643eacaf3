"""LIGHTNING=lightning pytest ...: lets what the tests import as pytorch_lightning, and ours too, be lightning's.

So the tests of the DataModules, the callbacks and the Denoiser are about either package. What the tests name is set in
``sys.modules``; classes keep the module that they are of, by which diffaug tells the packages apart.
"""

import os
import sys
from importlib import import_module

if os.environ.get("LIGHTNING") == "lightning":
    for part in ("callbacks", "loggers", "strategies", "tuner", "utilities.combined_loader", "demos.boring_classes"):
        import_module(f"lightning.pytorch.{part}")
    for theirs, others in (("pytorch_lightning", "lightning.pytorch"), ("lightning_fabric", "lightning.fabric")):
        found = {name: module for name, module in sys.modules.items() if f"{name}.".startswith(f"{others}.")}
        sys.modules |= {theirs + name.removeprefix(others): module for name, module in found.items()}
    sys.modules["diffaug.pytorch_lightning"] = import_module("diffaug.lightning")
