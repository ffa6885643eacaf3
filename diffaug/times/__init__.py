"""Times: how t is drawn. A density (`diffaug.times.densities`), and how samples cover it (`diffaug.times.coverage`)."""

from diffaug.times.coverage import ByIndex as ByIndex
from diffaug.times.coverage import Coverage as Coverage
from diffaug.times.coverage import Independent as Independent
from diffaug.times.densities import Times as Times
from diffaug.times.densities import Uniform as Uniform
