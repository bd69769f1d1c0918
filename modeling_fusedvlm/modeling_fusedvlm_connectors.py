"""All connectors by name. A connector that travels with a variant is imported here, in a line of its own."""

from .modeling_fusedvlm_connector import CONNECTORS, FusedVLMConnector, register_connector
from .modeling_fusedvlm_connector_anchored import FusedVLMAnchoredConnector
from .modeling_fusedvlm_connector_custom import __doc__ as CUSTOM_CONNECTOR
from .modeling_fusedvlm_connector_dense import FusedVLMDenseConnector
from .modeling_fusedvlm_connector_fused import FusedVLMFusedConnector
from .modeling_fusedvlm_connector_pool import FusedVLMPoolConnector
from .modeling_fusedvlm_connector_quecc import FusedVLMQueCCConnector
from .modeling_fusedvlm_connector_resampler import FusedVLMResamplerConnector

BUILT_IN = (
    FusedVLMFusedConnector,
    FusedVLMDenseConnector,
    FusedVLMPoolConnector,
    FusedVLMResamplerConnector,
    FusedVLMAnchoredConnector,
    FusedVLMQueCCConnector,
)


def connector_class(name: str) -> type[FusedVLMConnector]:
    """The class behind `config.connector`.

    Raises:
        ValueError: naming those there are.
    """
    if name not in CONNECTORS:
        raise ValueError(
            f"connector={name!r} is not registered; there are {', '.join(sorted(CONNECTORS))}. A connector of your own "
            "must be loaded first (FUSEDVLM_CONNECTORS=file.py), or load the variant with trust_remote_code=True."
        )
    return CONNECTORS[name]


__all__ = ["BUILT_IN", "CONNECTORS", "CUSTOM_CONNECTOR", "FusedVLMConnector", "connector_class", "register_connector"]
