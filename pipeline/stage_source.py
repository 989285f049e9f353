"""Result version of a stage: an identifier of the source code that determines what the stage computes.

The source of a stage is the set of definitions (functions, classes, constants) in stages/ and models/ that its `run`
function reaches. Each definition is hashed as a syntax tree without comments, docstrings, annotations, formatting and
texts of errors, so none of those makes a finished result out of date.

Equivalent revisions share one version: the hash of the first. known_versions.json maps the hash of a later revision to
it, if the smoke pipeline gives equal results (`vqvae2 versions --same-as`). A hash that is not in the table is a
version by itself, so branches that diverge never share a version by accident.
"""

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import models
from models.config import PriorConfig
from pipeline import source_cache, syntax

PACKAGES = ("stages", "models")
ROOT = Path(models.__file__).parents[1]  # folder of the running packages
TABLE = Path(__file__).with_name("known_versions.json")
HASH_LENGTH = 16  # hexadecimal digits; 64 bits: no collision among a few hundred hashes

# Patterns of reachable definitions that cannot change the result -> reason. A pattern covers everything below it. What
# excluded code references is still hashed.
EXCLUDED = {
    "stages.errors": "texts of errors",
    "stages.config.*.__post_init__": "validation of settings",
    "stages.cluster_config": "where a stage runs, not what it computes",
    "models.config.*.__post_init__": "validation of settings",
    "models.config.check_*": "validation of settings",
    "stages.images.count": "texts of messages",
    "stages.formats.config_schema": "validation of settings",
    "stages.runtime": "where a stage runs, not what it computes",
    "stages.tracking": "what is reported, not what is computed",
    "stages.mapping": "which process computes a part; the result of a part does not depend on it",
    "stages.training.ray_train": "which processes train; one and several workers see the same batches",
    "stages.training.elastic": "how many processes train; one and several workers see the same batches",
    "stages.training.node_checkpoints": "resuming gives bit-identical results",
    "stages.training.failures": "texts of errors",
    "stages.images.overview": "what is reported, not what is computed",
    "stages.training.checkpoint": "resuming gives bit-identical results",
    "stages.formats.artifact": "how a folder is committed, not what it holds",
}
# The same for single stages.
EXCLUDED_FROM_STAGE = {
    "vqvae": {"stages.images.contact_sheet": "layout of a picture beside the weights; must not trigger retraining"}
}
# Files other than Python code that determine a result, by the module that reads them.
RESOURCES = {"stages.evaluation.report": ("report.html.j2", "report.js"), "stages.formats.html_page": ("page.css",)}
PARSERS = (Path(__file__), Path(syntax.__file__))  # modules that decide a hash
NETWORKS = get_args(get_type_hints(PriorConfig)["name"])  # each is a file in models/priors/


class DefinitionId(NamedTuple):
    """Module and name of a definition; the name "" stands for all statements of the module that define nothing."""

    module: str
    definition: str


@dataclass(frozen=True)
class StageSource:
    """Source code that determines the result of one stage."""

    hash: str
    version: str  # hash of the first equivalent revision
    is_recorded: bool  # in the table
    definitions: Mapping[str, str]  # dotted name of each function, method, class and constant -> hash


def source_of(module: str, network: str = "", root: Path | None = None) -> StageSource:
    """Hash the code that determines the result of `stages.{module}`.

    `network` names the file in models/priors/ that a prior uses: the other networks are ignored. `root` holds the
    packages; by default they are those that this process runs, of a checkout or an installed distribution.
    """
    key = f"{module}.{network}" if network else module
    if root is None:
        definitions = source_cache.load_or_compute(PARSERS, _source_files(), ROOT, _all_definitions)[key]
    else:
        definitions = _definitions(_read_sources(root), module, network)
    digest = _digest(json.dumps(sorted(definitions.items())))
    record = read_table()["versions"].get(key, {}).get(digest)
    return StageSource(digest, record["version"] if record else digest, record is not None, definitions)


