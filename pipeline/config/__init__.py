"""Every setting of every command: frozen dataclasses, the only place with defaults and help texts.

The command line is built from their fields; a run folder keeps them as config.json. torch is not
imported. Each name that a module defines can be imported from here.
"""

from pipeline.config.base import *  # noqa: F403
from pipeline.config.bench import *  # noqa: F403
from pipeline.config.comparison import *  # noqa: F403
from pipeline.config.detection import *  # noqa: F403
from pipeline.config.distill import *  # noqa: F403
from pipeline.config.fields import *  # noqa: F403
from pipeline.config.label_sets import *  # noqa: F403
from pipeline.config.labels import *  # noqa: F403
from pipeline.config.meal import *  # noqa: F403
from pipeline.config.optimisation import *  # noqa: F403
from pipeline.config.pack import *  # noqa: F403
from pipeline.config.report import *  # noqa: F403
from pipeline.config.slurm import *  # noqa: F403
from pipeline.config.training import *  # noqa: F403
from pipeline.config.transfer import *  # noqa: F403
from pipeline.config.use import *  # noqa: F403
from pipeline.config.views import *  # noqa: F403
