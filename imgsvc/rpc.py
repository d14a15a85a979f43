"""From our errors to gRPC status: the only place that knows gRPC codes.

One interceptor wraps every handler, unary and streaming. What we raise on purpose becomes its status; anything else is a
bug: logged with its traceback, answered as INTERNAL without inner details.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio

from imgsvc.errors import ImgsvcError

log = logging.getLogger(__name__)

_CODES = {code.name: code for code in grpc.StatusCode}


if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor  # generic in the type stubs only


class ErrorInterceptor(_Interceptor):
    """Turns exceptions of handlers into gRPC status."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the handler that would serve this call."""
        handler = cast("grpc.RpcMethodHandler[Any, Any] | None", await continuation(handler_call_details))
        if handler is None:
            return cast("grpc.RpcMethodHandler[Any, Any]", None)  # an unknown method; gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                _unary(handler.unary_unary, method), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, method), handler.request_deserializer, handler.response_serializer
            )
        return handler


def _unary(handle: Any, method: str) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await handle(request, context)
        except Exception as error:  # noqa: BLE001  # the RPC edge: every failure becomes a status here
            await _abort(error, context, method)

    return call


def _stream(handle: Any, method: str) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for reply in handle(request, context):
                yield reply
        except Exception as error:  # noqa: BLE001  # the RPC edge: every failure becomes a status here
            await _abort(error, context, method)

    return call


async def _abort(error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
    if isinstance(error, grpc.aio.AbortError | grpc.RpcError):
        raise error
    if isinstance(error, ImgsvcError):
        text = f"{error.reason}: {error}" if error.reason else str(error)
        log.warning("%s: %s: %s", method.rpartition("/")[2], error.code, text)
        await context.abort(_CODES[error.code], text)
    if isinstance(error, NotImplementedError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method.rpartition('/')[2]} is not implemented")
    if isinstance(error, asyncio.TimeoutError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "timed out")
    log.error("%s failed unexpectedly", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; see the daemon's log")
