"""Expert-parallel communication for mixture-of-experts training: tokens to their experts and back.

* :class:`TokenDispatcher`: expert-grouped rows, differentiable; what framework integrations use.
* :func:`weigh_rows`: rows times routing weights, for experts that weigh their own output.
* :class:`DispatcherConfig`: every setting, from arguments, YAML or ``DEEPEP_MOE_*`` variables.
* :class:`Buffer`, :class:`Config`, :class:`EventHandle`, :class:`EventOverlap`: the DeepEP 1.x interface.
* :class:`ElasticBuffer`, :class:`EPHandle`: the part of the DeepEP 2.x interface that trainers use.
"""

from deepep_moe.buffer import Buffer, topk_idx_t
from deepep_moe.config import Config, DispatcherConfig
from deepep_moe.dispatcher import Dispatched, TokenDispatcher
from deepep_moe.elastic import ElasticBuffer, EPHandle
from deepep_moe.events import EventHandle, EventOverlap
from deepep_moe.weigh import weigh_rows

__version__ = "0.1.0"
__all__ = [
    "Buffer",
    "Config",
    "Dispatched",
    "DispatcherConfig",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "TokenDispatcher",
    "topk_idx_t",
    "weigh_rows",
]
