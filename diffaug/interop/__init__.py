"""To and from diffusers: its schedulers' forward process as a schedule, and a schedule as its schedulers.

| schedule | diffusers scheduler | what its networks predict |
|---|---|---|
| discrete, variance preserving | DDIM, DDPM, DPMSolverMultistep | epsilon; v_prediction; sample |
| discrete, variance preserving | every other one that is given by betas | the same |
| continuous, variance preserving | the same, with betas such that its t is ours times ``timesteps`` | the same |
| Rectified, and Shifted on it | FlowMatchEulerDiscrete | flow |
| Rectified, and Shifted on it | DPMSolverMultistep with use_flow_sigmas | flow_prediction |
| EDM; VE | EDMEuler, EDMDPMSolverMultistep, with the grid karras; exponential | epsilon |

There v_prediction is v, sample is x_0 and flow_prediction is flow. The epsilon of an EDM scheduler is F, not the noise:
EDM's own preconditioning is applied to it.

diffusers keeps its tables in float32: its alpha_bar agrees with ours to 2e-5 of its value, and its 1 - alpha_bar to
1e-6 absolutely: of a sigma below 0.01 few digits are left. A discrete t means the same on both sides: zero-based, least
noise at 0.

How t is drawn is not part of a scheduler. Whoever brings it along from diffusers' training scripts for SD3: these use
their draw as an index into timesteps that fall, so ``--logit_mean`` is -mean of `diffaug.times.LogitNormal`;
``--mode_scale`` is s of `diffaug.times.Mode`, which is symmetric. ``--weighting_scheme`` sigma_sqrt and cosmap are
weights there, on the error of x_0 by default: see `diffaug.targets.weight_kinds`.
"""

from diffaug.interop.autoencoder import scale_autoencoder as scale_autoencoder
from diffaug.interop.from_diffusers import from_diffusers as from_diffusers
from diffaug.interop.from_diffusers import target_of as target_of
from diffaug.interop.to_diffusers import PREDICTIONS as PREDICTIONS
from diffaug.interop.to_diffusers import to_diffusers as to_diffusers
