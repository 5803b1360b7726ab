"""Expert-parallel communication for mixture-of-experts training: tokens to their experts and back.

* :class:`TokenDispatcher`: expert-grouped rows, differentiable; what framework integrations use.
* :class:`DispatcherConfig`: every setting, from arguments, YAML or ``DEEPEP_MOE_*`` variables.
"""

from deepep_moe.config import Config, DispatcherConfig
from deepep_moe.dispatcher import Dispatched, TokenDispatcher

__version__ = "0.1.0"
__all__ = ["Config", "Dispatched", "DispatcherConfig", "TokenDispatcher"]
