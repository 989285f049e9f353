"""`vqvae2 doctor`: checks of the machine, the project and the configured servers, with a fix for each problem."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict

from pipeline import dvc_yaml, params, preflight
from pipeline.checks import project_folder
from pipeline.checks.check import Answer, CheckResult, Request, result_of
from stages.errors import UserError


def show(*, as_json: bool) -> int:
    """Print the result of every check; return the exit status, 3 if a check failed."""
    results = run_checks()
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        for result in results:
            print(f"{result.state:<8} {result.name:<14} {result.text}")
            if result.fix:
                print(f"{'':<23} fix: {result.fix}")
    return 3 if any(result.state == "error" for result in results) else 0


def run_checks(environment: Mapping[str, str] = os.environ) -> list[CheckResult]:
    """Run all checks of a run, as if every stage were to run, and three of the project."""
    results = [result_of(name, ask, environment) for name, ask in preflight.MACHINE_CHECKS.items()]
    if any(result.state == "error" for result in results):  # the other checks import the required packages
        return results
    results += [result_of(name, ask, environment) for name, ask in preflight.PROJECT_CHECKS.items()]
    results.append(result_of("settings", check_settings, environment))
    try:
        data = params.read()
        request = Request(params.check(data), str(params.FILE), list(dvc_yaml.stages(data)), environment=environment)
    except UserError:  # an error of the check `settings`
        return results
    results.append(result_of("pipeline", project_folder.check_pipeline, environment))
    results.append(result_of("dvc", project_folder.check_dvc, environment))
    results += [result_of(name, ask, request) for name, ask in preflight.SETTINGS_CHECKS.items()]
    return results


def check_settings(environment: Mapping[str, str]) -> Answer:
    """Check that params.yaml and dvc.yaml are valid, and that conf/ composes to params.yaml."""
    data = params.read()
    params.check(data)
    dvc_yaml.stages(data)
    from pipeline.params_drift import drift  # imports Hydra, which may be missing: check_packages reports that

    difference, fix = drift()
    return Answer(difference or f"{params.FILE} is valid", fix)
