"""What a model hub asks of a card's metadata, as its documentation says: what a test hub answers to `validate-yaml`."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bsd-2-clause", "bsd-3-clause",
    "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "gemma",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "unknown", "other",
}  # fmt: skip
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
PIPELINES = {"text-generation", "text-classification", "token-classification", "text2text-generation",
             "feature-extraction", "sentence-similarity"}  # fmt: skip
ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def problems(card: str) -> list[str]:
    """Returns what the hub would not take."""
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if not found:
        return ["there is no metadata"]
    try:
        told = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    if not isinstance(told, dict):
        return ["the metadata is no mapping"]
    return [*_of_names(told), *_of_license(told), *_of_results(told)]


def _of_names(told: dict[str, Any]) -> list[str]:
    wrong = []
    for key in ("base_model", "datasets"):
        names = told.get(key, [])
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not ID.fullmatch(name):
                wrong.append(f'"{key}" with value "{name}" is not valid. Use a model id from the hub.')
    if told.get("base_model_relation", "adapter") not in RELATIONS:
        wrong.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    if told.get("pipeline_tag", "text-generation") not in PIPELINES:
        wrong.append('"pipeline_tag" is not one of the known tasks')
    for key in ("tags", "metrics"):
        if not all(isinstance(item, str) and item for item in told.get(key, [])):
            wrong.append(f'"{key}" must be a list of texts')
    if not isinstance(told.get("library_name", ""), str):
        wrong.append('"library_name" must be a string')
    return wrong


def _of_license(told: dict[str, Any]) -> list[str]:
    if "license" not in told:
        return []
    if told["license"] not in LICENSES:
        return [f'"license" must be one of {sorted(LICENSES)}']
    if told["license"] == "other" and not (told.get("license_name") and told.get("license_link")):
        return ['"license: other" needs "license_name" and "license_link"']
    return []


def _of_results(told: dict[str, Any]) -> list[str]:
    if "model-index" not in told:
        return []
    try:
        _, results = model_index_to_eval_results(told["model-index"])
    except (KeyError, TypeError, AttributeError) as error:
        return [f'"model-index" is not as documented: {error!r}']
    return [f'"model-index": {one.metric_type} is no number' for one in results
            if not isinstance(one.metric_value, int | float) or isinstance(one.metric_value, bool)]  # fmt: skip