def source_of_key(key: str) -> StageSource:
    """Hash the source of a key of the table, such as vqvae or prior.pixelcnn."""
    return source_of(*_split(key))


def _split(key: str) -> tuple[str, str]:
    module, _, network = key.partition(".")
    return module, network


def table_keys() -> list[str]:
    """List the keys of the table: the stages, with one key per network for the prior."""
    return [
        "shard",
        "vqvae",
        "codes",
        *(f"prior.{network}" for network in NETWORKS),
        "sample",
        "evaluate",
        "classifier",
        "reject",
    ]


def read_table() -> dict[str, Any]:
    """Read the committed table: versions by stage and hash, and the hash of every definition when it was written."""
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


def changed_definitions(definitions: Mapping[str, str]) -> list[str]:
    """Return the definitions whose hash differs from the table's."""
    recorded = read_table()["definitions"]
    return sorted(name for name, digest in definitions.items() if recorded.get(name) != digest)


def _python_files(root: Path) -> list[Path]:
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def _source_files() -> list[Path]:
    """List the files of the running packages that can determine a result."""
    return _python_files(ROOT) + [
        _resource(ROOT, module, name) for module, names in RESOURCES.items() for name in names
    ]


def _resource(root: Path, module: str, name: str) -> Path:
    return root.joinpath(*module.split(".")).with_name(name)


def _all_definitions() -> dict[str, dict[str, str]]:
    """Hash the definitions of every key of the table, in the running packages."""
    sources = _read_sources(ROOT)
    return {key: _definitions(sources, *_split(key)) for key in table_keys()}


def _definitions(sources: "_Sources", module: str, network: str) -> dict[str, str]:
    """Hash every definition that `stages.{module}.run` reaches, by dotted name."""
    other_networks = {f"models.priors.{name}" for name in NETWORKS if network and name != network}
    reached: set[DefinitionId] = set()
    pending = [DefinitionId(f"stages.{module}", "run")]
    while pending:
        current = pending.pop()
        if current not in reached and current.module not in other_networks:
            reached.add(current)
            pending += sources.references(current)
            # Importing a module runs the statements of its packages: stages, stages.training, stages.training.loop.
            packages = accumulate(current.module.split("."), "{}.{}".format)
            pending += [DefinitionId(package, "") for package in packages]
    digests: dict[str, str] = {}
    for definition_id in sorted(reached):
        digests |= sources.hash_definition(definition_id)
    for module_name in {definition_id.module for definition_id in reached} & RESOURCES.keys():
        for file in RESOURCES[module_name]:
            contents = _resource(sources.root, module_name, file).read_text(encoding="utf-8")
            digests[f"{module_name}: {file}"] = _digest(contents)
    return {name: digest for name, digest in digests.items() if not is_excluded(name, module)}


def is_excluded(name: str, module: str) -> bool:
    """Return whether a definition cannot change the result of `stages.{module}`."""
    patterns = (*EXCLUDED, *EXCLUDED_FROM_STAGE.get(module, {}))
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


@dataclass(frozen=True)
class _Module:
    """Top-level definitions of a module, its other statements, and the targets of its imported names."""

    definitions: Mapping[str, list[ast.stmt]]
    other_statements: list[ast.stmt]
    imports: Mapping[str, DefinitionId]


def _read_sources(root: Path) -> "_Sources":
    """Return the sources below a folder. All stages share their caches, until a file changes."""
    return _cached_sources(root, source_cache.file_states(_python_files(root)))


@lru_cache(maxsize=2)
def _cached_sources(root: Path, states: tuple[source_cache.FileState, ...]) -> "_Sources":
    return _Sources(root)


