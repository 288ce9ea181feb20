"""Errors of the model layer, each with a stable code and a message that is safe to show.

ServiceError                      code                   seen by the client as
├── InvalidRequest                invalid_request        400
│   ├── UnknownField              unknown_field          400
│   ├── PromptTooLong             prompt_too_long        400
│   ├── ModelNotFound             model_not_found        404   a name that no model of ours has
│   ├── ToolsUnsupported          tools_unsupported      400   the model's chat template has no tools
│   ├── InvalidSchema             invalid_schema         400   a JSON Schema that answers cannot be held to
│   └── InvalidImage              invalid_image          400   truncated, broken, mislabelled
├── ImageTooLarge                 image_too_large        413
├── UnsupportedImage              unsupported_image      415   no picture that we take
├── ModelNotConfigured            model_not_configured   503
├── NotReady                      not_ready              503   with retry_after_s
├── QueueFull                     queue_full             503   with retry_after_s
├── DeadlineExceeded              deadline_exceeded      504
├── NumericError                  numeric_error          500   NaN or Inf logits
└── InternalError                 internal_error         500

The status codes stand in one table, `responses.STATUS_BY_CODE`; this layer knows no HTTP. A message names the
field, the limit and the value, and for texts and pictures their size, never their content.

SnapshotError and LoadError are for the operator; RequestCancelled and EngineDead never reach a client as such.
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """A request that ends without an answer. `field` is the input at fault, None where there is none."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    code = "invalid_request"


class UnknownField(InvalidRequest):
    code = "unknown_field"


class PromptTooLong(InvalidRequest):
    code = "prompt_too_long"


class ModelNotFound(InvalidRequest):
    code = "model_not_found"


class ToolsUnsupported(InvalidRequest):
    code = "tools_unsupported"


class InvalidSchema(InvalidRequest):
    code = "invalid_schema"


class InvalidImage(InvalidRequest):
    code = "invalid_image"


class ImageTooLarge(ServiceError):
    code = "image_too_large"


class UnsupportedImage(ServiceError):
    code = "unsupported_image"


class ModelNotConfigured(ServiceError):
    code = "model_not_configured"


class NotReady(ServiceError):
    code = "not_ready"


class QueueFull(ServiceError):
    code = "queue_full"


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"


class NumericError(ServiceError):
    code = "numeric_error"


class InternalError(ServiceError):
    code = "internal_error"


class SnapshotError(Exception):
    """A model folder that cannot be used; the message is one sentence for the operator and names the path."""


class LoadError(Exception):
    """A model that cannot be loaded, for a reason that may be shown: one sentence without paths."""


class RequestCancelled(Exception):
    """Nobody waits for this request any more."""


class EngineDead(Exception):
    """The device cannot be used any more by this process (a sticky CUDA error): only a new worker helps."""
