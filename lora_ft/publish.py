"""An adapter folder made ready for a model hub, and published: proven first, nothing in it but what belongs.

What is sent is a copy: with a card that names the repository, the base by its hub id and commit, and a manifest of
sizes and digests. The same folder gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from lora_ft import hub, report, saved, seal, sources
from lora_ft.data import vectors
from lora_ft.errors import AdapterError, StorageError
from lora_ft.foreign import strictjson, strictyaml
from lora_ft.foreign.files import MAX_TOKENIZER_BYTES, MB, bytes_of, object_of, text_of
from lora_ft.hub import UnavailableError
from lora_ft.pages import card, summary
from lora_ft.pages.summary import Summary
from lora_ft.proof import environment
from lora_ft.remote import PublishError, Remote, State
from lora_ft.settings import without_places
from lora_ft.system import atomicio, manifest
from lora_ft.system.redaction import HIDDEN, holds_secret, redacted
from lora_ft.training import logged

log = logging.getLogger(__name__)

# All that is published, where it is there. Texts may hold words of rows, and are searched for this machine's places.
TEXTS = (card.FILE, report.PAGE, summary.FILE, logged.FILE)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
SETTINGS = ("config.yaml", saved.CONFIG, environment.FILE, seal.FILES[1])
TENSORS = (saved.WEIGHTS, seal.FILES[0])
BELONG = (*TENSORS, *SETTINGS, *TOKENIZER, *vectors.FILES, *TEXTS, card.PICTURE)
# What a hub puts into a repository itself, and people beside any model.
ANYBODYS = re.compile(r"\.git\w+|README\.md|(LICEN[CS]E|NOTICE)(\.\w+)?", re.IGNORECASE)

MAX_CARD_BYTES = 4 * MB


@dataclass(frozen=True)
class Done:
    """What came of it."""

    repo: str
    commit: str
    """The commit, or the pull request as `refs/pr/N`."""
    tag: str | None
    """None for a pull request."""
    changed: bool
    private: bool
    left_out: tuple[str, ...]
    """Files of the folder that were not published."""
    shown: str
    """What of the rows can be read in the repository, in words; empty where nothing can."""

    def told(self) -> str:
        """Returns what to say of it, on several lines."""
        lines = [f"{self.repo}: {'published' if self.changed else 'is the same already; nothing was changed'}"]
        lines[0] += f", {self.commit}" + (f", tag {self.tag}" if self.tag else "")
        lines[0] += ", private" if self.private else ", for everybody to read"
        lines += [f"Whoever reads it can read {self.shown}."] if self.shown else []
        lines += [f"Not published, as no part of an adapter: {', '.join(self.left_out)}."] if self.left_out else []
        return "\n".join(lines)


def publish(
    folder: Path, repo: str, *, public: bool = False, as_request: bool = False, base_name: str | None = None
) -> Done:
    """Returns what came of publishing the adapter in `folder`: one commit and a tag, none where nothing has changed.

    Whatever stops it, the repository is as it was or as it is to be, and a second call does the rest.

    Args:
        repo: `NAMESPACE/NAME`.
        public: let everybody read it.
        as_request: open a pull request instead, which may be on the repository of somebody else; one on a public
            repository is for everybody to read, and needs `public` too. A private one stays private.
        base_name: hub id of the base, of an adapter whose record does not name one.

    Raises:
        ProofError: the adapter does not do what its seal says; nothing was published.
        AdapterError: the folder is incomplete, its base is none that others could get, or a file names the machine.
        PublishError: the hub did not take it.
    """
    if base_name is not None and Path(base_name).exists():
        raise PublishError(
            f"--base {base_name}: a folder of this name is here, and would be compared in place of the repository on "
            "the hub: call the same command from another folder."
        )
    remote = Remote(repo)
    told = summary.read(folder)
    from_file = told.base["source"] == "gguf"
    seal.verify(folder, base_name=None if from_file else base_name).require(folder)
    _warn_of_edits(folder, told)
    told, published = _described(folder, told, remote, base_name)
    state = remote.state()
    edited = _edited_card(remote, state)
    with atomicio.draft(sources.cache_home() / "publications" / repo.replace("/", "--")) as draft:
        _fill(draft, folder, told, published, edited)
        files = {path.relative_to(draft.path).as_posix(): path for path in manifest.files_of(draft.path)}
        message = f"{published.title}, adapter {environment.file_sha256(draft.path / manifest.NAME)[:12]}"
        state, changed, commit = _send(remote, state, files, message, public=public, as_request=as_request)
    tag = None if as_request else remote.tag(commit)
    private = state.private
    if public and private and not as_request:
        remote.make_public()
        private = False
    left_out = sorted(p.name for p in folder.iterdir() if p.name not in (*BELONG, manifest.NAME) and p.is_file())
    inner = {name.partition("/")[0] for name in BELONG if "/" in name}
    folders = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    left_out += sorted(f"{name}/" for name in folders if name not in inner)
    return Done(repo, commit, tag, changed, private, tuple(left_out), _shown(told))


def _send(
    remote: Remote, state: State | None, files: dict[str, Path], message: str, *, public: bool, as_request: bool
) -> tuple[State, bool, str]:
    """Returns the repository as it was found, whether it was changed, and the commit or request that has `files`."""
    if state is None and as_request:
        raise PublishError(f"{remote.repo}: there is no such repository, or this token may not see it: leave out --pr.")
    if state is None:
        remote.create(public=public)
        state = remote.state()
        if state is None:
            raise PublishError(
                f"{remote.repo}: the name is taken by a repository that this token may not see: choose another."
            )
    _refuse_other_use(remote.repo, state, public=public, as_request=as_request)
    changed = state.lacks(files)
    gone = [name for name in state.files if name in BELONG and name not in files]
    if not changed and not gone:
        return state, False, state.head
    title = message
    if as_request and (name := remote.request(title)) is not None:
        found = remote.state(name)
        if found is not None and not found.lacks(files):
            return state, False, name
    chosen = {name: files[name] for name in changed}
    return state, True, remote.commit(chosen, gone, message, state.head, request=as_request)


def _refuse_other_use(repo: str, state: State, *, public: bool, as_request: bool) -> None:
    """Raises PublishError where the repository is another thing's, or would show more people what is published."""
    others = [name for name in state.files if not ANYBODYS.fullmatch(name)]
    if others and not as_request and seal.FILES[1] not in state.files:
        raise PublishError(
            f"{repo}: the name is taken: it holds {others[0]}, and no adapter of lora-ft: choose another, or open a "
            "pull request on it with --pr."
        )
    if not state.private and not public:
        raise PublishError(
            f"{repo}: everybody can read this repository{', and requests on it' if as_request else ''}: add --public "
            "if that is meant, or choose another."
        )


