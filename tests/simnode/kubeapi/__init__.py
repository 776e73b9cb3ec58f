"""An embedded Kubernetes API for pods: real HTTP, real watch semantics, faults on order."""

from .api import KubeApi
from .errors import ApiError
from .traffic import Request

__all__ = ["ApiError", "KubeApi", "Request"]
