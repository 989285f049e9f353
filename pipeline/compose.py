"""Choices in conf/, composed into the text of params.yaml. The one file that knows Hydra."""

import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML
from yaml import MarkedYAMLError

from pipeline.params import nearest, within
from pipeline.params_header import OVERRIDES, describe_source
from stages.errors import UserError

HEADER = """\
# Composed from conf/ by `vqvae2 config --write`. Edit conf/ instead, or override: vqvae2 run -S seed=1
"""


def compose_params(overrides: Sequence[str] = (), conf: Path = Path("conf")) -> dict[str, Any]:
    """Compose conf/ with overrides as plain data, not yet checked."""
    where = describe_source(overrides, conf)
    for override in overrides:
        if len(override.splitlines()) > 1 or not _is_text(override):  # it could not stand in a line of params.yaml
            raise UserError(f"{override!r} is no override.", where=f"{conf}/", fix="Write it in one line.", code=2)
    if not (conf / "config.yaml").is_file():
        raise UserError("There is no conf/config.yaml here.", where=Path.cwd(), fix="Run in the project.", code=2)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            config = compose("config", overrides=list(overrides))
            data = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise to_user_error(error, overrides, where) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(
            f"The file is not valid YAML: {error.problem}.",
            where=f"{conf / Path(mark.name).relative_to(conf.resolve())}, line {mark.line + 1}" if mark else where,
            fix="Mend that line.",
            code=2,
        ) from None
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _is_text(override: str) -> bool:
    """Say whether UTF-8 can hold it: what a shell passes on may be any bytes."""
    try:
        override.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_user_error(error: Exception, overrides: Sequence[str], where: str) -> UserError:
    """Say what Hydra says, in the words of the command line."""
    what, *more = str(error).strip().splitlines()
    fix = "Write key=value, such as seed=1, or group=choice, such as experiment=smoke."
    if isinstance(error, OverrideParseException):
        what = f"{error.override} is no override."
        fix = _quoted(error.override) or fix
    elif match := re.match("Ambiguous value for argument '(.+)'$", what):
        what = f"{match[1]} could be one value or several."
        fix = f"{_quoted(match[1])}, or write a list as -S 'key=[a,b]'."
    elif "already at" in what or what.startswith("Multiple values for "):
        fix = "Leave out the +."
    elif isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        what, fix = f"{group} has no choice {choice}.", f"Use one of: {', '.join(sorted(error.options))}"
    elif match := re.search(r"Could not override '([^']+)'", what):
        near = nearest(match[1])
        what = f"{match[1]} is not a setting."
        if more and more[0].startswith("Did you mean to override "):  # a group that has its place elsewhere
            fix = f"Did you mean {more[0].removeprefix('Did you mean to override ')}"
        elif near == match[1]:  # of a level that is not there, or of all levels at once
            what = f"{match[1]} is not set by any of these choices."
            fix = "Add what is not there with a +: " + " ".join(f"-S '+{one}'" for one in overrides if near in one)
        elif near:
            fix = f"Did you mean {near}?"
        elif siblings := within(match[1].rpartition(".")[0]):
            fix = f"Use one of: {', '.join(siblings)}"
        else:
            fix = "See every setting by: vqvae2 config"
    return UserError(what, where=where, fix=fix, code=2)


def _quoted(override: str) -> str:
    """Show how to write a value that holds more than plain letters, digits, slashes, dots and spaces."""
    key, sign, value = override.partition("=")
    value = value.strip("'\"")
    if not (sign and key and value):
        return ""
    return f"""Quote the value: -S "{key}='{value}'\""""


def to_yaml(data: dict[str, Any], overrides: Sequence[str] = ()) -> str:
    """Write composed settings as the text of params.yaml, which begins with the overrides they were composed with."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(data, text)
    return HEADER + (f"{OVERRIDES}{shlex.join(overrides)}\n" if overrides else "") + text.getvalue()
