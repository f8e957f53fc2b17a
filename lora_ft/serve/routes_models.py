"""Routes of models: bases, what jobs made of them, and their checkpoints."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lora_ft.serve.refusals import bad
from lora_ft.serve.state import Server

router = APIRouter(prefix="/v1")


@router.get("/models")
def list_models(server: Server) -> dict[str, Any]:
    """Returns all models."""
    return {"object": "list", "data": server.models.list()}


# Names hold slashes, which some clients send as they are.
@router.get("/models/{model:path}")
def get_model(model: str, server: Server) -> dict[str, Any]:
    """Returns one model."""
    return server.models.get(_checked(model))


@router.delete("/models/{model:path}")
def delete_model(model: str, server: Server) -> dict[str, Any]:
    """Returns that the fine-tuned model is gone."""
    server.models.delete(_checked(model))
    server.answers.forget(model)
    return {"id": model, "object": "model", "deleted": True}


def _checked(name: str) -> str:
    if ".." in name.split("/"):
        raise bad("model", "The name of a model has no `..` in it.")
    return name
