"""The place that PortNodeMetaForQDQ had in torch.ao."""

from eagerq.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ

__all__ = ["PortNodeMetaForQDQ"]
