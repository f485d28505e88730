"""Diffusion models as variational posteriors for latent-variable models.

The public names stand in `__init__.pyi`; each is imported when it is first used, so that `import ddvi` and the command
line's help cost nothing.
"""

import lazy_loader

from ddvi._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
