"""`vqvae2 promote`: the model of a pipeline run as a version of a registered model in MLflow."""

import re

from stages.errors import UserError
from stages.tracking import registry, store_check


def run(run_name: str, *, name: str, alias: str) -> int:
    """Register the model of a run and print its address; return the exit status.

    Raises UserError if MLflow does not answer, for a run that has no model, or for a name that MLflow does not accept.
    """
    for option, text in (("--name", name), ("--alias", alias)):
        if not re.fullmatch(r"[A-Za-z][\w-]*", text) or re.fullmatch(r"v\d+", text):
            raise UserError(
                f"{option} must be of letters, digits, - and _, and not of the form v1, got {text!r}.",
                where=option,
                fix=f"Use for example {option} {'vqvae2' if option == '--name' else 'champion'}.",
                code=2,
            )
    store_check.check_store()
    promotion = registry.promote(run_name, name=name, alias=alias)
    print(f"{promotion.run_name}: version {promotion.version} of {promotion.name} is {promotion.alias}")
    print(f'In Python: vqvae2.load("{promotion.uri}")')
    print(f"As a server: mlflow models serve --model-uri {promotion.uri} --env-manager local")
    return 0