def _warn_of_edits(folder: Path, told: Summary) -> None:
    """Says it where the card in the folder is not the one that belongs to it: the one published is written anew."""
    file = folder / card.FILE
    written = report.encoded(card.card(told, picture=(folder / card.PICTURE).is_file()))
    if file.is_file() and bytes_of(file, MAX_CARD_BYTES, AdapterError) != written:
        log.warning(
            "%s was edited, or is of another version of lora-ft: the card published is written anew; what you edit in "
            "the repository on the hub stays there",
            file,
        )


def _edited_card(remote: Remote, state: State | None) -> bytes | None:
    """Returns the card in the repository where somebody has edited it since it was published, which is to stay."""
    if state is None or card.FILE not in state.files:
        return None
    if manifest.NAME not in state.files:
        log.warning("%s: its %s makes room for the card; the commit before has it", remote.repo, card.FILE)
        return None
    held = remote.bytes_of(card.FILE, state.head, MAX_CARD_BYTES)
    try:
        last = remote.bytes_of(manifest.NAME, state.head, manifest.MAX_BYTES)
        told = manifest.parsed(last, Path(manifest.NAME))
        written = told["facts"].get("card_sha256") or told["files"].get(card.FILE, {}).get("sha256")
    except StorageError:  # somebody has edited that, too
        written = None
    if hashlib.sha256(held).hexdigest() == written:
        return None
    log.warning(
        "%s: %s was edited there, and stays as it is, whatever it says of an earlier version: remove it there to have "
        "the card written anew",
        remote.repo,
        card.FILE,
    )
    return held


