"""Composition of conf/ and overrides into params.yaml. The only module that imports Hydra."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from pipeline import params
from pipeline.params_header import CONF, describe_source, format_header
from stages.config import Params
from stages.errors import UserError


def compose_settings(overrides: Sequence[str]) -> tuple[dict[str, Any], Params]:
    """Compose conf/ with overrides; return the contents of params.yaml and the validated settings."""
    data = compose_params(overrides)
    return data, params.check(data, describe_source(overrides))


def compose_params(overrides: Sequence[str] = (), conf: Path = CONF) -> dict[str, Any]:
    """Compose conf/ with overrides as plain data, without validation.

    Raises UserError if an override is malformed or names no setting, or if a file in conf/ is not valid.
    """
    where = describe_source(overrides, conf)
    for override in overrides:
        if len(override.splitlines()) > 1 or not _is_utf8(override):  # the header of params.yaml is one line of text
            raise UserError(
                f"{override!r} is not a valid override.", where=f"{conf}/", fix="Write it as one line of text.", code=2
            )
    if not (conf / "config.yaml").is_file():
        raise UserError(
            "conf/config.yaml does not exist.", where=Path.cwd(), fix="Change to the folder of the project.", code=2
        )
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            config = compose("config", overrides=list(overrides))
            data = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise to_user_error(error, overrides, where) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        file = Path(mark.name).relative_to(conf.resolve()) if mark else None
        raise UserError(
            f"{file.name if file else 'A file in conf/'} is not valid YAML: {error.problem}.",
            where=f"{conf / file}, line {mark.line + 1}" if mark and file else where,
            fix="Fix that line.",
            code=2,
        ) from None
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _is_utf8(override: str) -> bool:
    """Return whether an argument is valid UTF-8: a shell may pass any bytes, which Python decodes to surrogates."""
    try:
        override.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        elif near == match[1]:  # a valid name, of a level or a group that this composition does not have
            what = f"{match[1]} is not in the composed settings."
            fix = "Add it with a +: " + " ".join(f"-S '+{override}'" for override in overrides if near in override)
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


def to_yaml(data: dict[str, Any], overrides: Sequence[str] = ()) -> str:
    """Format composed settings as the text of params.yaml, with the overrides in its header."""
    return format_header(overrides) + params.to_yaml(data)
