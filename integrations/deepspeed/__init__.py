"""DeepSpeed plugin: both of its MoE systems on deepep_moe, from one block in ds_config.

Importing this package before ``deepspeed.initialize`` teaches DeepSpeed (0.19.8 and later releases of 0.19) the block::

    import deepep_moe.integrations.deepspeed
    # ds_config: "deepep_moe": {"enabled": true, ...fields of DispatcherConfig}

* Layers of ``deepspeed.moe.layer.MoE`` dispatch their tokens with a :class:`~deepep_moe.TokenDispatcher`. Without the
  block, :func:`convert` does the same to a model, and :class:`MoE` is such a layer from the start.
* AutoEP (``expert_parallel`` with ``comm_backend: deepep``) gets this library's ElasticBuffer as its ``deep_ep``.

``registration.py`` says what is changed in DeepSpeed and what is refused, ``moe.py`` is the layer, ``routing.py`` its
routing without capacity, ``experts.py`` how experts compute, ``formula.py`` which of them are computed together,
``auto_ep.py`` the way into AutoEP.
"""

from deepep_moe.errors import UnsupportedError

try:
    import deepspeed  # noqa: F401
except ImportError as error:
    raise UnsupportedError(
        f"deepep_moe.integrations.deepspeed needs deepspeed 0.19.8, which cannot be imported ({error}); "
        "install it with `pip install --no-build-isolation deepspeed==0.19.8`"
    ) from error

from deepep_moe.integrations.deepspeed.moe import MoE, convert
from deepep_moe.integrations.deepspeed.registration import register

__all__ = ["MoE", "convert", "register"]

register()