def _described(folder: Path, told: Summary, remote: Remote, base_name: str | None) -> tuple[Summary, card.Published]:
    """Returns the summary with the base as others get it, and what is known of that base and of the data sets.

    Raises:
        AdapterError: nobody else could get the base. PublishError: the hub says nothing of it.
    """
    base = dict(told.base)
    if base["source"] == "hub":
        name, revision = str(base["repo"]), base["revision"]
    elif base["source"] == "wheel" and base["name"] in sources.ALIASES:
        name, revision = sources.ALIASES[base["name"]].repo, None
    elif base_name is None:
        raise AdapterError(
            f"{folder}: its base {base['name']!r} is a local {base['source']}, so nobody else could load the adapter: "
            "name the hub repository that holds these weights with --base."
        )
    elif base["source"] == "gguf":
        name, revision = base_name, None
    else:
        found = saved.find_base(folder, base, base_name)
        name, revision = base_name, found.revision
        base.update(name=name, source="hub", repo=name, revision=revision, origin=found.origin)
    about = _about(name, revision)
    if base["source"] == "hub" and "quantization_config" in _config_of(base):
        name, about = _unquantized(name, about)
    keys = [key for key in ("license", "license_name", "license_link") if isinstance(about.get(key), str)]
    licenses = {key: about[key] for key in keys}
    if licenses.get("license") == "other" and "license_link" not in licenses:
        licenses["license_link"] = f"{remote.api.endpoint}/{name}"
    if licenses.get("license") == "other":
        licenses.setdefault("license_name", f"license-of-{name.split('/')[1].lower()}")
    else:
        licenses = {key: value for key, value in licenses.items() if key == "license"}
    of_data: dict[str, str] = {}
    for kind, rows in told.data.items():
        if rows and (data_set := card.hub_data(rows)):
            stated = _about(data_set, None, data=True).get("license")
            of_data |= {kind: ", ".join(stated) if isinstance(stated, list) else str(stated)} if stated else {}
    record = {**told.environment, "base": base}
    told = dataclasses.replace(told, base=base, environment=record)
    return told, card.Published(remote.repo, name, licenses, of_data)


def _about(name: str, revision: str | None, *, data: bool = False) -> dict[str, Any]:
    try:
        return hub.about(name, revision, data=data)
    except UnavailableError as why:
        raise PublishError(
            f"{name}: its licence is part of the card, and cannot be had from the hub: {why}. Call the same command "
            "again once it answers."
        ) from None


def _config_of(base: dict[str, Any]) -> dict[str, Any]:
    return object_of(sources.recall(base).folder / "config.json", AdapterError, any_number=True)


