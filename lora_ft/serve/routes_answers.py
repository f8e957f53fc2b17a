"""Routes of answers: chat completions and completions, whole or streamed."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from lora_ft.serve import answers, chats, completions
from lora_ft.serve.asked import ChatRequest, CompletionRequest
from lora_ft.serve.bodies import documented, reader
from lora_ft.serve.state import Server

router = APIRouter(prefix="/v1")


@router.post("/chat/completions", openapi_extra=documented(ChatRequest))
async def chat(request: Request, server: Server, body: Annotated[ChatRequest, Depends(reader(ChatRequest))]) -> Any:
    """Returns the answer to a conversation."""
    asking = await server.answers.ask_chat(body)
    if not body.stream:
        return await chats.answer(asking, body, request.is_disconnected)
    return answers.Stream(asking, chats.stream(asking, body, request.is_disconnected))


@router.post("/completions", openapi_extra=documented(CompletionRequest))
async def complete(
    request: Request, server: Server, body: Annotated[CompletionRequest, Depends(reader(CompletionRequest))]
) -> Any:
    """Returns texts gone on with."""
    asking = await server.answers.ask_completion(body)
    if not body.stream:
        return await completions.answer(asking, body, request.is_disconnected)
    return answers.Stream(asking, completions.stream(asking, body, request.is_disconnected))
