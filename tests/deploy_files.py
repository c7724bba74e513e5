"""What is wrong with the files in deploy/: by their schemas, and by what our own command line and settings know."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import ray
import yaml

from kvstore.cli.common import configuration
from kvstore.cli.main import parser
from kvstore.config import parse_toml
from kvstore.errors import ConfigError

ROOT = Path(__file__).parent.parent
SCHEMAS = Path(__file__).parent / "schemas"


def schema_problems(documents: Iterable[Any], schema: dict[str, Any]) -> list[str]:
    """Each field that the schema does not know or allow."""
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for document in documents
        for found in validator.iter_errors(document)
        for error in (jsonschema.exceptions.best_match([found]) or found,)
    ]


def kubernetes_problems(text: str) -> list[str]:
    """By kind, so that a message names the field."""
    schema = json.loads((SCHEMAS / "kubernetes.json").read_text())
    found: list[str] = []
    for document in yaml.safe_load_all(text):
        kind = document.get("kind")
        if kind not in schema["$defs"]:
            found.append(f"kind {kind}: unknown")
            continue
        found += schema_problems([document], {"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]})
    return found


def compose_problems(text: str) -> list[str]:
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    document = yaml.safe_load(text)
    found = schema_problems([document], schema)
    for name, service in document["services"].items():
        for kind in ("networks", "secrets"):
            found += [f"{name}: no {kind} {one}" for one in service.get(kind, ()) if one not in document[kind]]
        mounts = [volume.split(":")[0] for volume in service.get("volumes", ())]
        found += [f"{name}: no volume {one}" for one in mounts if one not in document["volumes"]]
        found += [
            f"{name}: no service {one}" for one in service.get("depends_on", ()) if one not in document["services"]
        ]
        found += setting_problems(service.get("environment", {}), service.get("command", []))
    return found


def ray_problems(text: str) -> list[str]:
    """By the schema that Ray ships."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    return schema_problems([yaml.safe_load(text)], schema)


def pod_problems(text: str) -> list[str]:
    """Mounts without a volume, volumes of objects that nobody makes, settings that do not exist."""
    found: list[str] = []
    documents = list(yaml.safe_load_all(text))
    maps = {d["metadata"]["name"]: d for d in documents if d["kind"] == "ConfigMap"}
    for pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
        for container in pod["spec"]["containers"]:
            found += [f"no volume {m['name']}" for m in container["volumeMounts"] if m["name"] not in volumes]
        wanted = [volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume]
        found += [f"no ConfigMap {name}" for name in wanted if name not in maps]
    for document in maps.values():
        for name, content in document["data"].items():
            try:
                parse_toml(content, name)
            except ConfigError as error:
                found.append(str(error))
    return found


def pods(documents: Iterable[Any]) -> Iterator[Any]:
    for document in documents:
        if document["kind"] == "RayCluster":
            spec = document["spec"]
            yield spec["headGroupSpec"]["template"]
            yield from (group["template"] for group in spec["workerGroupSpecs"])


def setting_problems(environment: dict[str, str], command: list[str]) -> list[str]:
    """What our own parser and configuration say of a command and its variables."""
    if command[:1] != ["kvstore"]:
        return []
    try:
        arguments = parser().parse_args(command[1:])
        configuration(arguments, {k: v for k, v in environment.items() if k.startswith("KVSTORE_")})
    except (ConfigError, SystemExit, argparse.ArgumentError) as error:
        return [f"{shlex.join(command)}: {error}"]
    return []


def commented_commands(text: str) -> list[list[str]]:
    """Command lines of ours that a file's comments name."""
    joined = re.sub(r"\\\n#\s*", " ", text)
    lines = (line.lstrip("# ").strip() for line in joined.splitlines() if line.startswith("#"))
    return [shlex.split(line[line.index("kvstore up") :]) for line in lines if "kvstore up --" in line]


def dockerfile_problems(text: str) -> list[str]:
    """COPY of what is not there, an image without a version, a container of root's."""
    found: list[str] = []
    user = "root"
    stages: list[str] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            image, *name = rest.split()
            stages += name[1:]
            if not re.search(r":\d+\.\d+\.\d+", image):
                found.append(f"{image}: name a version")
        elif word == "COPY":
            *sources, _ = rest.split()
            if sources[0].startswith("--from="):
                if sources[0].removeprefix("--from=") not in stages:
                    found.append(f"COPY {rest}: no such stage")
            else:
                found += [f"COPY {source}: not in the repository" for source in sources if not (ROOT / source).exists()]
        elif word == "USER":
            user = rest
        elif word and not word.startswith("#") and word not in INSTRUCTIONS:
            found.append(f"{word}: no instruction")
    return found if not user.startswith(("root", "0")) else [*found, "runs as root"]


INSTRUCTIONS = ("WORKDIR", "RUN", "ENV", "EXPOSE", "STOPSIGNAL", "CMD", "ENTRYPOINT", "LABEL", "ARG", "VOLUME")