class _Sources:
    """Syntax trees of the packages below one folder. Nothing is imported: importing torch would take seconds."""

    def __init__(self, root: Path):
        self.root = root
        self._modules: dict[str, _Module] = {}
        self._references: dict[DefinitionId, tuple[DefinitionId, ...]] = {}
        self._hashes: dict[DefinitionId, dict[str, str]] = {}

    def path(self, module: str) -> Path:
        path = self.root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def references(self, definition_id: DefinitionId) -> tuple[DefinitionId, ...]:
        """Return the definitions in our packages that a definition, or the rest of a module, references."""
        if definition_id not in self._references:
            self._references[definition_id] = tuple(self._find_references(*definition_id))
        return self._references[definition_id]

    def hash_definition(self, definition_id: DefinitionId) -> dict[str, str]:
        """Hash one definition. Methods are hashed separately, so that a report can name the changed one."""
        if definition_id not in self._hashes:
            self._hashes[definition_id] = self._hash(*definition_id)
        return self._hashes[definition_id]

    def _find_references(self, module: str, definition: str) -> Iterator[DefinitionId]:
        parsed = self._parse(module)
        for statement in parsed.definitions[definition] if definition else parsed.other_statements:
            for node in syntax.walk(statement, is_boundary=definition == "run" and module.startswith("stages.")):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    target = parsed.imports.get(node.value.id)
                    if target and not target.definition:
                        yield from self._resolve(target.module, node.attr)
                elif isinstance(node, ast.Name):
                    yield from self._resolve(module, node.id)

    def _hash(self, module: str, definition: str) -> dict[str, str]:
        parsed = self._parse(module)
        statements = parsed.definitions[definition] if definition else parsed.other_statements
        name = f"{module}.{definition}" if definition else module
        if len(statements) == 1 and isinstance(statements[0], ast.ClassDef):
            return _hash_class(name, statements[0])
        return {name: _digest("".join(map(syntax.serialize, statements)))} if statements else {}

    def _parse(self, module: str) -> _Module:
        if module not in self._modules:
            self._modules[module] = self._parse_file(module)
        return self._modules[module]

    def _parse_file(self, module: str) -> _Module:
        tree = syntax.parse(self.path(module).read_text(encoding="utf-8"))
        definitions: dict[str, list[ast.stmt]] = {}
        other_statements: list[ast.stmt] = []
        for statement in tree.body:
            names = list(syntax.defined_names(statement))
            for name in names:
                definitions.setdefault(name, []).append(statement)
            if (
                not names
                and not isinstance(statement, ast.Import | ast.ImportFrom)
                and not syntax.is_docstring(statement)
            ):
                other_statements.append(statement)
        return _Module(definitions, other_statements, dict(self._imports(tree)))

    def _imports(self, tree: ast.AST) -> Iterator[tuple[str, DefinitionId]]:
        """Yield local names and their targets, of imports from our packages anywhere in a module."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    is_module = self.path(submodule).is_file()
                    target = DefinitionId(submodule, "") if is_module else DefinitionId(node.module, alias.name)
                    yield alias.asname or alias.name, target

    def _resolve(self, module: str, name: str) -> Iterator[DefinitionId]:
        """Follow a name through imports to the module that defines it."""
        parsed = self._parse(module)
        if name in parsed.definitions:
            yield DefinitionId(module, name)
        elif target := parsed.imports.get(name):
            if target.definition:
                yield from self._resolve(*target)
            else:  # a module: its attributes are followed one by one, where they are used
                yield target


def _hash_class(name: str, node: ast.ClassDef) -> dict[str, str]:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    digests: dict[str, str] = {}
    for method in methods:  # a property and its setter share a name
        digests[f"{name}.{method.name}"] = _digest(digests.get(f"{name}.{method.name}", "") + syntax.serialize(method))
    rest = [item for item in node.body if item not in methods]
    class_without_methods = ast.ClassDef(
        name=node.name, bases=node.bases, keywords=node.keywords, body=rest, decorator_list=node.decorator_list
    )
    return {**digests, name: _digest(syntax.serialize(class_without_methods))}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]