def _unquantized(name: str, about: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the hub id that a quantized copy says it is of, and what is said of that; else those of the copy."""
    of = about.get("base_model")
    of = of[0] if isinstance(of, list) and len(of) == 1 else of
    if not isinstance(of, str):
        log.warning("%s is a quantized copy whose card does not say of which model: the card names the copy", name)
        return name, about
    found = _about(of, None)
    return of, found if found.get("license") else {**found, **{k: v for k, v in about.items() if "license" in k}}


def _fill(draft: atomicio.Draft, folder: Path, told: Summary, published: card.Published, edited: bytes | None) -> None:
    """Puts into the draft what is published of `folder`, the manifest last.

    Args:
        edited: the card that stays in the repository, in place of the one that is written.

    Raises:
        AdapterError: a file holds a secret or names the machine, or is not the one that was verified.
    """
    for name in BELONG:
        if (folder / name).is_file() and name not in (*TEXTS, *SETTINGS):
            atomicio.make_folder((draft.path / name).parent)
            draft.copy(folder / name, name)
    for name in (logged.FILE, "config.yaml", seal.FILES[1]):
        if (folder / name).is_file():
            draft.write(name, text_of(folder / name, MAX_TOKENIZER_BYTES, AdapterError))
    _rewrite_config(draft, published.title)
    draft.write_json(environment.FILE, told.environment)
    settings = saved.read_settings(folder)
    exact = told.base["source"] == "hub" and told.base["repo"] == published.base
    settings.update(base_model_name_or_path=published.base, revision=told.base["revision"] if exact else None)
    draft.write_json(saved.CONFIG, settings, sort_keys=True)
    if (draft.path / "tokenizer_config.json").is_file():
        told_by_makers = object_of(draft.path / "tokenizer_config.json", AdapterError, any_number=True)
        # Where its makers kept it is of no use to anybody.
        kept = {k: v for k, v in told_by_makers.items() if not (isinstance(v, str) and _is_place(v))}
        if kept != told_by_makers:
            draft.write_json("tokenizer_config.json", kept)
    told = dataclasses.replace(
        told,
        title=published.title,
        config=without_places({**told.config, "out": published.title}),
        files={name: environment.file_sha256(draft.path / name) for name in (saved.WEIGHTS, saved.CONFIG)},
    )
    picture = (draft.path / card.PICTURE).is_file()
    draft.write(card.FILE, card.card(told, published, picture).encode("utf-8", errors="replace"))
    draft.write_json(summary.FILE, summary.kept(told))
    if (folder / report.PAGE).is_file():
        draft.write(report.PAGE, report.encoded(report.page(told, logged.read(draft.path / logged.FILE))))
    for name in TEXTS:
        if (draft.path / name).is_file():
            text = (draft.path / name).read_text(encoding="utf-8")
            hidden = _hidden(text)
            if hidden != text:
                log.info("%s: secrets and places of this machine are published as %s", name, HIDDEN)
                draft.write(name, hidden)
    _refuse_leaks(draft.path)
    sealed = seal.read(draft.path)
    if environment.file_sha256(draft.path / saved.WEIGHTS) != sealed.record["adapter_sha256"]:
        raise AdapterError(f"{folder / saved.WEIGHTS}: has changed since it was verified: publish it again.")
    written = environment.file_sha256(draft.path / card.FILE)
    if edited is not None:
        draft.write(card.FILE, edited)
    facts = {"card_sha256": written,
             "base": told.base, "base_model": published.base, "data": told.data, "seed": told.config["train"]["seed"],
             "versions": told.environment["versions"], "fit": told.fit, "kl_effect": sealed.effect}  # fmt: skip
    draft.write(manifest.NAME, manifest.made_of(draft.path, facts))


def _rewrite_config(draft: atomicio.Draft, title: str) -> None:
    """Rewrites the configuration without places outside the folder that it was made in, or the name of the run's own.

    One that holds what is refused is left as it is, for the refusal to name the line.
    """
    text = (draft.path / "config.yaml").read_text(encoding="utf-8")
    if not holds_secret(text) and not _places().search(text):
        kept = without_places({**_settings("config.yaml", text), "out": title})
        draft.write("config.yaml", yaml.safe_dump(kept, sort_keys=False))


def _settings(name: str, text: str) -> dict[str, Any]:
    """Returns the settings in a file of an adapter. Raises AdapterError where two readers could take them otherwise."""
    try:
        found = strictyaml.loads(text) if name.endswith(".yaml") else strictjson.loads(text, any_number=True)
    except (strictyaml.YamlError, strictjson.JsonError) as error:
        raise AdapterError(f"{name}: cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{name}: it holds a {type(found).__name__}, not an object.")
    return found


def _refuse_leaks(place: Path) -> None:
    """Raises AdapterError naming each file in which a secret is, or a place of this or another machine."""
    problems, places = [], _places()
    for path in manifest.files_of(place):
        name = path.relative_to(place).as_posix()
        if name in TENSORS:
            with path.open("rb") as stream:
                text = stream.read(int.from_bytes(stream.read(8), "little")).decode("utf-8", "replace")
        else:
            text = path.read_bytes().decode("utf-8", "replace")
        for told, found in (("holds a secret", holds_secret), ("names a place of this machine", places.search)):
            # A tokenizer has hundreds of thousands of lines, and hardly ever one that is looked for.
            if found(text):
                number = next((n for n, line in enumerate(text.splitlines(), 1) if found(line)), 1)
                problems.append(f"{name}:{number}: {told}")
        if name in SETTINGS or name == "tokenizer_config.json":
            tree = {
                key: value for key, value in _settings(name, text).items() if (name, key) != (environment.FILE, "task")
            }
            problems += [f"{name}: {key} is a path" for key, value in _texts(tree) if _is_place(value)]
    if problems:
        raise AdapterError(f"Nothing was published: {'; '.join(problems[:8])}. Take it out, and publish again.")


def _hidden(text: str) -> str:
    return _places().sub(HIDDEN, redacted(text))


def _places() -> re.Pattern[str]:
    """Returns a pattern of what says where this machine keeps things, and whose it is."""
    found = {str(place.absolute()) for place in (Path.home(), Path.cwd(), sources.cache_home())}
    found |= {str(Path(place).resolve()) for place in found}
    long = [place for place in found if len(Path(place).parts) > 2]
    # A short one, such as /root, is also a word.
    parts = [rf"{re.escape(place)}(?![\w-])" for place in sorted(long, key=len, reverse=True)]
    parts += [rf"{re.escape(place)}/(?=\w)" for place in found if len(Path(place).parts) == 2]
    with contextlib.suppress(OSError, KeyError):  # some containers have no name for their user
        parts.append(rf"(?:/home/|/Users/|\\Users\\+){re.escape(getpass.getuser())}(?![\w-])")
    return re.compile("|".join(parts))


def _is_place(value: str) -> bool:
    """Returns whether a text is nothing but a path that leads to a place of its machine: absolute, or outwards."""
    if re.fullmatch(r"(~[\w.-]*|\.\.)([\\/]\.\.)*[\\/][\w.@ +:\\/-]*\w[\\/]?", value):
        return True
    if "\n" in value or not (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return False
    return bool(re.fullmatch(r"(/[\w.@ +-]+){2,}/?|[A-Za-z]:[\\/].+", value))


def _texts(tree: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yields each text of nested objects and lists, with its place."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{place}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _texts(value, f"{place}[{number}]")
    elif isinstance(tree, str):
        yield place, tree


def _shown(told: Summary) -> str:
    """Returns what of the rows stands in what is published."""
    kept = f"{told.seal['rows']} rows as token ids" if told.seal.get("rows") else ""
    samples = f"{len(told.samples)} samples in words" if told.samples else ""
    return " and ".join(part for part in (kept, samples) if part)
