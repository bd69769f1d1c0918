"""All connectors by name. A connector that travels with a variant is imported here, in a line of its own."""

import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


CUSTOM_FILE = "modeling_fusedvlm_connector_custom.py"
FROM_PACKAGE = re.compile(r"^(\s*)from fusedvlm\.modeling_fusedvlm\.(modeling_fusedvlm\w*) import", re.MULTILINE)


def travelling_source(connector: type[FusedVLMConnector]) -> str | None:
    """Source of a connector that is not one of these files, as it stands in `CUSTOM_FILE` of a saved variant.

    Imports of the package's files that travel become imports of the files beside it. None for connectors that travel by
    themselves.

    Raises:
        ValueError: when the file imports more of the package, which others do not have.
    """
    file = Path(inspect.getfile(connector))
    # By name, not by folder: a variant's own code may have been loaded from several copies of it.
    if file.name == CUSTOM_FILE or file.stem in {kind.__module__.rpartition(".")[2] for kind in BUILT_IN}:
        return None
    source = FROM_PACKAGE.sub(r"\1from .\2 import", file.read_text(encoding="utf-8"))
    if left := re.search(r"^\s*(?:from|import) fusedvlm\b.*$", source, re.MULTILINE):
        raise ValueError(
            f"{file.name} cannot travel with a variant: {left.group().strip()!r}; import from "
            "fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector and _connector_parts only."
        )
    return source


@contextmanager
def carrying_connector(connector: type[FusedVLMConnector], folder: str | os.PathLike, is_main: bool) -> Iterator[None]:
    """Put the source of a connector of the user's own into the folder that is saved inside the block.

    Raises:
        ValueError: before anything is written, when the source cannot travel.
    """
    source = travelling_source(connector)
    yield
    if source is not None and is_main:
        (Path(folder) / CUSTOM_FILE).write_text(source, encoding="utf-8")


__all__ = ["BUILT_IN", "CONNECTORS", "CUSTOM_CONNECTOR", "FusedVLMConnector", "connector_class", "register_connector"]
