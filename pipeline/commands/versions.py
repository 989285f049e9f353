"""`vqvae2 versions`: the result version of each stage, and the committed table of known versions."""

import json
from collections.abc import Sequence

from pipeline import code_version, dvc_yaml, params, result_versions
from pipeline.code_version import Code
from pipeline.commands import same_results
from pipeline.text import first_few
from stages.errors import UserError
from stages.formats.artifact import atomic_write


def run(*, write: bool, compare: str, new: Sequence[str], same_as: str, reason: str) -> int:
    """Show the versions, or write, compare or record them."""
    if write:
        return write_file()
    if compare:
        differences = same_results.compare(compare)
        print("\n".join(differences) or "All artifacts are equal.")
        return 1 if differences else 0
    if new or same_as:
        return record(new, same_as=same_as, reason=reason)
    return show()


def show() -> int:
    """Print the result version of each stage, and the code that has changed since the table was written."""
    data = params.read()
    settings = params.check(data)
    for stage in dvc_yaml.stages(data).values():
        code = result_versions.code_of(stage, settings)
        version = str(code.version)
        if stage.cli_name in settings.keep_results:
            version = f"{result_versions.kept_version(stage)} (kept; this code computes version {version})"
        if isinstance(code.version, str):
            changes = code_version.changed_definitions(code.definitions)
            version += f"  not in the table; changed: {first_few(changes, 5)}"
        print(f"{stage.cli_name:<13} {version}")
    return 0


def write_file() -> int:
    """Write the versions to the file that DVC watches."""
    data = params.read()
    result_versions.write(data, params.check(data))
    return 0


def record(changed: Sequence[str], *, same_as: str, reason: str) -> int:
    """Record the code as it is now in the table.

    The stages in `changed` compute something else and get a new version number. With `same_as`, a Git revision, the
    others keep theirs: the smoke pipeline runs at both revisions and must make equal artifacts.
    Raises UserError if a stage is unknown, a reason is missing, or artifacts differ.
    """
    keys = code_version.table_keys()
    for key in changed:
        if key not in keys:
            raise UserError(f"{key!r} is not a stage.", where="--new", fix=f"Use any of: {', '.join(keys)}", code=2)
    if not reason:
        raise UserError("A reason is missing.", where="--reason", fix="State in a sentence what changed.", code=2)
    table = code_version.read_table()
    codes = {key: _code_of(key) for key in keys}
    unproven = [
        key
        for key, code in codes.items()
        if isinstance(code.version, str) and key not in changed and key in table["versions"]
    ]
    if unproven and not same_as:
        raise UserError(
            f"The code of {', '.join(unproven)} has changed.",
            where=code_version.TABLE,
            fix="Name each stage that computes something else by --new; prove that the others compute the same by "
            "--same-as REVISION.",
            code=2,
        )
    if unproven:
        same_results.require(same_as, unproven)
    definitions: dict[str, str] = {}
    for key, code in codes.items():
        versions = table["versions"].setdefault(key, {})
        newest = max((entry["version"] for entry in versions.values()), default=0)
        if code.hash not in versions:
            is_new = key in changed or not newest
            versions[code.hash] = {"version": newest + is_new, "reason": reason}
        definitions |= code.definitions
    table["definitions"] = dict(sorted(definitions.items()))
    with atomic_write(code_version.TABLE) as path:
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return show()


def _code_of(key: str) -> Code:
    module, _, network = key.partition(".")
    return code_version.code_of(module, network)
