"""From our errors to gRPC status: the only place that knows gRPC codes.

One interceptor wraps every handler, unary and streaming. What we raise on purpose becomes its status; anything else is a
bug: logged with its traceback, answered as INTERNAL without inner details.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import grpc
import grpc.aio

from imgsvc.base import tracing
from imgsvc.base.errors import ImgsvcError, NotFound

log = logging.getLogger(__name__)

MAX_MESSAGE: Final = 6 * 1024  # [bytes] of a status message as it is sent
_CUT: Final = " ... (the daemon's log has all of it) ... "

_PULL: Final = "/runtime.v1.ImageService/PullImage"
_CODES = {code.name: code for code in grpc.StatusCode}


if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor  # generic in the type stubs only


class ErrorInterceptor(_Interceptor):
    """Turns exceptions of handlers into gRPC status. observe: told method, code and seconds of every call."""

    def __init__(self, observe: Observe | None = None) -> None:
        self._observe = observe or _nobody

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the handler that would serve this call."""
        handler = cast("grpc.RpcMethodHandler[Any, Any] | None", await continuation(handler_call_details))
        if handler is None:
            return cast("grpc.RpcMethodHandler[Any, Any]", None)  # an unknown method; gRPC answers UNIMPLEMENTED
        call = _Call(handler_call_details.method, self._observe)
        decode, encode = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(call.single(handler.unary_unary), decode, encode)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(call.stream(handler.unary_stream), decode, encode)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(call.single(handler.stream_unary), decode, encode)
        return handler


Observe = Callable[[str, str, float], None]


def _nobody(method: str, code: str, seconds: float) -> None:
    """Observes nothing."""


class _Call:
    """One method with what is done around each of its calls."""

    def __init__(self, method: str, observe: Observe) -> None:
        self._method = method
        self._name = method.rpartition("/")[2]
        self._observe = observe

    def single(self, handle: Any) -> Any:
        """Around a handler that answers once."""

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._around(context):
                return await handle(request, context)

        return call

    def stream(self, handle: Any) -> Any:
        """Around a handler that answers in a stream."""

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            async with self._around(context):
                async for reply in handle(request, context):
                    yield reply

        return call

    @asynccontextmanager
    async def _around(self, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        began, code = time.monotonic(), "CANCELLED"
        tracing.enter(context.invocation_metadata() or ())
        try:
            yield
            code = "OK"
        except Exception as error:  # noqa: BLE001  # the RPC edge: every failure becomes a status here
            code = error.code if isinstance(error, ImgsvcError) else "INTERNAL"
            await _abort(error, context, self._method)
        finally:
            self._observe(self._name, code, time.monotonic() - began)


def fit(text: str) -> str:
    """A message that arrives: its middle is left out where it is too long for the trailers of an answer.

    A client of gRPC's C core that gets more than 8 KiB of them reports that, instead of the message and its code.
    Source: gRPC over HTTP/2, "Status-Message" (percent-encoding); GRPC_ARG_MAX_METADATA_SIZE.
    """
    if sum(map(_cost, text)) <= MAX_MESSAGE:
        return text
    tail = _head(text[::-1], MAX_MESSAGE // 4)[::-1]
    return _head(text, MAX_MESSAGE * 3 // 4 - len(_CUT)) + _CUT + tail


def _cost(character: str) -> int:
    """Bytes of a character when it is sent."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in character.encode("utf-8", "replace"))


def _head(text: str, budget: int) -> str:
    for position, character in enumerate(text):
        budget -= _cost(character)
        if budget < 0:
            return text[:position]
    return text


def _level(method: str, error: ImgsvcError) -> int:
    """A warning, except when something is looked at that is not there: kubelets ask for what they have just removed, and at their
    start for the statistics of the pod "".
    """
    return logging.DEBUG if error.code == NotFound.code and method.endswith(("Status", "Stats")) else logging.WARNING


def _code(error: ImgsvcError, method: str) -> grpc.StatusCode:
    """The kubelet looks for a reason at the start of a pull's message, and takes away what gRPC puts before it for UNKNOWN alone.

    Source: Kubernetes cri-client remote_image.go (PullImage); pkg/kubelet/images image_manager.go (evalCRIPullErr).
    """
    if error.reason and method == _PULL:
        return grpc.StatusCode.UNKNOWN
    return _CODES[error.code]


async def _abort(error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
    if isinstance(error, grpc.aio.AbortError | grpc.RpcError):
        raise error
    if isinstance(error, ImgsvcError):
        text = f"{error.reason}: {error}" if error.reason else str(error)
        log.log(_level(method, error), "%s: %s: %s", method.rpartition("/")[2], error.code, text)
        await context.abort(_code(error, method), fit(text))
    if isinstance(error, NotImplementedError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method.rpartition('/')[2]} is not implemented")
    if isinstance(error, asyncio.TimeoutError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "timed out")
    log.error("%s failed unexpectedly", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; see the daemon's log")
