"""Composition of conf/ and overrides into params.yaml. The only module that imports Hydra.

conf/config.yaml calls the resolver `vqvae2.record_composition` when all choices are known. It adds the section
`composed_from`, also in `dvc exp run`, which composes conf/ itself and finds the resolver through hydra_plugins/.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from pipeline import composed_from, conf_layers, dvc_experiment, group_files, params
from pipeline.composed_from import CONF, describe_source, key_of
from stages.config import Params
from stages.errors import UserError
from stages.images.layout import is_utf8

NOTICE = "# Composed from conf/. Choose or override settings: vqvae2 run -S experiment=smoke -S seed=1\n"
PRESETS = "experiment"  # the group whose files set any section
KEY_VALUE_SEPARATOR = "="  # Hydra's default for the setting that calls the resolver


def record_composition(*, _root_: DictConfig) -> str:
    """Add the section `composed_from` to a composition that Hydra has just finished.

    Ends the process if this is `dvc exp run` and a setting is invalid, or the dataset or the preset would change
    unasked. DVC itself would queue such an experiment.
    """
    chosen = reversed(_root_.hydra.runtime.choices.items())  # as in the defaults list of conf/config.yaml
    choices = {group: choice for group, choice in chosen if not group.startswith("hydra/")}
    overrides = OmegaConf.to_container(_root_.hydra.overrides.task, resolve=False)
    names = [str(name) for name in _root_ if name != "hydra"]
    settings = _to_mapping(OmegaConf.masked_copy(_root_, names))
    assert isinstance(overrides, list)
    section = composed_from.section(choices, overrides, settings)
    if dvc_experiment.is_composing():
        try:
            if PRESETS in settings and (mistake := group_files.explain(CONF, choices)):
                raise mistake
            composed = {**settings, composed_from.SECTION: section}
            params.check(composed, describe_source(composed_from.overrides_of(composed)))
            dvc_experiment.require_asked(composed)
        except UserError as error:  # Hydra would wrap it, and DVC would ask to report a bug
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.code) from None
    section["overrides"] = [composed_from.escape_interpolations(text) for text in section["overrides"]]
    with open_dict(_root_):
        _root_[composed_from.SECTION] = section
    return KEY_VALUE_SEPARATOR


OmegaConf.register_new_resolver("vqvae2.record_composition", record_composition, replace=True)
# For `hydra.searchpath` of a project: a path of one machine does not belong into its files.
OmegaConf.register_new_resolver("vqvae2.packaged_conf", lambda: str(conf_layers.PACKAGED), replace=True)


def compose_settings(overrides: Sequence[str]) -> tuple[dict[str, Any], Params]:
    """Compose conf/ with overrides; return the contents of params.yaml and the validated settings."""
    data = compose_params(overrides)
    try:
        return data, params.check(data, describe_source(overrides))
    except UserError as error:
        raise group_files.explain(CONF, composed_from.choices_of(data)) or error from None


def compose_params(overrides: Sequence[str] = (), conf: Path = CONF) -> dict[str, Any]:
    """Compose conf/ with overrides as plain data, without validation.

    Raises UserError if an override is malformed or names no setting, or if a file in conf/ is not valid.
    """
    where = describe_source(overrides, conf)
    for override in overrides:
        if len(override.splitlines()) > 1 or not is_utf8(override):  # a command that repeats it is one line of text
            raise UserError(
                f"{override!r} is not a valid override.", where=f"{conf}/", fix="Write it as one line of text.", code=2
            )
    if not (conf / f"{conf_layers.primary(conf)}.yaml").is_file():
        raise UserError(
            "conf/config.yaml does not exist.", where=Path.cwd(), fix="Change to the folder of the project.", code=2
        )
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            config = compose(conf_layers.primary(conf), overrides=[expand_home(override) for override in overrides])
            return _to_mapping(config)
    except (HydraException, OmegaConfBaseException) as error:
        preset = {key_of(override): override.partition("=")[2] for override in overrides}.get(PRESETS)
        choices = {PRESETS: preset or group_files.default_choice(conf, PRESETS)}
        raise group_files.explain(conf, choices) or to_user_error(error, overrides, where) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        file = Path(mark.name).relative_to(conf.resolve()) if mark else None  # the package's own files are valid
        raise UserError(
            f"{file.name if file else 'A file in conf/'} is not valid YAML: {error.problem}.",
            where=f"{conf / file}, line {mark.line + 1}" if mark and file else where,
            fix="Fix that line.",
            code=2,
        ) from None


def _to_mapping(config: DictConfig) -> dict[str, Any]:
    data = OmegaConf.to_container(config, resolve=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def expand_home(override: str) -> str:
    """Replace a leading ~ of a value by the home folder: a shell does so only at the start of a word."""
    key, sign, value = override.partition("=")
    quote = value[:1] if value[:1] in "'\"" else ""
    path = value.removeprefix(quote)
    return f"{key}{sign}{quote}{os.path.expanduser(path)}" if sign and path.startswith("~") else override  # noqa: PTH111


def to_user_error(error: Exception, overrides: Sequence[str], where: str) -> UserError:
    """Convert an error of Hydra into one in terms of the command line."""
    what, *more = str(error).strip().splitlines()
    fix = "Write key=value, such as seed=1, or group=choice, such as experiment=smoke."
    if isinstance(error, OverrideParseException):
        what = f"{error.override} is not a valid override."
        fix = _quoted(error.override) or fix
    elif match := re.match("Ambiguous value for argument '(.+)'$", what):
        what = f"{match[1]} is ambiguous: it may be one value or a list."
        key, _, values = match[1].partition("=")
        fix = f"{_quoted(match[1])}, or write a list: -S '{key}=[{values}]'"
    elif match := re.search(r"already at '(.+)'", what) or re.match(r"Multiple values for (\w+)", what):
        what, fix = f"{match[1].rstrip('.')} is already set, so + cannot add it.", "Remove the +."
    elif isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        what, fix = f"{choice} is not a valid {group}.", f"Use one of: {', '.join(sorted(error.options))}"
    elif match := re.search(r"Could not override '([^']+)'", what):
        near = params.nearest(match[1])
        what = f"{match[1]} is not a valid setting."
        if more and more[0].startswith("Did you mean to override "):  # a group that is used under other keys
            fix = f"Did you mean {more[0].removeprefix('Did you mean to override ')}"
        elif near == match[1] or match[1].rpartition(".")[0] in params.NAMED_BY_USERS:
            # A valid name, of a level, a group or a network that this composition does not have.
            what = f"{match[1]} is not in the composed settings."
            fix = "Add it with a +: " + " ".join(f"-S '+{override}'" for override in overrides if match[1] in override)
        elif near:
            fix = f"Did you mean {near}?"
        elif siblings := params.within(match[1].rpartition(".")[0]):
            fix = f"Use one of: {', '.join(siblings)}"
        else:
            fix = "List all settings: vqvae2 config"
    return UserError(what, where=where, fix=fix, code=2)


def _quoted(override: str) -> str:
    """Suggest quotes around a value with characters that Hydra's grammar does not allow outside of them."""
    key, sign, value = override.partition("=")
    value = value.strip("'\"")
    if not (sign and key and value):
        return ""
    return f"""Quote the value: -S "{key}='{value}'\""""


def to_yaml(data: dict[str, Any]) -> str:
    """Format composed settings as the text of params.yaml."""
    return NOTICE + params.to_yaml(data)
