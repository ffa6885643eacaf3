"""Pictures, each with the numbers it shows: of schedules, recipes, noised images, samples, and loss by noise level.

Every function returns a `Picture`; ``picture.save("a.png")`` writes a.png and, where there are numbers, a.csv.
"""

from diffaug.plots.buckets import buckets as buckets
from diffaug.plots.curves import levels as levels
from diffaug.plots.curves import recipes as recipes
from diffaug.plots.curves import schedules as schedules
from diffaug.plots.images import batch as batch
from diffaug.plots.images import forward as forward
from diffaug.plots.images import preview as preview
from diffaug.plots.images import progress as progress
from diffaug.plots.images import samples as samples
from diffaug.plots.images import strip as strip
from diffaug.plots.parts import parts as parts
from diffaug.plots.picture import Picture as Picture
from diffaug.plots.picture import check_path as check_path
